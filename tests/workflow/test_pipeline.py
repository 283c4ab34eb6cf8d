"""All stages in order on few images, as DVC runs them, and the promised form of their results."""

import importlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import PIL.Image
import pytest
from ruamel.yaml import YAML

from tools.stage_code import ROOT
from tttlab.config.images import ImageSpec
from tttlab.config.params import read_params
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.data.sources import open_source
from tttlab.errors import UserError
from tttlab.evaluation.results import Results
from tttlab.reporting.verdict import lines_of
from tttlab.runtime.process_identity import Identity
from tttlab.workflow import cli, places
from tttlab.workflow.ledger import FOLDERS, NAME, Ledger

pytestmark = pytest.mark.slow

STAGES = {
    "methods": None,
    "prepare": None,
    "pretrain": "all",
    "finetune": "all",
    "source_stats": "all",
    "tune": "all",
    "distance": "all",
    "adapt": "all",
    "align": "all",
    "evaluate": None,
    "report": None,
    "register": None,
}


def write_photos(root):
    """Write digits as shifted sets: inverted ones in class folders, turned ones without labels."""
    source = open_source(ImageSpec(source="sklearn/digits"), "labeled", root)
    for number in range(30):
        digit = PIL.Image.fromarray(255 - np.asarray(source.read(number)))
        label = source.classes[source.groups[number]]
        images = {root / "inverted" / label: digit, root / "turned": digit.rotate(90)}
        for folder, image in images.items():
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number}.png")
    return {"format": "domain_folders", "root": str(root)}


def tiny_params(folder):
    """Write the project's settings with small sizes and one more shifted set, and read them."""
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    limits = {"unlabeled": 60, "labeled": 120, "test": 60}
    values["data"] |= {
        name: values["data"][name] | {"limit": limit} for name, limit in limits.items()
    }
    for model in values["models"].values():
        model["pretrain"] |= {"epochs": 1, "warmup_epochs": 0, "batch_size": 30}
        model["finetune"] |= {"epochs": 2, "warmup_epochs": 0, "batch_size": 24}
    values["source_stats"] = {"images": 20, "bank_size": 16}
    values["shifts"] = {"corruptions": ["fog", "impulse_noise"], "severities": [2, 5], "images": 10}
    values["shifts"]["sets"] = {"photos": write_photos(folder / "photos")}
    values["seeds"] = [0, 5]
    values["tune"] |= {"images": [4, 8], "candidates": 3, "severities": [4]}
    values["tune"]["search"] |= {"steps": [1, 2]}
    values["adapt"]["curve"] |= {"images": 6, "severities": [5], "candidates": 1}
    values["distance"] = {"images": 20, "permutations": 19}
    values["alignment"] = {"images": 6}
    # A fixed group size: with `auto` it would depend on the clock.
    values["machine"] |= {"workers": 0, "device": "cpu", "images_per_step": 10}
    path = folder / "params.yaml"
    with path.open("w") as file:
        YAML().dump(values, file)
    return read_params(path)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    # These characters have a meaning in a URL or in an MLflow filter.
    root = tmp_path_factory.mktemp("project") / "it's 100%20 a#b?"
    root.mkdir()
    params = tiny_params(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "ROOT", root)
        patch.setattr(places, "OUTPUTS", root / "outputs")
        run_stages(params, STAGES)
        yield root, params


def run_stages(params, stages):
    """Run stages in this process, each for all its models, runs or networks."""
    for stage in stages:
        importlib.import_module(f"pipeline.{stage}").run(params, *[[]] * (STAGES[stage] == "all"))


@pytest.fixture
def elsewhere(project, tmp_path, monkeypatch):
    """A copy of the finished project: its folder, its settings, and a function that runs stages."""
    root, _ = project
    copy = Path(shutil.copytree(root, tmp_path / "elsewhere"))
    monkeypatch.setattr(places, "ROOT", copy)
    monkeypatch.setattr(places, "OUTPUTS", copy / "outputs")
    values = YAML(typ="safe").load((copy / "params.yaml").read_text())

    def run(*stages: str):
        with (copy / "params.yaml").open("w") as file:
            YAML().dump(values, file)
        params = read_params(copy / "params.yaml")
        run_stages(params, stages)
        return params

    return copy, values, run


def test_metrics_have_the_promised_shape(project):
    root, params = project
    metrics = json.loads((root / "outputs" / "metrics.json").read_text())
    assert set(metrics) == {"runs"}
    assert set(metrics["runs"]) == {
        f"{model}/{run}" for model in params.models for run in params.adapt.runs
    }
    keys = {
        "accuracy_source",
        "accuracy_adapted",
        "gain",
        "gain_low",
        "gain_high",
        "training_gain",
        "training_gain_low",
        "training_gain_high",
        "clean_source",
        "clean_adapted",
        "ece_source",
        "ece_adapted",
        "wrong_to_right",
        "right_to_wrong",
        "changed",
        "shifts_helped",
        "shifts_hurt",
        "images",
        "seeds",
        "gain_seed_sd",
        "fell_back",
        "milliseconds_p50",
        "milliseconds_p95",
        "milliseconds_mean",
        "gated",
        "control",
        "over_control",
        "over_control_low",
        "over_control_high",
    }
    for name, entry in metrics["runs"].items():
        assert set(entry) == keys
        assert entry["images"] == 30  # 10 of the test set and 10 of each of two domains
        assert entry["seeds"] == 2
        assert (entry["training_gain"] is None) == (name.split("/")[1] not in ("ssl", "actmad"))
        assert entry["gain"] == pytest.approx(entry["accuracy_adapted"] - entry["accuracy_source"])
        assert (entry["control"] is None) == (entry["training_gain"] is None)


