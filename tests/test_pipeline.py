"""All stages after one another on few images, as DVC runs them, and what others may build on."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from ruamel.yaml import YAML
from test_structure import ROOT

import pipeline
from tttlab.params import read_params

STAGES = {"prepare": None, "pretrain": "models", "finetune": "models", "source_stats": "models", "adapt": "runs",
          "evaluate": None, "report": None}  # fmt: skip


def tiny_params(folder):
    """The project's own settings, with everything that takes time made small."""
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["data"] |= {name: values["data"][name] | {"limit": 60} for name in ("unlabeled", "labeled", "test")}
    for model in values["models"].values():
        model["pretrain"] |= {"epochs": 1, "warmup_epochs": 0, "batch_size": 30}
        model["finetune"] |= {"epochs": 2, "warmup_epochs": 0, "batch_size": 24}
    values["source_stats"] = {"images": 20, "bank_size": 16}
    values["shifts"] = {"corruptions": ["fog", "impulse_noise"], "severities": [2, 5], "images": 10}
    values["machine"] |= {"workers": 0, "device": "cpu"}
    path = folder / "params.yaml"
    with path.open("w") as file:
        YAML().dump(values, file)
    return read_params(path)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    import importlib

    root = tmp_path_factory.mktemp("project")
    params = tiny_params(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "ROOT", root)
        patch.setattr(pipeline, "OUTPUTS", root / "outputs")
        for stage, items in STAGES.items():
            module = importlib.import_module(f"pipeline.{stage}")
            for item in {"models": params.models, "runs": params.adapt.runs}.get(items, [None]):
                module.run(params) if item is None else module.run(params, item)
        yield root, params


def test_metrics_have_the_promised_shape(project):
    root, params = project
    metrics = json.loads((root / "outputs" / "metrics.json").read_text())
    assert set(metrics) == {"runs"}
    assert set(metrics["runs"]) == {f"{model}/{run}" for model in params.models for run in params.adapt.runs}
    keys = {"accuracy_source", "accuracy_adapted", "gain", "gain_low", "gain_high", "clean_source", "clean_adapted", "images",
            "fell_back", "milliseconds_p50", "milliseconds_p95"}  # fmt: skip
    for entry in metrics["runs"].values():
        assert set(entry) == keys
        assert entry["images"] == 10
        assert entry["gain"] == pytest.approx(entry["accuracy_adapted"] - entry["accuracy_source"])


def test_every_run_is_judged_on_the_same_images_and_checkpoint(project):
    root, params = project
    for model in params.models:
        tables = [pd.read_parquet(root / "outputs" / "predictions" / model / f"{run}.parquet") for run in params.adapt.runs]
        same = ["image_id", "shift", "label", "source_prediction"]
        for table in tables[1:]:
            pd.testing.assert_frame_equal(table[same], tables[0][same])
        control = tables[0]
        assert (control["adapted_prediction"] == control["source_prediction"]).all()
        assert (control["adapted_confidence"] == control["source_confidence"]).all()
        assert control["shift"].nunique() == 5


def test_mlflow_holds_one_run_per_execution_linked_to_where_it_came_from(project):
    from mlflow import MlflowClient

    root, _ = project
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("ttt-lab").experiment_id])
    by_stage = {
        stage: [run for run in runs if run.data.tags.get("stage") == stage] for stage in ("pretrain", "finetune", "adapt")
    }
    assert {stage: len(found) for stage, found in by_stage.items()} == {"pretrain": 2, "finetune": 2, "adapt": 12}
    assert {run.info.status for run in runs} == {"FINISHED"}
    parents = {run.data.tags["mlflow.parentRunId"] for found in by_stage.values() for run in found}
    assert len(parents) == 1
    for before, after in (("pretrain", "finetune"), ("finetune", "adapt")):
        known = {run.info.run_id: run.data.tags["model"] for run in by_stage[before]}
        for run in by_stage[after]:
            assert known[run.data.tags["source_run_id"]] == run.data.tags["model"]
    assert "gain/simclr_convnet/actmad" in client.get_run(parents.pop()).data.metrics


def test_statistics_of_another_checkpoint_are_refused(project):
    from tttlab import source_statistics
    from tttlab.errors import UserError

    root, _ = project
    with pytest.raises(UserError, match=r"expected statistics of checkpoint 000000000000, found those of"):
        source_statistics.load(root / "outputs" / "source_stats" / "mae_vit", "0" * 64)
    with pytest.raises(UserError, match=r"expected source statistics, found none that can be read; run the stage source_stats"):
        source_statistics.load(root / "outputs" / "nowhere", "0" * 64)


@pytest.fixture
def copied(project, tmp_path):
    """The finished project at another place, set up for two processes; and a way to run a stage there."""
    root, _ = project
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    values = YAML(typ="safe").load((copy / "params.yaml").read_text())
    values["machine"]["devices"] = 2
    with (copy / "params.yaml").open("w") as file:
        YAML().dump(values, file)
    environment = {key: value for key, value in os.environ.items() if key != "DVC_ROOT"} | {"PYTHONPATH": str(ROOT)}

    def run(*words: str) -> None:
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr

    return copy, run


def count_runs(root: Path) -> int:
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        return database.execute("SELECT count(*) FROM runs WHERE name LIKE 'adapt%' OR name LIKE 'pretrain%'").fetchone()[0]


def test_two_processes_started_by_a_plain_command_adapt_as_one_does(project, copied):
    root, params = project
    copy, run = copied
    before = count_runs(copy)
    run("pipeline.adapt", "ssl")
    for model in params.models:
        one, two = (pd.read_parquet(place / "outputs" / "adapted" / "ssl" / f"{model}.parquet") for place in (root, copy))
        pd.testing.assert_frame_equal(one.drop(columns="milliseconds"), two.drop(columns="milliseconds"), rtol=1e-3, atol=1e-4)
    assert count_runs(copy) == before + len(params.models)  # the first process's alone
    assert not [path for path in (copy / ".resume").iterdir() if path.is_dir()]


def test_two_processes_started_by_torchrun_pretrain_as_one_does(project, copied):
    root, _ = project
    copy, run = copied
    before = count_runs(copy)
    run("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pipeline.pretrain", "mae_vit")
    one, two = (pd.read_csv(place / "outputs" / "pretrained" / "mae_vit" / "curve.csv") for place in (root, copy))
    pd.testing.assert_frame_equal(one.drop(columns="knn_accuracy"), two.drop(columns="knn_accuracy"), rtol=1e-4)
    assert count_runs(copy) == before + 1


def test_nothing_unfinished_is_left(project):
    root, _ = project
    left = [path for path in (root / ".resume").iterdir() if path.is_dir()]
    assert not left
    assert (root / "outputs" / "report.html").stat().st_size > 50_000
