import itertools
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from tttlab.errors import UserError
from tttlab.evaluation import metrics
from tttlab.evaluation.predictions import add_correctness
from tttlab.runtime.process_identity import is_dvc
from tttlab.tracking import store
from tttlab.tracking.comparison import log_comparison, log_predictions, log_trials
from tttlab.tracking.executions import Execution, close_abandoned, find_execution, owner_tags
from tttlab.tracking.pages import ui_command, ui_pages
from tttlab.tracking.records import create_run, flatten, log_tags
from tttlab.tracking.runs import pipeline_run, run_link, start_run
from tttlab.tracking.store import database_uri, files_uri, find_runs, open_store

ROOT = Path(__file__).parents[2]

FIRST_USE = """
import sys; from pathlib import Path
from tttlab.tracking.executions import Execution
from tttlab.tracking.runs import pipeline_run, start_run
root, pid = Path(sys.argv[1]), int(sys.argv[2])
parent = pipeline_run(root, Execution("repro", pid))
with start_run(root, stage="adapt", name=f"adapt {sys.argv[3]}", params={}, parent=parent) as run:
    run.log_series("loss", [3.0, 2.0, 1.0])
print(parent)
"""
WAIT = """
import sys, time; from pathlib import Path; from tttlab.tracking.runs import start_run
with start_run(Path(sys.argv[1]), stage="pretrain", name=sys.argv[2], params={"lr": 0.1},
                        parent=sys.argv[3], resume_key=sys.argv[2]) as run:
    run.log_series("loss", [4.0, 3.0])
    print(run.id, flush=True)
    time.sleep(120)
"""