def test_what_adapt_tells_of_a_run_says_whether_the_method_normalises_or_averages_itself(project):
    root, params = project
    for run in params.adapt.runs:
        told = json.loads((root / "outputs" / "runs" / f"{run}.json").read_text())
        assert [told[model]["normalises"] for model in params.models] == [False, False]
        averages = params.run_settings(run, "simclr_convnet").method == "views"
        assert [told[model]["averages"] for model in params.models] == [averages, averages]


def test_a_run_that_trains_stands_beside_the_strongest_control_of_no_more_time(project):
    root, params = project
    entries = json.loads((root / "outputs" / "metrics.json").read_text())["runs"]
    for model in params.models:
        leads = {"none": 0.0}
        for run in ("views", "bn", "shrink"):
            file = root / "outputs" / "tuned" / run / f"{model}.json"
            leads[run] = json.loads(file.read_text())["lead"]
        for run in ("ssl", "actmad"):
            entry = entries[f"{model}/{run}"]
            control = entries[f"{model}/{entry['control']}"]
            cheaper = [
                lead
                for name, lead in leads.items()
                if entries[f"{model}/{name}"]["milliseconds_p50"] <= entry["milliseconds_p50"]
            ]
            assert leads[entry["control"]] == max([0.0, *cheaper])
            difference = entry["accuracy_adapted"] - control["accuracy_adapted"]
            assert entry["over_control"] == pytest.approx(difference)
            assert entry["over_control_low"] <= difference <= entry["over_control_high"]


def test_every_run_is_judged_on_the_same_images_and_checkpoint(project):
    root, params = project
    for model in params.models:
        tables = [
            pd.read_parquet(root / "outputs" / "predictions" / model / f"{run}.parquet")
            for run in params.adapt.runs
        ]
        common = ["image_id", "seed", "shift", "label", "source_prediction"]
        for table in tables[1:]:
            pd.testing.assert_frame_equal(table[common], tables[0][common])
        control = tables[0]
        assert (control["adapted_prediction"] == control["source_prediction"]).all()
        assert (control["adapted_confidence"] == control["source_confidence"]).all()
        assert control["shift"].unique().tolist() == [
            "clean",
            "fog-2",
            "fog-5",
            "impulse_noise-2",
            "impulse_noise-5",
            "photos/inverted",
            "photos/turned",
        ]
        assert set(control.groupby(["shift", "seed"]).size()) == {10}


def test_the_lines_of_every_run_give_what_adapt_wrote(project):
    """As the report prints them: for heads, for tuned settings, with views and without."""
    import torch  # here: imported above, it would have all these tests run twice

    root, params = project
    results = Results.read(root / "outputs", params.pairs)
    test = ImageSet.load(root / "outputs" / "data" / "test")
    for model, run in params.pairs:
        code = lines_of(results, params, root / "outputs", model, run)
        table = pd.read_parquet(root / "outputs" / "adapted" / run / model / "0.parquet")
        table = table[table["shift"] == "clean"]
        rows = [test.image_ids.index(name) for name in table["image_id"]]
        images = as_images(torch.from_numpy(test.pixels[rows]))
        defined = {"images": images, "names": [*table["image_id"]]}
        exec(code, defined)
        confidence, predictions = defined["result"].logits.softmax(-1).max(-1)
        assert predictions.tolist() == table["adapted_prediction"].tolist(), (model, run)
        np.testing.assert_allclose(confidence, table["adapted_confidence"], atol=1e-3)
        assert defined["classes"] == [test.classes[number] for number in predictions]


