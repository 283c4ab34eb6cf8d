"""The pipeline for ARC, from the tasks to the page, on six small tasks and a tiny network."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

from tools.stage_code import ROOT
from tttlab.arc.settings import read_settings
from tttlab.tracking.store import find_runs, open_store

pytestmark = pytest.mark.slow
STAGES = ("prepare", "train", "adapt", "align", "evaluate", "report")
TINY = {
    "tasks": {"largest": 6, "count": 6},
    "invented": {"tasks": 31, "pairs": 2},
    "auxiliary": {"offline": 0, "test_time": 1, "symmetries": ["turn90", "transpose"]},
    "network": {"canvas": 8, "width": 16, "depth": 1, "heads": 2, "mlp": 16},
    "train": {"epochs": 2, "warmup_epochs": 1},
    "alignment": 4,
    # Not measured: what is compared to the last bit must be the very same computation.
    "machine": {"images_per_step": 2},
}
RUNS = {
    "none": {"steps": 0},
    "token": {"trainable": "tokens"},
    "all": {},
    "joint": {"together": True},
    "scratch": {"offline": False},
}


def lay_out(project: Path) -> Path:
    """Copy what `arc/` needs into a folder, with tiny settings; returns its `arc`."""
    home = project / "arc"
    shutil.copytree(ROOT / "arc", home, ignore=shutil.ignore_patterns("outputs", "__pycache__"))
    yaml = YAML(typ="safe")
    values = yaml.load(home / "params.yaml")
    for section, changes in TINY.items():
        values[section] = {**values[section], **changes} if isinstance(changes, dict) else changes
    values["adapt"]["defaults"] |= {"steps": 6, "pairs": 4, "warmup": 1}
    values["adapt"] |= {"runs": RUNS, "record": [0.5]}
    yaml.dump(values, home / "params.yaml")
    return home


def start(home: Path, *command: str) -> subprocess.Popen:
    """Start a stage as DVC does, the project being the folder above."""
    environment = os.environ | {"DVC_ROOT": str(home.parent), "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(home: Path, *command: str) -> str:
    """Run a stage to its end."""
    process = start(home, *command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All stages, one after the other: `arc` of the project."""
    home = lay_out(tmp_path_factory.mktemp("project"))
    for stage in STAGES:
        run(home, f"pipeline.{stage}")
    return home