def child(script, *arguments) -> subprocess.Popen:
    variables = {"PYTHONPATH": str(ROOT / "src"), "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env={**os.environ, **variables}, text=True, **pipes)


def record(root, run_id):
    return open_store(root)[0].get_run(run_id)


def curve(root, run_id, name):
    points = open_store(root)[0].get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    open_store(root)
    return root


# Characters with a meaning in addresses, filters of MLflow, JSON or shells; the last name has all.
ODD = [
    "100%20",
    "50%",
    "%41",
    "a b",
    "a#b",
    "a?b",
    "it's",
    'a"b',
    "a;b",
    "a&b=c",
    "a:b@c",
    "a\\b",
    "a%(x)s",
    "$x{y}[z]~",
    "ä",
    "a b?c=d&e#f'g\"h;i%20j%k:l@m\\n$ä",
]


@pytest.fixture
def root(empty_store, tmp_path):
    """A store of its own. The database is copied, as if the project had been moved."""
    shutil.copy(empty_store / "mlflow.db", tmp_path)
    return tmp_path


@pytest.fixture
def parent(root):
    return pipeline_run(root, Execution("repro", os.getpid()))


@pytest.fixture
def start(root, parent):
    def begin(**options):
        settings = {"stage": "adapt", "name": "adapt tiny · actmad", "params": {}, "parent": parent}
        return start_run(root, **(settings | options))

    return begin


def test_import_is_cheap():
    code = (
        "import sys, tttlab.tracking.comparison; "
        "print([m for m in ('mlflow', 'torch', 'pandas') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "src", check=True)
    assert result.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("fresh")
    children = [child(FIRST_USE, root, os.getpid(), number) for number in range(4)]
    return root, [(*process.communicate(timeout=180), process.returncode) for process in children]


class TestConcurrentFirstUse:
    def test_four_processes_succeed_without_a_word_on_stderr(self, finished):
        _, results = finished
        assert [(code, errors) for _, errors, code in results] == [(0, "")] * 4

    def test_they_share_one_parent_and_log_all(self, finished):
        root, results = finished
        (parent,) = {output for output, _, _ in results}
        client, experiment = open_store(root)
        runs = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent.strip()}'")
        names = sorted(run.info.run_name for run in runs)
        assert names == [f"adapt {number}" for number in range(4)]
        assert len(client.search_runs([experiment], "tags.role = 'pipeline'")) == 1
        assert all(curve(root, run.info.run_id, "loss") == [(0, 3), (1, 2), (2, 1)] for run in runs)


class TestPipelineRun:
    def test_same_execution_same_run(self, root, parent):
        assert pipeline_run(root, Execution("repro", os.getpid())) == parent
        assert record(root, parent).info.status == "RUNNING"

    def test_other_process_other_name_other_run(self, root, parent):
        executions = [
            Execution("repro", os.getppid()),
            Execution("fast-newt", os.getpid()),
            Execution("by hand 1f", None),
        ]
        assert len({parent, *(pipeline_run(root, execution) for execution in executions)}) == 4

    def test_a_later_process_with_the_same_number_is_another_execution(self, root, parent):
        log_tags(open_store(root)[0], parent, {"pid_started": psutil.boot_time() - 1000})
        assert pipeline_run(root, Execution("repro", os.getpid())) != parent

    def test_a_clock_set_by_a_second_is_no_other_process(self, root, parent):
        started = psutil.Process().create_time()
        log_tags(open_store(root)[0], parent, {"pid_started": started + 1})
        assert pipeline_run(root, Execution("repro", os.getpid())) == parent

    def test_by_hand_it_is_never_left_open(self, root):
        by_hand = pipeline_run(root, Execution("by hand 1f", None))
        assert record(root, by_hand).info.status == "FINISHED"
        assert pipeline_run(root, Execution("by hand 1f", None)) == by_hand


class TestFindExecution:
    def test_experiment_name_comes_first(self):
        assert find_execution(psutil.Process(), "fast-newt", "1f").name == "fast-newt"

    def test_without_dvc_it_is_by_hand(self):
        assert find_execution(psutil.Process(), None, "1f") == Execution("by hand 1f", None)

    def test_nearest_dvc_drives(self, tmp_path):
        inner = "import time; print('up', flush=True); time.sleep(60)"
        program = tmp_path / "dvc"
        outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
        program.write_text(outer, encoding="utf-8")
        shell = f"exec {sys.executable} {program} repro"
        with subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE) as dvc:
            dvc.stdout.readline()
            (stage,) = psutil.Process(dvc.pid).children()
            assert find_execution(stage, None, "1f") == Execution("repro", dvc.pid)
            stage.kill()

    def test_a_file_that_is_called_like_dvc_is_not_dvc(self, tmp_path):
        editor = [sys.executable, "-c", "import time; time.sleep(60)", "dvc.yaml"]
        with subprocess.Popen(editor) as process:
            assert not is_dvc(psutil.Process(process.pid))
            process.kill()