def test_mlflow_holds_one_run_per_execution_linked_to_where_it_came_from(project):
    from mlflow import MlflowClient

    from tttlab.tracking.store import database_uri

    root, _ = project
    client = MlflowClient(database_uri(root))
    runs = client.search_runs([client.get_experiment_by_name("ttt-lab").experiment_id])
    by_stage = {
        stage: [run for run in runs if run.data.tags.get("stage") == stage]
        for stage in ("pretrain", "finetune", "tune", "adapt")
    }
    counts = {"pretrain": 4, "finetune": 4, "tune": 10, "adapt": 24}
    assert {stage: len(part) for stage, part in by_stage.items()} == counts
    assert {run.info.status for run in runs} == {"FINISHED"}
    parents = {run.data.tags["mlflow.parentRunId"] for part in by_stage.values() for run in part}
    assert len(parents) == 1
    for before, after in (("pretrain", "finetune"), ("finetune", "tune"), ("finetune", "adapt")):
        models = {run.info.run_id: run.data.tags["model"] for run in by_stage[before]}
        for run in by_stage[after]:
            assert models[run.data.tags["source_run_id"]] == run.data.tags["model"]
    trials = [run for run in runs if run.data.tags.get("stage") == "trial"]
    tunings = {run.info.run_id: run.data.tags for run in by_stage["tune"]}
    searched = {tags["run"]: {} for tags in tunings.values()}
    for run in by_stage["tune"]:
        search = {
            name.removeprefix("search."): value
            for name, value in run.data.params.items()
            if name.startswith("search.")
        }
        searched[run.data.tags["run"]][run.data.tags["model"]] = search
    assert searched["shrink"]["mae_vit"] == {"threshold": "[0.5, 1.0, 2.0, 4.0, 8.0]"}
    assert searched["ssl"]["mae_vit"]["lr"] == "[0.0001, 0.001]"
    assert len(trials) == 8 * 3 + 2  # views has nothing to search, and is scored as it is
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == set(tunings)
    assert all({"score", "gain", "clean_change"} <= set(run.data.metrics) for run in trials)
    assert "gain/simclr_convnet/actmad" in client.get_run(parents.pop()).data.metrics


def test_registered_models_answer_what_adapt_wrote(project, tmp_path):
    """Of images as they are; where nothing is drawn at random, for the streams' keys differ."""
    import mlflow

    from tttlab.tracking.store import database_uri

    root, params = project
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(database_uri(root))
    test = ImageSet.load(root / "outputs" / "data" / "test")
    for model in params.models:
        (tmp_path / model).mkdir()
        # MLflow does not read back from a folder with such a name, but copies from there.
        uri, copy = f"models:/{model}@champion", str(tmp_path / model)
        loaded = mlflow.pyfunc.load_model(uri, dst_path=copy)
        for run in ("none", "shrink", "bn", "actmad"):
            table = pd.read_parquet(root / "outputs" / "adapted" / run / model / "0.parquet")
            table = table[table["shift"] == "clean"]
            rows = [test.image_ids.index(name) for name in table["image_id"]]
            request = pd.DataFrame({"image": list(test.pixels[rows])})
            answers = loaded.predict(request, params={"run": run, "gate": False})
            for side in ("source_", ""):
                column = side or "adapted_"
                classes = [test.classes[number] for number in table[f"{column}prediction"]]
                assert [row[f"{side}class"] for row in answers] == classes
                confidence = [row[f"{side}confidence"] for row in answers]
                np.testing.assert_allclose(confidence, table[f"{column}confidence"], atol=1e-3)
            np.testing.assert_allclose(
                [row["distance"] for row in answers], table["distance"], rtol=1e-3
            )
        card = (root / "outputs" / "served" / model / "README.md").read_text(encoding="utf-8")
        recommended = loaded.predict(request.head(1))[0]["run"]
        does = "answers as it is" if recommended == "none" else "adapts"
        assert card.startswith(f"# {model}\n\nAn image classifier that {does}")
        count = len(ImageSet.load(root / "outputs" / "data" / "labeled_train"))
        assert f"**Trained on**: {count} labeled images from sklearn/digits, after" in card
    mlflow.set_tracking_uri(before)


def test_statistics_of_another_checkpoint_are_refused(project):
    from tttlab.networks import source_statistics

    root, _ = project
    message = "expected statistics of checkpoint 000000000000, found those of"
    with pytest.raises(UserError, match=message):
        source_statistics.load(root / "outputs" / "source_stats" / "mae_vit" / "5", "0" * 64)
    message = "expected source statistics, found none that can be read; run the stage source_stats"
    with pytest.raises(UserError, match=message):
        source_statistics.load(root / "outputs" / "nowhere", "0" * 64)


