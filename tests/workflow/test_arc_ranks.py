"""ARC in the published form at a tiny size, in one process and in two that share the work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from tools.stage_code import ROOT

pytestmark = pytest.mark.slow
# All that sets the published network apart stays: norm after the sum, patches of 2 pixels, scales.
# Dropout does not: its noise differs between processes.
TINY = {
    "tasks": {"largest": 6, "count": 5},
    "invented": {"tasks": 5, "pairs": 2},
    "auxiliary": {"offline": 1, "test_time": 1, "symmetries": ["turn90", "flip_rows"]},
    "network": {"canvas": 16, "largest_scale": 2, "width": 16, "depth": 2, "heads": 2, "mlp": 16},
    "train": {"epochs": 2, "warmup_epochs": 1, "batch_size": 60},
    "machine": {"device": "cpu", "workers": 1, "images_per_step": 3},
}
STEPS = {"steps": 4, "pairs": 3, "warmup": 1, "placements": 2, "lr": 1e-2}


def lay_out(home: Path, devices: int = 1, dropout: float = 0.0) -> Path:
    """Write a folder like `arc/`, with the published settings made tiny."""
    shutil.copytree(ROOT / "arc" / "pipeline", home / "pipeline")
    shutil.copy(ROOT / "arc" / "dvc.yaml", home)
    yaml = YAML(typ="safe")
    values = yaml.load(ROOT / "arc" / "settings" / "full.yaml")
    assert (values["network"]["norm"], values["network"]["patch"]) == ("post", 2)
    for section, changes in TINY.items():
        values[section] |= changes
    values["machine"]["devices"], values["network"]["dropout"] = devices, dropout
    values["adapt"]["defaults"] |= STEPS
    yaml.dump(values, home / "params.yaml")
    return home


def run(home: Path, stage: str, *names: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", f"pipeline.{stage}", *names],
        cwd=home,
        env=os.environ | {"DVC_ROOT": str(home.parent), "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Prepare, train and adapt in one process and in two: the two folders of outputs."""
    homes = [lay_out(tmp_path_factory.mktemp(f"in{n}") / "arc", devices=n) for n in (1, 2)]
    run(homes[0], "prepare")
    shutil.copytree(homes[0] / "outputs", homes[1] / "outputs")
    for home in homes:
        run(home, "train")
        run(home, "adapt")
    return [home / "outputs" for home in homes]


def test_offline_training_of_two_processes_is_that_of_one(both):
    curves = [pd.read_csv(outputs / "trained" / "curve.csv") for outputs in both]
    assert curves[0]["loss"].iloc[-1] < curves[0]["loss"].iloc[1]
    pd.testing.assert_frame_equal(*curves, rtol=1e-4)
    weights = [load_file(outputs / "trained" / "weights.safetensors") for outputs in both]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["none", "token", "all", "joint", "scratch"])
def test_predictions_of_two_processes_are_those_of_one(both, name):
    votes = [pd.read_parquet(outputs / "adapted" / name / "votes.parquet") for outputs in both]
    assert votes[0]["views"].max() == 3 * STEPS["placements"]  # of three auxiliary tasks
    counts = []
    for table in votes:
        table["cells"] = [tuple(cells) for cells in table["cells"]]
        keys = ["task", "question", "steps", "height", "width", "cells"]
        counts.append(table[table["place"] > 0].groupby(keys)["votes"].sum())
    # A cell whose two likeliest colours are level may be rounded to either.
    moved = counts[0].sub(counts[1], fill_value=0).abs().sum() / 2
    assert moved <= 0.02 * counts[0].sum()
    tables = [pd.read_parquet(outputs / "adapted" / name / "tasks.parquet") for outputs in both]
    pd.testing.assert_frame_equal(*(t.drop(columns="milliseconds") for t in tables), rtol=1e-4)


def test_dropout_is_part_of_the_offline_training_alone(both, tmp_path):
    home = lay_out(tmp_path / "arc", dropout=0.1)
    shutil.copytree(both[0] / "tasks", home / "outputs" / "tasks")
    run(home, "train")
    run(home, "adapt", "none", "scratch")
    losses = [
        pd.read_csv(outputs / "trained" / "curve.csv")["loss"].iloc[1]
        for outputs in (both[0], home / "outputs")
    ]
    assert 1e-6 < abs(losses[0] - losses[1]) < 0.1 * losses[0]
    # A new network is the same with and without, and so is what it becomes at test time.
    tables = [
        pd.read_parquet(outputs / "adapted" / "scratch" / "tasks.parquet")
        for outputs in (both[0], home / "outputs")
    ]
    pd.testing.assert_series_equal(tables[0]["loss"], tables[1]["loss"])