class TestStartRun:
    def test_what_is_logged_can_be_read_back(self, root, parent, start, tmp_path):
        params = {
            "steps": 5,
            "views": {"flip": False, "scale": [0.4, 1.0]},
            "odd [name]": "x",
            "nothing": {},
        }
        note = tmp_path / "note.txt"
        note.write_text("kept", encoding="utf-8")
        with start(params=params, tags={"model": "tiny", "method": "actmad"}) as run:
            assert record(root, run.id).info.status == "RUNNING"
            values = {"cost/peak_memory_mb": 12.5, "unknown": None, "not known": float("nan")}
            run.log_metrics(values)
            run.log_series("loss", np.linspace(1, 0, 2500))
            run.log_series("knn", [0.5, 0.75], steps=[5, 10])
            run.log_artifact(note, "notes")
            run.log_table(pd.DataFrame({"gain": [0.25]}), "tables/gain.json")
            run.log_input("test", "sklearn/digits", "d" * 50, count=360, context="test")
        logged = record(root, run.id)
        assert logged.info.run_name == "adapt tiny · actmad"
        assert logged.info.status == "FINISHED"
        assert logged.data.params == {
            "steps": "5",
            "views.flip": "False",
            "views.scale": "[0.4, 1.0]",
            "odd _name_ 6b2a9825": "x",
            "nothing": "{}",
        }
        assert logged.data.metrics.keys() == {"cost/peak_memory_mb", "loss", "knn"}
        assert len(curve(root, run.id, "loss")) == 2500
        assert curve(root, run.id, "knn") == [(5, 0.5), (10, 0.75)]
        expected = {
            "stage": "adapt",
            "model": "tiny",
            "method": "actmad",
            "mlflow.parentRunId": parent,
        }
        assert expected.items() <= logged.data.tags.items()
        folder = root / "mlruns" / run.id / "artifacts"
        assert (folder / "notes" / "note.txt").read_text(encoding="utf-8") == "kept"
        table = json.loads((folder / "tables" / "gain.json").read_text())
        assert table == {"columns": ["gain"], "data": [[0.25]]}
        (data,) = logged.inputs.dataset_inputs
        assert (data.dataset.name, len(data.dataset.digest)) == ("test", 36)
        assert data.tags[0].value == "test"
        assert json.loads(data.dataset.profile) == {"num_rows": 360}

    @pytest.mark.parametrize(
        ("error", "status"),
        [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(1), "KILLED")],
    )
    def test_status_tells_how_it_ended(self, root, start, error, status):
        with pytest.raises(type(error)), start() as run:
            raise error
        message = "ValueError: no" if status == "FAILED" else None
        assert record(root, run.id).info.status == status
        assert record(root, run.id).data.tags.get("error") == message

    def test_sigterm_is_as_before_afterwards(self, start):
        handler = signal.getsignal(signal.SIGTERM)
        with start():
            assert signal.getsignal(signal.SIGTERM) is not handler
        assert signal.getsignal(signal.SIGTERM) is handler

    def test_an_unfinished_run_goes_on(self, root, start):
        def work():
            with start(params={"lr": 0.1}, resume_key="k1") as run:
                run.log_series("loss", [3.0, 2.0])
                started.append(run)
                raise KeyboardInterrupt

        started = []
        with pytest.raises(KeyboardInterrupt):
            work()
        (first,) = started
        with start(params={"lr": 0.1}, resume_key="k1") as second:
            second.log_series("loss", [1.0], steps=[2])
        assert (first.resumed, second.resumed) == (False, True)
        assert second.id == first.id
        assert curve(root, first.id, "loss") == [(0, 3), (1, 2), (2, 1)]
        assert record(root, first.id).info.status == "FINISHED"

    def test_a_run_goes_on_as_long_as_its_work_is_kept_finished_or_not_and_no_other_does(
        self, root, start
    ):
        with start(params={"lr": 0.1}, resume_key="k1") as first:
            first.log_series("loss", [3.0])
        with (
            start(params={"lr": 0.2}, resume_key="k1") as resumed,
            start(resume_key="k2") as other_key,
            start() as no_key,
        ):
            assert record(root, resumed.id).info.status == "RUNNING"
        assert (resumed.id, resumed.resumed) == (first.id, True)
        assert len({first.id, other_key.id, no_key.id}) == 3
        assert record(root, first.id).info.status == "FINISHED"

    def test_a_resumed_run_moves_to_the_execution_that_finishes_it(self, root, parent, start):
        with pytest.raises(KeyboardInterrupt), start(resume_key="k1") as run:
            raise KeyboardInterrupt
        later = pipeline_run(root, Execution("repro", os.getppid()))
        with start(resume_key="k1", parent=later):
            pass
        assert record(root, run.id).data.tags["mlflow.parentRunId"] == later != parent