@pytest.fixture
def copied(project, tmp_path):
    """A copy of the finished project for two processes, and a function that runs a stage in it."""
    root, _ = project
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    values = YAML(typ="safe").load((copy / "params.yaml").read_text())
    values["machine"]["devices"] = 2
    with (copy / "params.yaml").open("w") as file:
        YAML().dump(values, file)
    environment = {key: value for key, value in os.environ.items() if key != "DVC_ROOT"}
    environment |= {"PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> None:
        command = [sys.executable, "-m", *arguments]
        finished = subprocess.run(
            command,
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr

    return copy, run


def count_runs(root: Path) -> int:
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        return database.execute(
            "SELECT count(*) FROM runs WHERE name LIKE 'adapt%' OR name LIKE 'pretrain%'"
        ).fetchone()[0]


def test_two_processes_started_by_a_plain_command_adapt_as_one_does(project, copied):
    root, params = project
    copy, run = copied
    before = count_runs(copy)
    shutil.rmtree(copy / "outputs" / "adapted")
    run("pipeline.adapt", "actmad")
    timed = ["milliseconds", "gate_milliseconds"]
    for model, seed in product(params.models, params.seeds):
        by_one_process, by_two = (
            pd.read_parquet(folder / "outputs" / "adapted" / "actmad" / model / f"{seed}.parquet")
            for folder in (root, copy)
        )
        pd.testing.assert_frame_equal(
            by_one_process.drop(columns=timed), by_two.drop(columns=timed), check_exact=True
        )
    # Only the first process has runs in MLflow.
    assert count_runs(copy) == before + len(params.models) * len(params.seeds)
    assert not [path for path in (copy / ".resume").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("stage", "outputs"),
    [("pretrain", "pretrained/mae_vit/5"), ("finetune", "finetuned/mae_vit/5")],
)
def test_a_stage_that_ended_before_dvc_recorded_it_is_done_at_once(
    project, tmp_path, monkeypatch, stage, outputs
):
    """After a kill of DVC, the next DVC removes the outputs and starts the stage again."""
    root, params = project
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    monkeypatch.setattr(places, "ROOT", copy)
    monkeypatch.setattr(places, "OUTPUTS", copy / "outputs")
    monkeypatch.setattr(
        "tttlab.workflow.leftovers.find_driver", lambda _: Identity(os.getpid(), drivers.pop(0))
    )
    drivers, run = [100.0, 200.0, 200.0], importlib.import_module(f"pipeline.{stage}").run

    def written() -> dict[str, bytes]:
        path = copy / "outputs" / outputs
        files = [path] if path.is_file() else sorted(filter(Path.is_file, path.rglob("*")))
        return {path.relative_to(copy).as_posix(): path.read_bytes() for path in files}

    def runs() -> list[tuple]:
        with closing(sqlite3.connect(copy / "mlflow.db")) as database:
            return database.execute(
                "SELECT run_uuid, status FROM runs WHERE lifecycle_stage = 'active'"
            ).fetchall()

    params = params.model_copy(update={"seeds": (5,)})
    shutil.rmtree(copy / "outputs" / outputs)
    run(params, ["mae_vit"])
    before, runs_before = written(), runs()
    for path in before:
        (copy / path).unlink()
    monkeypatch.setattr(
        "tttlab.training.trainer.Trainer._run_epoch",
        lambda *_arguments, **_settings: pytest.fail("computed again"),
    )
    run(params, ["mae_vit"])
    assert written() == before
    assert len(before) > 0
    assert [status for _, status in runs()].count("RUNNING") == 0
    assert len(runs()) == len(runs_before)  # no new runs in MLflow
    assert [path.name for path in (copy / ".resume").iterdir() if path.is_dir()]
    importlib.import_module("tttlab.workflow.leftovers").tidy()
    assert not [path.name for path in (copy / ".resume").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("stage", "computes", "stops_at", "new_runs"),
    [
        (
            "tune",
            "tttlab.experiments.tuning.adapt_to_job",
            "tttlab.workflow.tunings.write_choice",
            1 + 3,  # with its trials
        ),
        (
            "adapt",
            "tttlab.experiments.adapting.adapt_to_job",
            "tttlab.tracking.runs.Run.log_artifact",
            1,
        ),
    ],
)
def test_a_piece_that_was_stopped_before_its_end_goes_on_from_there(
    elsewhere, monkeypatch, stage, computes, stops_at, new_runs
):
    """Nothing is adapted again, and MLflow shows one execution."""
    copy, _, run = elsewhere
    piece = {"tune": "actmad/mae_vit", "adapt": "actmad/mae_vit/5"}[stage]
    folder = copy / "outputs" / FOLDERS[stage]

    def written() -> set[str]:
        return {file.name for file in folder.glob(f"{piece}.*")}

    def entered() -> set[str]:
        return set(json.loads((folder / NAME).read_text()))

    def statuses() -> list[str]:
        with closing(sqlite3.connect(copy / "mlflow.db")) as database:
            query = "SELECT status FROM runs WHERE lifecycle_stage = 'active'"
            return [status for (status,) in database.execute(query)]

    before, runs_before, pieces = written(), len(statuses()), entered()
    Ledger(stage).keep_only(pieces - {piece})
    assert not written()
    with monkeypatch.context() as patch:
        patch.setattr(stops_at, Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(stage)
    monkeypatch.setattr(computes, lambda *_arguments, **_settings: pytest.fail("adapted again"))
    run(stage)
    assert written() == before
    assert len(before) == {"tune": 1, "adapt": 2}[stage]
    assert entered() == pieces
    assert statuses().count("FINISHED") == len(statuses()) == runs_before + new_runs
    assert not [path for path in (copy / ".resume").iterdir() if path.is_dir()]


def test_two_processes_started_by_torchrun_pretrain_as_one_does(project, copied):
    root, params = project
    copy, run = copied
    before = count_runs(copy)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    shutil.rmtree(copy / "outputs" / "pretrained" / "mae_vit")
    run(*torchrun, "-m", "pipeline.pretrain", "mae_vit")
    by_one_process, by_two = (
        pd.read_csv(folder / "outputs" / "pretrained" / "mae_vit" / "5" / "curve.csv").drop(
            columns="knn_accuracy"
        )
        for folder in (root, copy)
    )
    pd.testing.assert_frame_equal(by_one_process, by_two, rtol=1e-4)
    assert count_runs(copy) == before + len(params.seeds)  # only the first process has some


def test_what_was_tuned_is_what_adapt_used(project):
    root, params = project
    for model, run in params.pairs:
        tuned = json.loads((root / "outputs" / "tuned" / run / f"{model}.json").read_text())
        about = json.loads((root / "outputs" / "runs" / f"{run}.json").read_text())[model]
        settings, used = tuned["settings"], about["settings"]
        assert bool(tuned["tuned"]) == (run != "none")
        shared = settings.keys() & used.keys()
        assert {key: used[key] for key in shared} == {key: settings[key] for key in shared}
        if run == "actmad":
            assert {"lr", "steps", "normalisation"} == set(settings)


def times(copy: Path, stage: str) -> dict[str, int]:
    """The times when the files of a stage were last written, without its ledger."""
    folder = copy / "outputs" / FOLDERS[stage]
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name != "made_of.json"
    }


@pytest.mark.parametrize("stage", FOLDERS)
def test_one_more_run_computes_only_itself(elsewhere, stage):
    """One less is removed."""
    copy, values, run = elsewhere
    run(stage)
    before = times(copy, stage)
    values["adapt"]["runs"] |= {"more": {"method": "none", "normalisation": "image"}}
    del values["adapt"]["runs"]["views"]
    run("methods", "tune", stage)
    after = times(copy, stage)
    kept = {name: time for name, time in before.items() if not name.startswith("views/")}
    assert {name: time for name, time in after.items() if not name.startswith("more/")} == kept
    assert any(name.startswith("more/") for name in after) == (stage in ("tune", "adapt"))
    assert any(name.startswith("views/") for name in before) == (stage in ("tune", "adapt"))


@pytest.mark.parametrize("stage", FOLDERS)
def test_one_more_seed_computes_only_itself(elsewhere, stage):
    copy, values, run = elsewhere
    everything = set(times(copy, stage))
    values["seeds"] = [0]
    run(stage)
    first = times(copy, stage)
    of_seed = {name for name in everything if re.search(r"/5[./]", name)}
    assert set(first) == everything - of_seed
    # Tuning and alignment look at the first seed alone.
    assert bool(of_seed) == (stage not in ("tune", "align"))
    values["seeds"] = [0, 5]
    run(stage)
    after = times(copy, stage)
    assert set(after) == everything
    assert {name: time for name, time in after.items() if name not in of_seed} == first


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        (("adapt", "runs", "bn", "prior"), {"bn"}),
        (("adapt", "runs", "shrink", "search", "threshold"), {"shrink"}),
        (("seed",), {"bn", "shrink"}),
    ],
)
def test_a_changed_setting_computes_what_it_concerns(elsewhere, change, touched):
    copy, values, run = elsewhere
    runs = values["adapt"]["runs"]
    values["adapt"]["runs"] = {name: runs[name] for name in ("none", "bn", "shrink")}
    *parents, last = change
    section = values
    for key in parents:
        section = section[key]
    section[last] = {"prior": 0.3, "threshold": [1.0, 2.0], "seed": 8}[last]
    before = times(copy, "tune")
    run("tune")
    after = times(copy, "tune")
    changed = {name.partition("/")[0] for name in after if before[name] != after[name]}
    assert changed == touched


