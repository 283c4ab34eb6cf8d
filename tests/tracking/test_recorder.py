"""MLflow in a process of its own: the same is written, and every end closes the run."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tttlab.tracking.executions import Execution
from tttlab.tracking.runs import pipeline_run
from tttlab.tracking.store import open_store

ROOT = Path(__file__).parents[2]

# {} is what happens while the run is open.
STAGE = """
import json, os, sys, time
from pathlib import Path
import psutil
from tttlab.errors import UserError
from tttlab.tracking.recorder import recorder
from tttlab.tracking.runs import start_run

def children():
    return [child.pid for child in psutil.Process().children()]

root, parent = Path(sys.argv[1]), sys.argv[2]
try:
    with recorder():
        with start_run(root, stage="adapt", name="adapt tiny", params={{"lr": 0.1}}, parent=parent,
                       tags={{"method": "actmad"}}) as run:
            run.log_series("loss", [3.0, 2.0, float("nan")])
            {}
            run.log_metrics({{"last": 1.0}})
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
print(json.dumps([run.id, children(), "mlflow" in sys.modules]))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    return root, pipeline_run(root, Execution("repro", os.getpid()))


def stage(store, happens="pass", signals=()):
    """Run a stage and send signals to all its processes as soon as it says a word.

    Returns:
        its exit code, what it has written to both streams, and its run in MLflow.
    """
    root, parent = store
    client, experiment = open_store(root)
    before = {run.info.run_id for run in client.search_runs([experiment])}
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE.format(happens), str(root), parent],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    words = process.stdout.readline()
    for number in signals:
        os.killpg(process.pid, number)
    rest, errors = process.communicate(timeout=60)
    runs = [run for run in client.search_runs([experiment]) if run.info.run_id not in before]
    return process.returncode, words + rest, errors, runs


def test_what_the_recorder_writes_is_there_and_the_stage_never_imports_mlflow(store):
    code, words, errors, (run,) = stage(store, "run.set_tags({'gain': 1}); assert children()")
    assert (code, errors) == (0, "")
    assert words.strip() == f'["{run.info.run_id}", [], false]'
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1"}
    assert run.data.metrics == {"loss": 2, "last": 1}
    assert run.data.tags.items() >= {"method": "actmad", "gain": "1", "stage": "adapt"}.items()
    assert run.data.tags["mlflow.parentRunId"] == store[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_closes_the_run(store, number):
    code, _, _, (run,) = stage(store, "print(flush=True); time.sleep(60)", [number])
    assert code in (-signal.SIGINT, 130, 128 + signal.SIGTERM)
    assert run.info.status == "KILLED"
    assert run.data.metrics == {"loss": 2}


def test_an_error_of_mlflow_is_the_stages_own(store):
    code, _, errors, (run,) = stage(store, "run.log_metrics({'loss': 'no number'})")
    assert code == 1
    assert run.info.status == "FAILED"
    assert run.data.tags["error"].startswith("ValueError: could not convert string to float")
    assert "in log_points" in errors  # where it happened, in the recorder


def test_the_end_of_the_recorder_is_told_in_one_line(store):
    kill = "os.kill(children()[0], 9)"
    code, _, errors, (run,) = stage(store, kill)
    assert code == 2
    assert errors.startswith("the process that writes to MLflow was ended from outside: ")
    assert errors.count("\n") == 1
    assert run.info.status == "RUNNING"  # the next run that starts closes it


def test_a_killed_stage_leaves_no_recorder(store):
    code, words, *_ = stage(store, "print(*children(), flush=True); os.kill(os.getpid(), 9)")
    assert code == -signal.SIGKILL
    (recorder,) = map(int, words.split())
    with suppress(psutil.NoSuchProcess):
        psutil.Process(recorder).wait(10)


@pytest.mark.parametrize(
    "none", ["import torch", "os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])"]
)
def test_where_nothing_is_won_there_is_none(none):
    code = (
        f"import os, psutil; from tttlab.tracking.recorder import recorder\n{none}\n"
        "with recorder(): print(psutil.Process().children())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"
