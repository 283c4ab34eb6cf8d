"""Networks that are kept as they are, through the pipeline: predictions, classes and mistakes."""

import copy
import importlib
import json
import sys
import unicodedata

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from tests.helpers import whole
from tests.helpers.whole import MEAN, NAMES, SIZE, STD
from tools.stage_code import ROOT
from tttlab.adaptation.method_code import read_module
from tttlab.config.finetuning import Whole
from tttlab.config.params import read_params
from tttlab.errors import UserError
from tttlab.networks import checkpoints
from tttlab.networks.classifiers import linear_classifier
from tttlab.networks.known_classes import order_of, read_told, told_classes
from tttlab.networks.whole import find_scale
from tttlab.workflow import places

PROJECT = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))

NONE = {"epochs": 0, "batch_size": 8, "optimizer": "sgd", "lr": 1.0, "weight_decay": 0.0}
TIMM = {
    "backbone": "resnet18",
    "backbone_options": {**whole.OPTIONS, "stem_width": 8},
    "stem": "original",
    "weights": "network.safetensors",
    "objective": {"name": "none"},
    "pretrain": NONE
    | {"warmup_epochs": 0, "augment": {"min_scale": 0.7, "flip": False, "jitter": 0.1}},
    "finetune": {"mode": "none", "mean": [*MEAN], "std": [*STD]},
}
OWN = TIMM | {
    "backbone": "tests.helpers.whole.own_network",
    "backbone_options": {},
    "weights": None,
    "finetune": {"mode": "none", "classes": [*NAMES]},
}
RUNS = {
    "none": {"method": "none"},
    "shrink": {"method": "none", "normalisation": "shrink", "threshold": 2.0},
}


def settings(root, **models):
    """Write settings for digits in folders, whose names sort differently than the classes."""
    folder = {"source": "folder", "split": None, "part": [0.0, 1.0], "limit": None}
    values = copy.deepcopy(PROJECT)
    values["data"] |= {
        "image_size": SIZE,
        "duplicates": "allow",
        "unlabeled": folder | {"root": "summer"},
        "labeled": folder | {"root": "summer", "validation": 0.5},
        "test": folder | {"root": "winter", "labels": "auto"},
    }
    values["models"] = models
    values["source_stats"] = {"images": 60, "bank_size": 16}
    values["shifts"] |= {"clean": "validation", "corruptions": [], "severities": [3]}
    values["adapt"] |= {"runs": RUNS, "curve": {"images": 0, "severities": [3], "candidates": 0}}
    values["distance"] = {"images": 40, "permutations": 19}
    values["alignment"] = {"images": 0}
    values["machine"] |= {"workers": 0, "device": "cpu", "images_per_step": 16}
    path = root / "params.yaml"
    with path.open("w") as file:
        YAML().dump(values, file)
    return path


def read(root, **models):
    return read_params(settings(root, **models), base=root)


def fill(root):
    """Write the images and the checkpoint, with its classes in the metadata."""
    whole.write_folders(root / "summer", slice(900, 1200))
    whole.write_folders(root / "winter", slice(1200, 1300), whole.darker)
    whole.write_checkpoint(root / "network.safetensors", classes=json.dumps(NAMES))


def run(params, *stages):
    for stage in stages:
        of_all = stage not in ("methods", "prepare", "evaluate", "report")
        importlib.import_module(f"pipeline.{stage}").run(params, *[[]] * of_all)


TRAINED = ("methods", "prepare", "pretrain", "finetune", "source_stats")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Both kinds of network, once with all stages."""
    root = tmp_path_factory.mktemp("whole")
    fill(root)
    # The network knows three classes more than the folders show, and they come first.
    state = whole.trained()
    state = state | {
        "fc.weight": torch.cat([torch.randn(3, 64) * 0.01, state["fc.weight"]]),
        "fc.bias": torch.cat([torch.full((3,), -1.0), state["fc.bias"]]),
    }
    save_file(state, root / "more.safetensors")
    (root / "more.txt").write_text("\n".join(["x", "y", "z", *NAMES]) + "\n", encoding="utf-8")
    more = TIMM | {
        "weights": "more.safetensors",
        "finetune": TIMM["finetune"] | {"classes": "more.txt"},
    }
    params = read(root, timm=TIMM, own=OWN, more=more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "ROOT", root)
        patch.setattr(places, "OUTPUTS", root / "outputs")
        run(params, *TRAINED, "tune", "distance", "adapt", "evaluate")
    return root, params


def predicted(root, model, name="none"):
    """Give a run's predictions of the test images, with the true class by name."""
    table = pd.read_parquet(root / "outputs" / "predictions" / model / f"{name}.parquet")
    about = json.loads((root / "outputs/finetuned" / model / "0/network.json").read_text())
    for side in ("source", "adapted"):
        table[side] = [about["classes"][number] for number in table[f"{side}_prediction"]]
    return table[table["shift"] == "test"].set_index("image_id")