def test_a_file_that_somebody_changed_is_made_again(elsewhere):
    copy, _, run = elsewhere
    folder = copy / "outputs" / "adapted" / "shrink" / "mae_vit"
    expected = pd.read_parquet(folder / "5.parquet")
    pd.read_parquet(folder / "0.parquet").to_parquet(folder / "5.parquet")
    (copy / "outputs" / "adapted" / "left behind.parquet").write_text("of another time")
    run("adapt")
    timed = ["milliseconds", "gate_milliseconds"]
    again = pd.read_parquet(folder / "5.parquet")
    pd.testing.assert_frame_equal(again.drop(columns=timed), expected.drop(columns=timed))
    assert not (copy / "outputs" / "adapted" / "left behind.parquet").exists()


def test_fixed_values_are_used_where_tuning_is_switched_off(elsewhere):
    copy, values, run = elsewhere
    values["tune"]["enabled"] = False
    values["adapt"]["runs"] = {name: values["adapt"]["runs"][name] for name in ("none", "actmad")}
    values["adapt"]["runs"]["actmad"]["per_model"] = {"mae_vit": {"steps": 2}}
    run("tune", "adapt")
    for model, steps in (("simclr_convnet", 4), ("mae_vit", 2)):
        folder = copy / "outputs" / "adapted" / "actmad" / model
        about = json.loads((folder / "0.json").read_text())
        assert about["settings"]["steps"] == steps
        assert about["tuning"]["tuned"] is False