def tables(home: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(home / "outputs" / "adapted" / name)


def comparable(home: Path, name: str) -> pd.DataFrame:
    """Give a run's votes with cells that can be compared."""
    votes = tables(home, f"{name}/votes.parquet")
    return votes.assign(cells=[tuple(cells) for cells in votes["cells"]])


def test_metrics_have_the_promised_form(finished):
    runs = json.loads((finished / "outputs" / "metrics.json").read_text(encoding="utf-8"))["runs"]
    assert set(runs) == set(RUNS)
    promised = {"tasks", "solved", "pass1", "pass2", "pass1_low", "pass1_high"}
    for values in runs.values():
        assert promised | {"pass1_one_view", "seconds_per_task"} <= set(values)
        assert values["tasks"] == 6
        assert values["seconds_per_task"] > 0
        assert values["fell_back"] == 0


def test_every_run_answers_every_question_after_every_recorded_step(finished):
    tasks = json.loads((finished / "outputs/tasks/evaluation.json").read_text(encoding="utf-8"))
    asked = {(name, question) for name in tasks for question in range(len(tasks[name]["test"]))}
    for name, steps in (("none", {0}), ("all", {0, 3, 6}), ("joint", {6}), ("scratch", {0, 3, 6})):
        votes = comparable(finished, name)
        for _, part in votes.groupby("steps"):
            assert set(zip(part["task"], part["question"], strict=True)) == asked
        assert set(votes["steps"]) == steps
        assert votes["place"].max() <= 10
    # Before its first step a run is the control.
    columns = ["task", "question", "place", "votes", "cells"]
    before = comparable(finished, "all").query("steps == 0")[columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(before, comparable(finished, "none")[columns])


def test_training_lowers_the_loss_of_the_demonstrations(finished):
    for name in ("token", "all", "scratch"):
        losses = tables(finished, f"{name}/tasks.parquet").groupby("steps")["loss"].mean()
        assert losses[6] < losses[0]


def test_no_answer_reaches_a_prediction(finished, tmp_path):
    """With noise for answers the predictions are the same, and only the evaluation differs."""
    home = tmp_path / "arc"
    shutil.copytree(finished, home)
    shutil.rmtree(home / "outputs" / "adapted")
    for file in (home / "outputs/tasks/answers.json",):
        noise = np.random.default_rng(0)
        answers = json.loads(file.read_text(encoding="utf-8"))
        spoilt = {
            name: [noise.integers(0, 10, (2, 3)).tolist() for _ in grids]
            for name, grids in answers.items()
        }
        file.write_text(json.dumps(spoilt), encoding="utf-8")
    given = json.loads((home / "outputs/tasks/evaluation.json").read_text(encoding="utf-8"))
    assert all(set(pair) == {"input"} for task in given.values() for pair in task["test"])
    run(home, "pipeline.adapt", "none", "all")
    for name in ("none", "all"):
        pd.testing.assert_frame_equal(comparable(home, name), comparable(finished, name))


def test_adapt_depends_on_no_file_with_answers():
    stages = YAML(typ="safe").load((ROOT / "arc" / "dvc.yaml").read_text(encoding="utf-8"))[
        "stages"
    ]
    reading = {
        name for name, stage in stages.items() if "outputs/tasks/answers.json" in stage["deps"]
    }
    whole = {name for name, stage in stages.items() if "outputs/tasks" in stage["deps"]}
    assert reading | whole == {"align", "evaluate", "report"}


def test_a_killed_stage_goes_on_with_the_same_numbers(finished, tmp_path):
    home = lay_out(tmp_path)
    for folder in ("tasks", "trained"):
        shutil.copytree(finished / "outputs" / folder, home / "outputs" / folder)
    process = start(home, "pipeline.adapt", "all")
    deadline = time.monotonic() + 120
    while not (pieces := list((tmp_path / ".resume").glob("*/job-0-of-*.pt"))):
        assert time.monotonic() < deadline
        assert process.poll() is None or pieces
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    saved = pieces[0].stat().st_mtime_ns
    output = run(home, "pipeline.adapt", "all")
    assert "error" not in output
    pd.testing.assert_frame_equal(comparable(home, "all"), comparable(finished, "all"))
    assert not pieces[0].exists() or pieces[0].stat().st_mtime_ns == saved


def test_what_is_there_is_not_computed_again(finished):
    before = (finished / "outputs/adapted/all/votes.parquet").stat().st_mtime_ns
    assert "adapt: 5 of 5 are there already" in run(finished, "pipeline.adapt")
    assert "train: 1 of 1 are there already" in run(finished, "pipeline.train")
    assert (finished / "outputs/adapted/all/votes.parquet").stat().st_mtime_ns == before


def test_an_unknown_run_is_told_in_a_line(finished):
    process = start(finished, "pipeline.adapt", "al")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    allowed = "did you mean 'all'? allowed: all, joint, none, scratch, token"
    assert output.strip() == f"error: unknown run 'al' in arc/params.yaml; {allowed}"


def test_gradients_of_demonstrations_and_answers_are_compared(finished):
    table = pd.read_csv(finished / "outputs" / "aligned.csv")
    assert len(table) == 4
    assert table[["own", "other"]].abs().max().max() <= 1


def test_the_page_and_mlflow_show_the_runs(finished):
    page = (finished / "outputs" / "report.html").read_text(encoding="utf-8")
    for name in RUNS:
        assert name in page
    client, experiment = open_store(finished.parent)
    runs = find_runs(client, experiment, {"stage": "arc adapt"})
    assert {run.data.tags["run"] for run in runs} == set(RUNS)
    metrics = json.loads((finished / "outputs" / "metrics.json").read_text(encoding="utf-8"))[
        "runs"
    ]
    for run in runs:
        name = run.data.tags["run"]
        assert run.data.metrics["tasks/pass2"] == metrics[name]["pass2"]
        assert run.data.metrics["cost/seconds_per_task"] > 0
    trained = find_runs(client, experiment, {"stage": "arc train"})
    assert len(client.get_metric_history(trained[0].info.run_id, "loss")) == 2


def test_the_tiny_settings_are_settings(finished):
    assert read_settings(finished / "params.yaml").adapt.steps("all") == [0, 3, 6]