@pytest.fixture(scope="module")
def killed(empty_store, tmp_path_factory):
    """Two runs in processes of their own: one gets SIGTERM, the other SIGKILL."""
    root = tmp_path_factory.mktemp("killed")
    shutil.copy(empty_store / "mlflow.db", root)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as dvc:
        parent = pipeline_run(root, Execution("repro", dvc.pid))
        children = {name: child(WAIT, root, name, parent) for name in ("politely", "hard")}
        runs = {name: process.stdout.readline().strip() for name, process in children.items()}
        closed = close_abandoned(root)
        children["politely"].terminate()
        children["hard"].kill()
        exits = {name: process.wait(timeout=60) for name, process in children.items()}
        for process in children.values():
            process.communicate()
        dvc.communicate(b"\n")
    return root, parent, runs, exits, closed


class TestKilled:
    def test_a_run_at_work_is_left_alone(self, killed):
        assert killed[4] == []

    def test_sigterm_closes_the_run_at_once(self, killed):
        root, _, runs, exits, _ = killed
        assert exits["politely"] == 128 + signal.SIGTERM
        assert record(root, runs["politely"]).info.status == "KILLED"

    def test_after_sigkill_the_next_start_closes_run_and_parent_and_goes_on(self, killed):
        root, parent, runs, exits, _ = killed
        assert exits["hard"] == -signal.SIGKILL
        assert record(root, runs["hard"]).info.status == "RUNNING"
        foreign = create_run(*open_store(root), "elsewhere", owner_tags(os.getpid()))
        log_tags(open_store(root)[0], foreign, {"host": f"not {socket.gethostname()}", "pid": 1})
        with start_run(root, stage="pretrain", name="other", params={}, parent=parent):
            pass
        statuses = {name: record(root, run_id).info.status for name, run_id in runs.items()}
        assert statuses == {"politely": "KILLED", "hard": "KILLED"}
        assert record(root, parent).info.status == "KILLED"
        assert record(root, foreign).info.status == "RUNNING"
        settings = {"stage": "pretrain", "name": "hard", "params": {"lr": 0.2}, "parent": parent}
        with start_run(root, **settings, resume_key="hard") as run:
            run.log_series("loss", [2.0], steps=[2])
        assert run.id == runs["hard"]
        assert curve(root, run.id, "loss") == [(0, 4), (1, 3), (2, 2)]
        assert record(root, run.id).data.params == {"lr": "0.1"}


def test_a_moved_project_finds_its_files(root, start, tmp_path_factory):
    with start() as run:
        run.log_table(pd.DataFrame({"gain": [0.25]}), "gain.json")
    moved = tmp_path_factory.mktemp("elsewhere") / "project"
    shutil.copytree(root, moved)
    shutil.rmtree(root / "mlruns")
    client, experiment = open_store(moved)
    assert [file.path for file in client.list_artifacts(run.id)] == ["gain.json"]
    location = client.get_experiment(experiment).artifact_location
    assert Path(location.removeprefix("file://")) == moved / "mlruns"


def test_only_paths_below_the_moved_folder_are_corrected(tmp_path, monkeypatch):
    """MLflow's own experiment is; a folder whose name only begins alike is not."""
    old, new = tmp_path / "project", tmp_path / "moved"
    old.mkdir()
    monkeypatch.chdir(old)  # where MLflow puts its own experiment
    client, _ = open_store(old)
    beside = f"{files_uri(old)}-of-mine"
    beside_id = client.create_experiment("mine", artifact_location=beside)
    assert client.get_experiment("0").artifact_location == f"{old}/mlruns/0"
    old.rename(new)
    client, experiment = open_store(new)
    assert client.get_experiment(experiment).artifact_location == files_uri(new)
    assert client.get_experiment("0").artifact_location == f"{new}/mlruns/0"
    assert client.get_experiment(beside_id).artifact_location == beside


def test_paths_that_cannot_be_corrected_are_told_in_one_line(root, monkeypatch):
    def refuse(*_):
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(store, "relocate", refuse)
    with pytest.raises(UserError) as caught:
        open_store(root)
    assert str(caught.value) == (
        f"{root}/mlflow.db: expected paths in {root}, found those of the folder from which it was "
        "moved or copied, and no way to correct them (attempt to write a readonly database); make "
        "it writable"
    )