def by_own_forward(numbers):
    """Classify the shifted test images by the user's own network, in double precision."""
    network = whole.own_network().double().eval()
    pixels, _ = whole.digits(slice(0, 1300))
    pixels = np.stack([whole.darker(pixels[number]) for number in numbers])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    with torch.no_grad():
        return network(images).softmax(-1).max(-1)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["timm", "own", "more"])
def test_the_pipelines_source_predictions_are_the_networks_own(project, model):
    root, _ = project
    table = predicted(root, model)
    own = by_own_forward([int(name.split("/")[-1].split(".")[0]) for name in table.index])
    assert [*table["source"]] == [NAMES[number] for number in own.indices]
    if model != "more":  # there three more classes take some of the probability
        np.testing.assert_allclose(table["source_confidence"], own.values, atol=1e-4)
    _, labels = whole.digits(slice(1200, 1300))
    right = own.indices.numpy() == labels[[int(n.split("/")[-1][:4]) - 1200 for n in table.index]]
    metrics = json.loads((root / "outputs" / "metrics.json").read_text())["runs"]
    assert metrics[f"{model}/none"]["accuracy_source"] == pytest.approx(right.mean())
    assert 0.3 < right.mean() < 0.95  # the shift is one


@pytest.mark.slow
def test_how_the_classes_are_listed_changes_no_accuracy(project):
    """All three networks are the same one, with the same classes in another order."""
    root, _ = project
    metrics = json.loads((root / "outputs" / "metrics.json").read_text())["runs"]
    for name in RUNS:
        accuracies = [metrics[f"{model}/{name}"]["accuracy_adapted"] for model in ("timm", "own")]
        assert accuracies[0] == accuracies[1]
    changed = [metrics[f"{model}/shrink"]["changed"] for model in ("timm", "own")]
    assert changed[0] == changed[1] > 0


@pytest.mark.slow
def test_a_checkpoint_of_a_whole_network_is_loaded_as_it_was(project):
    root, _ = project
    images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    own = whole.own_network().eval()(images)
    for model, first in (("timm", 0), ("own", 0), ("more", 3)):
        network, about = checkpoints.load(root / "outputs" / "finetuned" / model / "0")
        assert about["classes"][:10] == sorted(NAMES)
        assert sorted(about["order"]) == [*range(10 + first)]
        with torch.no_grad():
            logits = network(images).logits
        assert logits.shape == (3, 10 + first)
        numbers = [NAMES.index(name) for name in about["classes"][:10]]
        torch.testing.assert_close(logits[:, :10], own[:, numbers])
    assert about["classes"][10:] == ["x", "y", "z"]
    stored = load_file(root / "outputs/finetuned/more/0/weights.safetensors")
    assert stored["fc.weight"].shape == (13, 64)  # as the user's own program reads it


@pytest.mark.slow
def test_the_linear_classifier_is_in_the_order_of_the_logits(project):
    root, _ = project
    network, _ = checkpoints.load(root / "outputs" / "finetuned" / "more" / "0")
    outputs = network(torch.rand(2, 3, SIZE, SIZE))
    torch.testing.assert_close(linear_classifier(network)(outputs.features), outputs.logits)