def test_a_tuned_file_that_cannot_be_read_is_told_in_one_line(project, monkeypatch, tmp_path):
    from tttlab.workflow.loading import load_tuned

    monkeypatch.setattr(places, "OUTPUTS", tmp_path)
    (tmp_path / "tuned" / "ssl").mkdir(parents=True)
    for text in ('{"tuned"', "{}", '{"tuned": true}', "[]"):
        (tmp_path / "tuned" / "ssl" / "mae_vit.json").write_text(text)
        message = r"found nothing that can be read; run python -m pipeline\.tune ssl$"
        with pytest.raises(UserError, match=message):
            load_tuned("ssl", "mae_vit")


def test_neither_test_images_nor_their_labels_can_reach_tuning(project, copied):
    """The stage chooses the same without them, and opens no file of theirs."""
    root, params = project
    copy, run = copied
    for folder in ("test", "shifted"):
        shutil.rmtree(copy / "outputs" / "data" / folder)
    for folder in ("adapted", "predictions", "aligned", "distances", "tables", "tuned"):
        shutil.rmtree(copy / "outputs" / folder)
    spy = copy / "spy.py"
    spy.write_text(
        "import runpy, sys\n"
        "seen = open('opened.txt', 'w')\n"
        "sys.addaudithook(lambda event, args: event == 'open' and seen.write(f'{args[0]}\\n'))\n"
        "sys.argv = ['pipeline.tune', sys.argv[1]]\n"
        "runpy.run_module('pipeline.tune', run_name='__main__', alter_sys=True)\n"
    )
    values = YAML(typ="safe").load((copy / "params.yaml").read_text())
    values["machine"]["devices"] = 1
    with (copy / "params.yaml").open("w") as file:
        YAML().dump(values, file)
    run("spy", "ssl")
    for model in params.models:
        before, after = (
            json.loads((folder / "outputs" / "tuned" / "ssl" / f"{model}.json").read_text())
            for folder in (root, copy)
        )
        gates = [choice.pop("gate") for choice in (before, after)]
        assert before == after
        # Whether a gate saves time depends on the clock.
        assert None in gates or gates[0] == gates[1]
    opened = {
        Path(line).name: line
        for line in (copy / "opened.txt").read_text().splitlines()
        if "outputs/" in line
    }
    assert "weights.safetensors" in opened  # the list is not empty
    assert {line.split("outputs/")[1].split("/")[0] for line in opened.values()} <= {
        "data",
        "finetuned",
        "methods",
        "source_stats",
        "tuned",
    }
    forbidden = ("data/test", "data/shifted", "photos")
    assert not [line for line in opened.values() if any(part in line for part in forbidden)]


def test_too_few_images_for_distances_stop_nothing_else(elsewhere):
    copy, values, run = elsewhere
    values["data"]["labeled"]["limit"] = 60
    run("prepare", "distance", "evaluate", "report")
    assert len((copy / "outputs" / "distances" / "mae_vit/5.csv").read_text().splitlines()) == 1
    assert not (copy / "outputs" / "tables" / "distances.csv").exists()
    assert (copy / "outputs" / "report.html").stat().st_size > 50_000


def test_tables_hold_every_part_of_the_answer(project):
    root, params = project
    tables = {path.stem: pd.read_csv(path) for path in (root / "outputs" / "tables").glob("*.csv")}
    expected = (
        "summary by_shift by_corruption by_severity reliability steps tuning alignment "
        "correlations distances networks"
    )
    assert set(tables) == set(expected.split())
    first, second = params.models
    between = tables["networks"].set_index("model")["other"]
    assert between.to_dict() == {first: second, second: first}
    for name in ("summary", "by_shift", "reliability"):
        assert set(tables[name]["run"]) == set(params.adapt.runs)
    assert set(tables["alignment"]["run"]) == {"ssl", "actmad"}
    assert set(tables["tuning"]["choice"]) == {"none", "default", "tuned", "oracle"}
    oracle = tables["tuning"].pivot_table(
        index=["model", "run"], columns="choice", values="accuracy"
    )
    assert (oracle["oracle"] >= oracle[["default", "tuned"]].max(axis=1)).all()
    used = tables["steps"][tables["steps"]["used"]]
    assert len(used[used["setting"] == "tuned"]) == 2 * 5
    assert set(tables["distances"]["reference"]) == {"unlabeled", "labeled"}
    assert set(tables["distances"]["seed"]) == {0, 5}