@pytest.mark.parametrize("name", ODD)
def test_a_project_folder_may_be_called_anything(name, empty_store, tmp_path, start, root):
    folder = tmp_path / "outer" / name
    folder.mkdir(parents=True)
    shutil.copy(empty_store / "mlflow.db", folder)
    note = tmp_path / "note.txt"
    note.write_text("kept", encoding="utf-8")
    parent = pipeline_run(folder, Execution("repro", os.getpid()))
    with start_run(folder, stage="adapt", name="adapt", params={}, parent=parent) as run:
        run.log_artifact(note)
    assert (folder / "mlruns" / run.id / "artifacts" / "note.txt").read_text() == "kept"
    client, _ = open_store(folder)
    assert Path(client.download_artifacts(run.id, "note.txt", str(tmp_path))).read_text() == "kept"
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        run_ids = {run_id for (run_id,) in database.execute("SELECT run_uuid FROM runs")}
    assert run_ids == {run.id, parent}
    assert os.listdir(tmp_path / "outer") == [name]  # and no folder of a misread name
    command = ui_command(folder, 5001)
    assert command[command.index("--backend-store-uri") + 1] == database_uri(folder)
    assert command[command.index("--default-artifact-root") + 1] == files_uri(folder)


@pytest.mark.parametrize("name", ODD)
def test_executions_models_and_sources_may_be_called_anything(name, root, start):
    execution = Execution(name, os.getpid())
    parent = pipeline_run(root, execution)
    assert pipeline_run(root, execution) == parent
    assert pipeline_run(root, Execution(f"{name}'", os.getpid())) != parent
    with start(parent=parent, tags={"model": name}, resume_key=f"key {name}") as run:
        run.log_input("test", f"/data/{name}", "d" * 36, count=3, context="test")
    with start(parent=parent, resume_key=f"key {name}") as resumed:
        pass
    assert resumed.id == run.id
    (data,) = record(root, run.id).inputs.dataset_inputs
    assert json.loads(data.dataset.source) == {"uri": f"/data/{name}"}
    assert json.loads(data.dataset.profile) == {"num_rows": 3}


def previous(revision: str) -> str:
    """The revision of MLflow's tables before this one."""
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations

    return ScriptDirectory(*db_migrations.__path__).get_revision(revision).down_revision


@pytest.mark.parametrize(
    ("change_revision", "expected"),
    [
        (
            previous,
            "found those of an older version; copy it and run .* -m mlflow db upgrade "
            "sqlite.*/mlflow.db, or move it away",
        ),
        (
            lambda _: "f" * 12,
            "found those of a newer version; install that, or move it away and a new one is made",
        ),
        (
            None,
            r"expected a database of MLflow, found none that can be read "
            r"\(file is not a database\); move it away",
        ),
    ],
)
def test_a_database_of_another_version_is_told_in_one_line(root, change_revision, expected):
    path = root / "mlflow.db"
    if change_revision is None:
        path.write_text("something else, longer than sixteen bytes")
    else:
        with closing(sqlite3.connect(path)) as database, database:
            ((revision,),) = database.execute("SELECT version_num FROM alembic_version")
            revision = change_revision(revision)
            database.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    content = path.read_bytes()
    with pytest.raises(UserError, match=f"^{root}/mlflow.db: .*{expected}") as error:
        pipeline_run(root, Execution("repro", os.getpid()))
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content


def test_more_runs_than_one_page_holds_are_found(root, parent, start):
    """MLflow's pages have a thousand runs; here they have two."""
    client, experiment = open_store(root)
    search = client.search_runs

    def search_two(*arguments, **options):
        return search(*arguments, **options | {"max_results": 2})

    client.search_runs = search_two
    try:
        for number in range(5):
            with start(tags={"model": f"m{number}"}):
                pass
        runs = find_runs(client, experiment, {"mlflow.parentRunId": parent})
    finally:
        client.search_runs = search
    assert [run.data.tags["model"] for run in runs] == ["m4", "m3", "m2", "m1", "m0"]


