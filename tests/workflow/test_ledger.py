"""The ledger of a stage: what it knows again, and what it does not trust."""

import json
import types

import pytest

from tools.stage_code import ROOT, stages
from tttlab.config.params import read_params
from tttlab.runtime.resuming import content_hash
from tttlab.workflow import keys, places, training_keys
from tttlab.workflow.ledger import FOLDERS, Ledger, code_of, written_whole
from tttlab.workflow.leftovers import CODE
from tttlab.workflow.pieces import Network, Pair, Piece


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "src" / "tttlab").mkdir(parents=True)
    (tmp_path / "src" / "tttlab" / "used.py").write_text("1")
    deps = "[outputs/data, src/tttlab/used.py]"
    (tmp_path / "dvc.yaml").write_text(f"stages: {{tune: {{deps: {deps}}}}}")
    return tmp_path


def enter(folder, piece: str, key: str):
    file = folder / "outputs" / "tuned" / f"{piece}.json"
    with written_whole(file) as partial:
        partial.write_text(piece)
    ledger = Ledger("tune")
    ledger.enter(piece, key, [file])
    return file


def test_a_finished_piece_is_known_again_by_its_key_and_its_files(folder):
    file = enter(folder, "ssl/vit", "abc")
    assert Ledger("tune").holds("ssl/vit", "abc")
    assert not Ledger("tune").holds("ssl/vit", "abd")
    assert not Ledger("tune").holds("ssl/other", "abc")
    assert Ledger("tune").missing({"ssl/vit": "abc", "ssl/other": "abc"}) == {"ssl/other": "abc"}
    file.write_text("changed")
    assert not Ledger("tune").holds("ssl/vit", "abc")
    file.unlink()
    assert not Ledger("tune").holds("ssl/vit", "abc")


def test_only_wanted_pieces_stay(folder):
    enter(folder, "ssl/vit", "abc")
    gone = enter(folder, "old/vit", "abc")
    half = folder / "outputs" / "tuned" / "ssl" / "vit.json.partial"
    half.write_text("a kill left it")
    Ledger("tune").keep_only(["ssl/vit"])
    assert not gone.parent.exists()
    assert not half.exists()
    assert Ledger("tune").holds("ssl/vit", "abc")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {"key": "k"}}', "null"])
def test_a_ledger_that_cannot_be_read_is_taken_for_none(folder, text):
    (folder / "outputs" / "tuned").mkdir(parents=True)
    (folder / "outputs" / "tuned" / "made_of.json").write_text(text)
    assert not Ledger("tune").holds("a", "k")
    enter(folder, "b", "k")
    assert list(json.loads((folder / "outputs/tuned/made_of.json").read_text())) == ["b"]


def test_a_key_follows_settings_inputs_and_the_code_that_dvc_yaml_lists(folder):
    (folder / "input").write_text("1")
    first = Ledger("tune").key({"lr": 0.1}, [folder / "input"])
    assert Ledger("tune").key({"lr": 0.1}, [folder / "input"]) == first
    assert Ledger("tune").key({"lr": 0.2}, [folder / "input"]) != first
    (folder / "code.py").write_text("2")  # which the stage does not run
    assert Ledger("tune").key({"lr": 0.1}, [folder / "input"]) == first
    (folder / "src" / "tttlab" / "used.py").write_text("2")
    second = Ledger("tune").key({"lr": 0.1}, [folder / "input"])
    (folder / "input").write_text("2")
    assert len({first, second, Ledger("tune").key({"lr": 0.1}, [folder / "input"])}) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "stages:",
        "stages: {train: {cmd: python train.py, deps: [src/train.py]}}",
        "stages: {tune: {cmd: python tune.py, deps: [src/train.py, pipeline/tune.py]}}",
        "stages: {tune: {cmd: python tune.py}}",
    ],
)
def test_in_the_folder_of_another_project_all_code_counts(text, folder):
    (folder / "src" / "train.py").write_text("1")
    (folder / "dvc.yaml").write_text(text)
    assert code_of("tune") == CODE


def test_all_code_that_dvc_yaml_lists_is_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    for stage in ("tune", "distance", "adapt", "align"):
        listed = [path for path in stages()[stage]["deps"] if path.startswith(("src", "pipeline"))]
        assert [path.as_posix() for path in code_of(stage)] == listed


@pytest.mark.parametrize("stage", FOLDERS)
def test_dvc_keeps_the_folder_of_a_stage_that_has_a_ledger(stage):
    assert stages()[stage]["outs"] == [{f"outputs/{FOLDERS[stage]}": {"persist": True}}]


@pytest.mark.parametrize(
    ("make_key", "piece"),
    [
        (keys.tuning_key, Pair("bn", "simclr_convnet")),
        (keys.aligning_key, Pair("ssl", "simclr_convnet")),
        (keys.distance_key, Network("simclr_convnet", 0)),
        (keys.adapting_key, Piece("bn", "simclr_convnet", 0)),
    ],
)
def test_keys_have_the_strength_of_corruptions_only_where_it_is_not_ours(make_key, piece):
    params = read_params(ROOT / "settings" / "digits.yaml", base=ROOT)
    published = params.shifts.model_copy(update={"strength": "cifar10_c"})
    ledger = types.SimpleNamespace(key=lambda settings, _inputs: json.dumps(settings, default=str))
    assert "strength" not in make_key(params, piece, ledger)
    changed = make_key(params.model_copy(update={"shifts": published}), piece, ledger)
    assert '"strength": "cifar10_c"' in changed


@pytest.mark.parametrize("backbone", ["resnet18", "local-dir:{folder}"])
def test_a_taken_network_is_made_of_what_stands_beside_its_weights_too(backbone, tmp_path):
    params = read_params(ROOT / "params.yaml")
    (tmp_path / "model.safetensors").write_text("weights")
    taken = {"backbone": backbone.format(folder=tmp_path), "weights": "timm"}
    if backbone == "resnet18":
        taken["weights"] = str(tmp_path / "model.safetensors")
    model = params.models["simclr_convnet"].model_copy(update=taken)
    params = params.model_copy(update={"models": {"taken": model}})

    def key():
        made = []
        ledger = types.SimpleNamespace(key=lambda _settings, inputs: made.extend(inputs))
        training_keys.pretraining_key(params, Network("taken", 0), ledger)
        mine = [path for path in made if tmp_path in (path, *path.parents)]
        return [content_hash(path) for path in mine]

    before = key()
    (tmp_path / "config.json").write_text("{}")
    beside = key()
    (tmp_path / "config.json").write_text('{"label_names": ["a"]}')
    assert key() != beside != before