def test_images_that_come_shifted_go_all_the_way_with_and_without_labels(project):
    root, _ = project
    tables = {path.stem: pd.read_csv(path) for path in (root / "outputs" / "tables").glob("*.csv")}
    shifts = tables["by_shift"].set_index(["model", "run", "shift"])
    labeled, unlabeled = (
        shifts.xs(f"photos/{domain}", level="shift") for domain in ("inverted", "turned")
    )
    assert set(labeled["n"]) == set(unlabeled["n"]) == {20}  # 10 under each of two training seeds
    assert labeled["accuracy_source"].notna().all()
    assert unlabeled[["accuracy_source", "gain", "mcnemar_p"]].isna().all(axis=None)
    assert unlabeled["changed"].notna().all()
    assert {"photos/inverted", "photos/turned"} <= set(tables["by_corruption"]["corruption"])
    assert set(tables["by_severity"]["severity"]) == {0, 2, 5}
    with_labels = set(shifts.index.unique("shift")) - {"photos/turned"}
    assert set(tables["alignment"]["shift"]) == with_labels
    assert {"photos/inverted", "photos/turned"} <= set(tables["distances"]["target"])
    predictions = pd.read_parquet(root / "outputs" / "predictions" / "mae_vit" / "actmad.parquet")
    rows = predictions[predictions["shift"] == "photos/inverted"].drop_duplicates("image_id")
    digits = [int(name.split("/")[1]) for name in rows["image_id"]]  # inverted/<digit>/<number>.png
    assert digits == rows["label"].tolist()
    assert sorted(digits) == list(range(10))
    assert (root / "outputs" / "figures" / "examples_of_sets.png").stat().st_size > 5_000
    assert "photos/inverted" in (root / "outputs" / "report.html").read_text()


def test_streams_go_all_the_way(elsewhere):
    """The same networks under the protocol online, from tuning to the report."""
    copy, values, run = elsewhere
    values["adapt"] |= {
        "protocol": "online",
        "online": {"batch_size": 4, "order": "by_class", "shifts": "separate"},
    }
    values["adapt"]["runs"] = {
        "none": {"method": "none"},
        "bn": {"method": "none", "normalisation": "image"},
        "tent": {
            "method": "tent",
            "lr": 0.1,
            "trainable": "norm",
            "normalisation": "image",
            "search": {"lr": [0.01, 0.1]},
        },
        "lame": {"method": "lame"},
        "deyo": {
            "method": "deyo",
            "steps": 2,
            "trainable": "norm",
            "search": {"steps": None, "lr": [0.01, 0.1]},
        },
    }
    values["tune"]["search"] = {"steps": [1, 2]}
    shifted = copy / "outputs" / "data" / "shifted" / "shifts.json"
    entries = json.loads(shifted.read_text())
    labeled = [entry for entry in entries if entry["corruption"] != "photos/turned"]
    shifted.write_text(json.dumps(labeled))
    params = run("tune", "adapt", "align", "evaluate", "report")
    for model in params.models:
        choice = json.loads((copy / "outputs" / "tuned" / "tent" / f"{model}.json").read_text())
        assert choice["gate"] is None
        assert len(choice["candidates"]) == 3  # of (1 or 2 steps) × (two rates) at most three
        assert {"lr", "steps"} == set(choice["settings"])
    # Gradients are compared for single images only; a step along a stream belongs to none.
    assert params.alignment.images
    assert not list((copy / "outputs" / "aligned").rglob("*.parquet"))
    for about in json.loads((copy / "outputs" / "runs" / "deyo.json").read_text()).values():
        assert about["settings"]["steps"] == 2  # not searched, so the run's own steps remain
    metrics = json.loads((copy / "outputs" / "metrics.json").read_text())["runs"]
    assert set(metrics) == {
        f"{model}/{run}" for model in params.models for run in params.adapt.runs
    }
    for model in params.models:
        tables = {
            run: pd.read_parquet(copy / "outputs" / "predictions" / model / f"{run}.parquet")
            for run in params.adapt.runs
        }
        for table in tables.values():
            pd.testing.assert_series_equal(table["image_id"], tables["none"]["image_id"])
        # Before its first step `tent` normalises by batch statistics, as `bn` does.
        assert (tables["tent"]["untrained_prediction"] == tables["bn"]["adapted_prediction"]).all()
        assert tables["tent"]["loss_first"].notna().all()
    assert "every shift a stream of its own" in (copy / "outputs" / "report.html").read_text()


@pytest.mark.parametrize(
    ("method", "pretrained_head"), [("ttt_plus_plus", True), ("adacontrast", False)]
)
def test_a_head_gets_the_views_that_it_was_trained_on(
    project, monkeypatch, method, pretrained_head
):
    from tttlab.workflow.loading import build_run, load_network

    root, _ = project
    monkeypatch.chdir(root)
    monkeypatch.setattr(places, "OUTPUTS", root / "outputs")
    params = read_params(root / "params.yaml")
    params.adapt.runs["own"] = {"method": method, "protocol": "online"}
    model = next(name for name, objective in params.objectives.items() if objective == "simclr")
    source = load_network(params, model, params.seeds[0])
    augmentation = build_run(params, "own", model, source, {}).task.method.augmentation
    pretraining, adapting = params.models[model].pretrain.augment, params.adapt.augment
    assert pretraining != adapting
    assert augmentation == (pretraining if pretrained_head else adapting)