def test_a_deleted_experiment_comes_back(root):
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        cursor = database.execute(
            "UPDATE experiments SET lifecycle_stage='deleted' WHERE name='ttt-lab'"
        )
    assert cursor.rowcount == 1
    client, experiment = open_store(root)
    assert client.get_experiment(experiment).lifecycle_stage == "active"


class TestLogPredictions:
    @staticmethod
    def predictions() -> pd.DataFrame:
        generator = np.random.default_rng(0)
        images = pd.DataFrame({"image_id": [f"{i}" for i in range(20)]})
        blocks = [images.assign(shift="clean", corruption="none", severity=0)]
        for corruption, severity in itertools.product(("fog", "snow"), (1, 3, 5)):
            shift = f"{corruption}-{severity}"
            blocks.append(images.assign(shift=shift, corruption=corruption, severity=severity))
        table = pd.concat(blocks, ignore_index=True)
        labels, source, adapted = generator.integers(3, size=(3, len(table)))
        return table.assign(
            label=labels,
            source_prediction=source,
            adapted_prediction=adapted,
            fell_back=generator.random(len(table)) < 0.1,
            untrained_prediction=source,
            seed=0,
            loss_first=float("nan"),
            source_confidence=0.5,
            adapted_confidence=0.5,
            distance=1.0,
            gate_open=True,
            gate_milliseconds=0.0,
            milliseconds=generator.random(len(table)),
        )

    def test_agrees_with_the_evaluation(self, root, start):
        table = self.predictions()
        with start() as run:
            log_predictions(run, add_correctness(table))
        shifts, summary = metrics.by_shift(table), metrics.summarise(table)
        curves = {"accuracy": "accuracy_adapted", "accuracy_source": "accuracy_source"}
        for name, column in curves.items():
            for corruption in ("fog", "snow"):
                rows = shifts[shifts["corruption"] == corruption]
                expected = dict(zip(rows["severity"], rows[column], strict=True))
                logged = dict(curve(root, run.id, f"{name}/{corruption}"))
                assert logged == pytest.approx(expected, abs=5e-5)
        logged = record(root, run.id).data.metrics
        pairs = {
            "gain/mean": "gain",
            "clean/source": "clean_source",
            "clean/adapted": "clean_adapted",
            "accuracy/mean": "accuracy_adapted",
            "accuracy_source/mean": "accuracy_source",
            "cost/milliseconds_p50": "milliseconds_p50",
            "cost/milliseconds_p95": "milliseconds_p95",
            "fell_back": "fell_back",
        }
        expected = {name: summary[key] for name, key in pairs.items()}
        assert {name: logged[name] for name in pairs} == pytest.approx(expected, abs=5e-5)

    # MLflow takes names of at most 250 characters.
    @pytest.mark.parametrize("long", ["", "x" * 246])
    def test_every_shift_is_a_metric_of_its_own_whatever_its_name(self, root, start, long):
        ends = ("a b", "a_b", "a,b", "a;b", "é", "e\u0301", "ê", "100%", "100_", "A b", "$x$", '"')
        names = [f"photos/{long}{end}" for end in ends]
        rows = self.predictions().query("corruption == 'fog'")
        table = pd.concat([rows.assign(corruption=name, severity=0) for name in names])
        accuracies = np.arange(len(names)) / 60
        right = np.concatenate([np.arange(60) < round(60 * accuracy) for accuracy in accuracies])
        table["label"], table["adapted_prediction"] = 1, right.astype(int)
        with start() as run:
            log_predictions(run, add_correctness(table))
        logged = record(root, run.id).data.metrics
        photos = {name: x for name, x in logged.items() if name.startswith("accuracy/photos/")}
        assert sorted(photos.values()) == pytest.approx(accuracies, abs=5e-5)
        if not long:
            assert {f"accuracy/photos/{end}" for end in ("a b", "a_b", "é", "A b")} <= set(photos)

    def test_without_labels_only_changes_and_cost(self, root, start):
        table = self.predictions().assign(label=-1)
        with start() as run:
            log_predictions(run, add_correctness(table))
        logged = record(root, run.id).data.metrics
        assert logged.keys() == {
            "changed/fog",
            "changed/snow",
            "changed/mean",
            "fell_back",
            "cost/milliseconds_p50",
            "cost/milliseconds_p95",
        }
        shifted = table[table["shift"] != "clean"]
        different = shifted["source_prediction"] != shifted["adapted_prediction"]
        assert logged["changed/mean"] == pytest.approx(different.mean(), abs=5e-5)

    def test_a_shift_without_labels_has_its_changes_where_others_have_accuracies(self, root, start):
        table = self.predictions()
        table["label"] = table["label"].where(table["corruption"] != "snow", -1)
        with start() as run:
            log_predictions(run, add_correctness(table))
        logged = record(root, run.id).data.metrics
        by_shift = {name for name in logged if name.endswith(("/fog", "/snow"))}
        assert by_shift == {"accuracy/fog", "accuracy_source/fog", "changed/snow"}
        snow = table[table["corruption"] == "snow"]
        different = snow["source_prediction"] != snow["adapted_prediction"]
        expected = different.groupby(snow["severity"]).mean().to_dict()
        assert dict(curve(root, run.id, "changed/snow")) == pytest.approx(expected, abs=5e-5)