MISTAKES = [
    # model, its changes, how the message begins, what it contains
    (TIMM, {"pretrain": TIMM["pretrain"] | {"epochs": 2}}, "models.m.pretrain.epochs: ", "set 0"),
    (
        TIMM,
        {"objective": {"name": "rotation", "shared_stages": 1}},
        "models.m.objective.name: ",
        "set none, or finetune.mode: linear",
    ),
    (TIMM, {"weights": None}, "models.m.weights: ", "a trained network"),
    (TIMM, {"weights": "timm"}, "models.m.finetune.classes: ", "missing"),
    (TIMM, {"weights": "summer"}, "models.m.weights: ", "found the folder"),
    (
        TIMM,
        {"finetune": {"mode": "none", "mean": [0.5, 0.5, 0.5]}},
        "models.m.finetune.std: ",
        "belong together",
    ),
    (
        TIMM,
        {"finetune": {"mode": "none", "epochs": 0, "lr": 1.0}},
        "models.m.finetune.epochs: ",
        "remove it (and 1 more)",
    ),
    (
        TIMM,
        {"finetune": {"mode": "none", "class": 1}},
        "models.m.finetune.class: unknown key",
        "did you mean 'classes'",
    ),
    (TIMM, {"finetune": {"mode": "whole"}}, "models.m.finetune", "more"),
    (OWN, {"weights": "timm"}, "models.m.weights: ", "timm has no weights of your"),
    (OWN, {"stem": "small"}, "models.m.stem: ", "your own and stays as it is"),
    (OWN, {"finetune": {"mode": "none"}}, "models.m.finetune.classes: ", "missing"),
    (
        OWN,
        {"finetune": {"mode": "none", "classes": "no.txt"}},
        "models.m.finetune.classes: ",
        "found no such file",
    ),
    (
        OWN,
        {"finetune": {"mode": "none", "classes": ["a", "b", "a"]}},
        "models.m.finetune.classes: ",
        "found 'a' twice",
    ),
    (
        OWN,
        {"finetune": {"mode": "none", "classes": [1, 2]}},
        "models.m.finetune.classes: ",
        "quote names that are numbers",
    ),
    (
        OWN,
        {"finetune": PROJECT["models"]["mae_vit"]["finetune"]},
        "models.m.backbone: unknown",
        "set finetune: {mode: none}",
    ),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    fill(root)
    return root


@pytest.mark.parametrize(("model", "changes", "begins", "contains"), MISTAKES)
def test_a_mistake_in_the_settings_is_told_in_one_line(images, model, changes, begins, contains):
    with pytest.raises(UserError, match=contains.replace("(", r"\(").replace(")", r"\)")) as error:
        read(images, m=model | changes)
    assert str(error.value).startswith(begins)
    assert "\n" not in str(error.value)


def no_module() -> str:
    return "a network"


class Images(torch.nn.Module):
    """No classifier: it gives back what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        return self.scale * images


CLASSES = {"mode": "none", "classes": [*NAMES]}
BEFORE_WORK = [
    # model, its changes, what the first stage says
    (
        OWN,
        {"finetune": {"mode": "none", "classes": [*NAMES, "ten"]}},
        "models.m.finetune.classes: expected 10 names, one for every logit of the network, found 1",
    ),
    (OWN, {"backbone": "tests.helpers.whole.missing"}, "found AttributeError: module"),
    (OWN, {"backbone": "tests.helpers.nowhere.missing"}, "found ModuleNotFoundError: No module"),
    (
        OWN,
        {"backbone": f"{__name__}.no_module"},
        "expected it to return a torch.nn.Module, found s",
    ),
    (OWN, {"backbone": f"{__name__}.Images"}, r"models.m.backbone: expected logits \(N, K\)"),
    (
        TIMM,
        {"weights": "headless.safetensors", "finetune": CLASSES},
        r"expected the weights of a resnet18 with its classifier \(fc.weight\), found none",
    ),
    (TIMM, {"weights": "plain.safetensors"}, "the checkpoint does not tell its classes"),
    (
        TIMM,
        {"weights": "plain.safetensors", "backbone_options": {}, "finetune": CLASSES},
        "the weights do not fit this network: expected conv1.weight",
    ),
    (TIMM, {"weights": "params.yaml", "finetune": CLASSES}, "found a file that cannot be read"),
]


@pytest.mark.parametrize(("model", "changes", "says"), BEFORE_WORK)
def test_a_wrong_network_is_told_by_the_first_stage(images, monkeypatch, model, changes, says):
    monkeypatch.setattr(places, "OUTPUTS", images / "outputs")
    state = whole.trained()
    save_file(state, images / "plain.safetensors")
    headless = {name: value for name, value in state.items() if not name.startswith("fc.")}
    save_file(headless, images / "headless.safetensors")
    with pytest.raises(UserError, match=says) as error:
        run(read(images, m=model | changes), "methods")
    assert "\n" not in str(error.value)


OWN_MODULE = """
import torch
from tests.helpers import whole

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.own = whole.own_network()

    def forward(self, images):
        return SIGN * self.own(images)
"""


def test_a_network_whose_code_has_changed_is_taken_anew(tmp_path, monkeypatch):
    """Its weights are the same; what follows depends on what it computes with them."""
    fill(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(places, "ROOT", tmp_path)
    monkeypatch.setattr(places, "OUTPUTS", tmp_path / "outputs")
    params, accuracies = read(tmp_path, m=OWN | {"backbone": "changing_net.Net"}), []
    for sign in ("1.0", "-1.0", "-1.0"):
        text = OWN_MODULE.replace("SIGN", sign)
        (tmp_path / "changing_net.py").write_text(text, encoding="utf-8")
        for name in [name for name in sys.modules if name == "changing_net"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        read_module.cache_clear()
        run(params, "methods", *(("prepare",) if not accuracies else ()), "pretrain", "finetune")
        written = tmp_path / "outputs" / "finetuned" / "m" / "0" / "network.json"
        about = json.loads(written.read_text(encoding="utf-8"))
        accuracies.append((about["metrics"]["validation_accuracy"], written.stat().st_mtime_ns))
    (right, _), (wrong, second), (_, third) = accuracies
    assert right > 0.8
    assert wrong < 0.05
    assert second == third  # nothing had changed


def test_a_folder_that_is_no_class_is_told_before_an_image_is_decoded(images, monkeypatch):
    monkeypatch.setattr(places, "OUTPUTS", images / "outputs")
    monkeypatch.setattr(places, "ROOT", images)
    classes = ["Nine" if name == "nine" else name for name in NAMES]
    params = read(images, m=OWN | {"finetune": {"mode": "none", "classes": classes}})
    monkeypatch.setattr("tttlab.workflow.gathering.gather", None)  # decodes
    message = "data.labeled: class 'nine' is none of the 10 classes of models.m; did you mean 'Nine"
    with pytest.raises(UserError, match=message):
        run(params, "prepare")


def test_classes_are_read_from_every_place_that_may_tell_them(tmp_path):
    """In the metadata, beside the weights, and in timm's own file; the nearest counts."""
    state, weights = whole.trained(), tmp_path / "model.safetensors"
    save_file(state, weights)
    assert told_classes(str(weights)) is None
    timm.models.save_for_hf(
        whole.build(), tmp_path, model_config={"label_names": [*NAMES]}, safe_serialization=True
    )
    assert told_classes(str(weights)) == NAMES
    assert read_told(weights).config["mean"] == [0.485, 0.456, 0.406]
    save_file(state, weights, metadata={"class_names": json.dumps(["a", "b"])})
    assert told_classes(str(weights)) == ("a", "b")
    torch.save({"state_dict": state, "classes": ["c", "d"]}, tmp_path / "model.pth")
    assert told_classes(str(tmp_path / "model.pth")) == ("c", "d")
    assert told_classes("timm") is told_classes(None) is None


def test_whose_mean_and_deviation_counts(tmp_path):
    """The settings' before the checkpoint's before timm's; a module of one's own has none."""
    timms, own = whole.build(), whole.Own()
    given, told = {"mean": (0.1, 0.1, 0.1), "std": (2.0, 2.0, 2.0)}, {"mean": MEAN, "std": STD}
    assert find_scale(given, timms, told) == ((0.1, 0.1, 0.1), (2.0, 2.0, 2.0))
    assert find_scale({"mean": None}, timms, told) == (MEAN, STD)
    assert find_scale({}, timms, {}) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert find_scale({}, own, {}) is None


def test_accents_are_compared_as_in_folders():
    composed, decomposed = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    section = Whole.model_validate({"mode": "none", "classes": [decomposed, "hiver"]})
    assert order_of(section.classes, [composed], "models.m") == [0, 1]
    assert order_of(["a", "b", "c", "d"], ["d", "b"], "models.m") == [3, 1, 0, 2]