@pytest.fixture
def asked(project, tmp_path, monkeypatch, capsys):
    """Some clean test images as files, their rows of `adapt`, and a way to call ``ttt-lab``."""
    root, _ = project
    monkeypatch.setattr(places, "ROOT", root)
    monkeypatch.setattr(places, "OUTPUTS", root / "outputs")
    table = pd.read_parquet(root / "outputs" / "adapted" / "shrink" / "mae_vit" / "0.parquet")
    rows = table[table["shift"] == "clean"].head(4)
    images = ImageSet.load(root / "outputs" / "data" / "test")
    files = []
    for number, name in enumerate(rows["image_id"]):
        files.append(str(tmp_path / f"{number}.png"))
        pixels = images.pixels[images.image_ids.index(name)]
        PIL.Image.fromarray(np.asarray(pixels)).save(files[-1])

    def call(*words: str) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main(words)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return files, rows, call


def test_asked_about_a_test_image_ttt_lab_says_what_adapt_wrote(project, asked):
    root, _ = project
    files, rows, call = asked
    words = ("--params", str(root / "params.yaml"), "--model", "mae_vit", "--run", "shrink")
    code, out, _ = call("predict", *files, *words, "--json")
    answers = pd.DataFrame(json.loads(out))
    assert code == 0
    assert answers["file"].tolist() == files
    opened = [gate is not False for gate in answers["gate"]]
    expected = np.where(opened, rows["adapted_prediction"], rows["source_prediction"])
    assert answers["class"].astype(int).tolist() == expected.tolist()
    assert answers["source_class"].astype(int).tolist() == rows["source_prediction"].tolist()
    for answer, column in (("source_confidence", "source_confidence"), ("distance", "distance")):
        np.testing.assert_allclose(answers[answer], rows[column], rtol=1e-4)
    code, out, _ = call("predict", files[0], *words)
    assert re.search(rf"0\.png +{answers['source_class'][0]} \(\d+%\) +", out)


def test_ttt_lab_chooses_the_run_that_scored_highest_in_tuning(project, asked):
    root, params = project
    files, _, call = asked
    _, out, _ = call("predict", files[0], "--params", str(root / "params.yaml"), "--json")
    scores = {}
    for path in (root / "outputs" / "tuned").glob("*/simclr_convnet.json"):
        choice = json.loads(path.read_text())
        if choice["tuned"]:
            scores[path.parent.name] = choice["score"]
    (answer,) = json.loads(out)
    assert answer["model"] == next(iter(params.models))
    assert scores[answer["run"]] == max(scores.values())


def test_mistakes_in_a_question_are_told_in_one_line(project, asked, tmp_path):
    root, _ = project
    files, _, call = asked
    (tmp_path / "text.png").write_text("no image")
    for words, message in (
        ((files[0], "--run", "actmat"), r"--run: unknown run 'actmat'; did you mean 'actmad'\?"),
        ((files[0], "--model", "vit"), r"--model: unknown model 'vit'"),
        ((str(tmp_path / "text.png"),), r"text\.png: expected an image, found none that can be"),
        ((str(tmp_path / "none.png"),), r"none\.png: expected an image, found none that can be"),
    ):
        code, out, told = call("predict", *words, "--params", str(root / "params.yaml"))
        assert (code, out) == (2, "")
        assert re.fullmatch(rf"error: .*{message}.*\n", told)


def test_ttt_lab_says_where_the_report_is_and_what_methods_there_are(project, asked, monkeypatch):
    root, _ = project
    _, _, call = asked
    assert call("report") == (0, f"{root / 'outputs' / 'report.html'}\n", "")
    assert "actmad_batch" in call("methods")[1]
    monkeypatch.setattr(places, "OUTPUTS", root / "nowhere")
    assert "expected the report, found no file; run `make repro`" in call("report")[2]


BROKEN = """
from dataclasses import dataclass
from tttlab.adaptation.method import Method, entropy


@dataclass(frozen=True)
class Broken(Method):
    def loss(self, net, views, statistics, state):
        loss = entropy(net(views).logits).mean()
        return (loss if loss > 0 else -loss), state
"""


def test_a_stage_started_by_hand_tells_what_is_wrong_with_a_method_before_it_works(
    project, monkeypatch, tmp_path
):
    from pipeline import tune

    root, _ = project
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "broken.py").write_text(BROKEN)
    monkeypatch.chdir(root)
    monkeypatch.setattr(places, "OUTPUTS", root / "outputs")
    monkeypatch.setattr(places, "ROOT", tmp_path)
    params = read_params(root / "params.yaml")
    params.adapt.runs["own"] = {"method": "package.broken", "search": {"lr": [0.1, 0.2]}}
    message = (
        r"^adapt\.runs\.own, method package\.broken on .*: loss \(line 10\) branches on a value"
    )
    with pytest.raises(UserError, match=message):
        tune.run(params, ["own"])
    assert not (tmp_path / "mlflow.db").exists()


def test_nothing_unfinished_is_left(project):
    root, _ = project
    assert not [path for path in (root / ".resume").iterdir() if path.is_dir()]
    assert (root / "outputs" / "report.html").stat().st_size > 50_000