def test_comparison_can_be_read_on_the_parent(root, parent, tmp_path):
    page, picture = tmp_path / "report.html", tmp_path / "gain.png"
    page.write_text("<p>page", encoding="utf-8")
    picture.write_bytes(b"picture")
    log_comparison(
        root,
        parent,
        table=pd.DataFrame({"run": ["actmad"], "gain": [0.047]}),
        description="| run | gain |\n|---|---|\n| actmad | +4.7 |",
        figures={"gain": picture},
        metrics={"gain/mae_vit/actmad": 0.047, "gain/mae_vit/none": None},
        settings={"seed": 0, "adapt": {"runs": {"actmad": {"lr": 0.1}}}},
        page=page,
    )
    logged = record(root, parent)
    assert logged.data.params == {"seed": "0", "adapt.runs.actmad.lr": "0.1"}
    client, experiment = open_store(root)
    view = json.loads(client.get_experiment(experiment).tags["mlflow.sharedViewState.executions"])
    assert "metrics.`gain/mae_vit/actmad`" in view["selectedColumns"]
    assert view["searchFilter"] == 'tags.stage = "pipeline"'
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics == {"gain/mae_vit/actmad": 0.047}
    assert "| actmad | +4.7 |" in logged.data.tags["mlflow.note.content"]
    folder = root / "mlruns" / parent / "artifacts"
    paths = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert paths == {"comparison.json", "figures/gain.png", "report.html"}


def test_settings_of_a_comparison_made_again_stay_the_first_ones(root, parent, tmp_path):
    (tmp_path / "report.html").write_text("<p>page", encoding="utf-8")
    for settings in ({"seed": 0}, {"seed": 1, "lr": 0.1}):
        log_comparison(
            root,
            parent,
            table=pd.DataFrame({"run": ["a"]}),
            description="",
            figures={},
            metrics={},
            settings=settings,
            page=tmp_path / "report.html",
        )
    assert record(root, parent).data.params == {"seed": "0", "lr": "0.1"}


def test_trials_lie_below_their_tuning_with_settings_and_a_curve_over_the_rounds(root, start):
    trials = [
        ({"lr": 0.1, "steps": 2}, {10: {"score": 0.5}, 40: {"score": 0.6}}),
        ({"lr": 0.2, "steps": 1}, {10: {"score": 0.4}}),
    ]
    with start() as run:
        log_trials(run, trials, {"model": "vit", "run": "ssl"})
    client, experiment = open_store(root)
    below = f"tags.mlflow.parentRunId = '{run.id}'"
    logged = client.search_runs([experiment], below, order_by=["metrics.rank"])
    settings = [trial.data.params for trial in logged]
    assert settings == [{"lr": "0.1", "steps": "2"}, {"lr": "0.2", "steps": "1"}]
    assert dict(curve(root, logged[0].info.run_id, "score")) == {10: 0.5, 40: 0.6}
    assert logged[0].info.run_name == "trial 1 · lr 0.1, steps 2"
    assert [trial.data.metrics["rank"] for trial in logged] == [1, 2]
    assert {trial.info.status for trial in logged} == {"FINISHED"}
    assert logged[0].data.tags["stage"] == "trial"


def test_a_tuning_that_logs_its_trials_again_has_them_once(root, start):
    trials = [({"lr": 0.1}, {10: {"score": 0.5}}), ({"lr": 0.2}, {10: {"score": 0.4}})]
    for _ in range(2):
        with start(resume_key="k1") as run:
            log_trials(run, trials, {"model": "vit", "run": "ssl"})
    client, experiment = open_store(root)
    below = f"tags.mlflow.parentRunId = '{run.id}'"
    logged = client.search_runs([experiment], below, order_by=["metrics.rank"])
    assert [trial.data.params for trial in logged] == [{"lr": "0.1"}, {"lr": "0.2"}]


def test_a_gate_and_training_are_told_apart(root, start):
    table = TestLogPredictions.predictions().assign(loss_first=1.0, gate_milliseconds=0.1)
    table["untrained_prediction"] = np.roll(table["adapted_prediction"], 1)
    table["gate_open"] = np.arange(len(table)) % 3 == 0
    with start() as run:
        log_predictions(run, add_correctness(table))
    logged, summary = record(root, run.id).data.metrics, metrics.summarise(table)
    expected = {
        "gain/training": summary["training_gain"],
        "gate/gain": summary["gated"]["gain"],
        "gate/open": summary["gated"]["open"],
        "gate/clean_adapted": summary["gated"]["clean_adapted"],
    }
    assert {name: logged[name] for name in expected} == pytest.approx(expected, abs=5e-5)


def test_run_link_only_to_runs_of_this_store(root, parent):
    _, experiment = open_store(root)
    assert run_link(root, parent).startswith(f"#/experiments/{experiment}/runs/{parent}?")
    assert run_link(root, "0" * 32) is None
    assert run_link(root, None) is None


def test_experiment_explains_itself_and_leads_to_the_comparison(root):
    client, experiment = open_store(root)
    tags = client.get_experiment(experiment).tags
    pages = ui_pages(root)
    for name, stage in {"executions": "pipeline", "trials": "trial", "comparison": "adapt"}.items():
        key = pages[name].rpartition("viewStateShareKey=")[2]
        view = json.loads(tags[f"mlflow.sharedViewState.{key}"])
        assert f"({pages[name]})" in tags["mlflow.note.content"]
        assert view["searchFilter"] == f'tags.stage = "{stage}"'
    assert {"metrics.`gain/mean`", "metrics.`accuracy/mean`"} <= set(view["selectedColumns"])


def test_flatten():
    nested = {"a": {"b": 1, "c": {"d": [2]}}, "e": None}
    assert flatten(nested) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_server_listens_on_this_machine_only(tmp_path):
    command = ui_command(tmp_path, 5001)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--workers") + 1] == "1"
    address = f"sqlite+pysqlite:///{tmp_path}/mlflow.db"
    assert command[command.index("--backend-store-uri") + 1] == address
