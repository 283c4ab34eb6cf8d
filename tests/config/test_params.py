import os
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tttlab.config.inner_loop import InnerLoop
from tttlab.config.method_settings import declared, method_names
from tttlab.config.mixers import InnerTraining
from tttlab.config.params import read_params
from tttlab.config.values import CORRUPTIONS, HELD_OUT, backbone_names, is_held_out
from tttlab.errors import UserError
from tttlab.experiments.tuning import list_candidates

PROJECT = Path(__file__).parents[2]

HEAD = "from dataclasses import dataclass, field\n\n@dataclass(frozen=True)\nclass Own(Method):\n"
LOSS = "    def loss(self, net, views, statistics, state): ...\n"
METHODS = {
    "none": HEAD + "    trains = False\n",
    "views": HEAD + "    trains = False\n    views: Annotated[int, Ge(1)] = 8\n",
    "simclr": HEAD
    + LOSS
    + "    views: Annotated[int, Ge(2)] = 8\n"
    + "    temperature: Annotated[float, Gt(0)] | None = None\n",
    "mae": HEAD
    + LOSS
    + "    views: Annotated[int, Ge(1)] = 8\n"
    + "    mask_ratio: Annotated[float, Gt(0), Lt(1)] = 0.75\n",
    "actmad": HEAD
    + LOSS
    + '    form: Literal["natural", "l1"] = "natural"\n'
    + "    layers: tuple[str, ...] = ()\n"
    + "    weights: tuple[float, ...] = field(default_factory=lambda: (1.0,))\n"
    + "    augmentation: Augmentation = Augmentation()\n"
    + "    needs: ClassVar[tuple] = ()\n"
    + "    _cache: int = 0\n"
    + "    derived: int = field(init=False, default=1)\n",
    "stream": HEAD
    + LOSS
    + '    protocols = ("online",)\n'
    + "    smallest_batch = 2\n"
    + '    momentum_of_teacher: "float" = 0.9\n',
}

BASE = """
seed: 0
seeds: [0]
data:
  image_size: 32
  unlabeled: {source: sklearn/digits, part: [0.0, 0.45]}
  labeled: {source: sklearn/digits, part: [0.45, 0.80], validation: 0.2}
  test: {source: sklearn/digits, part: [0.80, 1.0]}
models:
  conv:
    backbone: resnet18
    backbone_options: {}
    stem: small
    weights: null
    objective: {name: simclr, temperature: 0.5, hidden_dim: 128, projection_dim: 64}
    pretrain: {epochs: 20, batch_size: 128, optimizer: sgd, lr: 1e-3, weight_decay: 5.0e-4,
               warmup_epochs: 2, augment: {min_scale: 0.4, flip: false, jitter: 0.5}}
    finetune: {mode: joint, epochs: 20, batch_size: 64, optimizer: adamw, lr: 2.0e-3,
               weight_decay: 0.05, warmup_epochs: 1, objective_weight: 0.5,
               augment: {min_scale: 0.7, flip: false, jitter: 0.2}}
  vit:
    backbone: vit_tiny_patch16_224.augreg_in21k
    backbone_options: {}
    stem: small
    weights: null
    objective: {name: mae, mask_ratio: 0.75, decoder_dim: 64, decoder_depth: 1, decoder_heads: 2}
    pretrain: {epochs: 40, batch_size: 128, optimizer: adamw, lr: 1.5e-3, weight_decay: 0.05,
               warmup_epochs: 4, augment: {min_scale: 0.4, flip: false, jitter: 0.5}}
    finetune: {mode: full, epochs: 40, batch_size: 64, optimizer: adamw, lr: 1.0e-3,
               weight_decay: 0.05, warmup_epochs: 2, objective_weight: 0,
               augment: {min_scale: 0.7, flip: false, jitter: 0.2}}
source_stats: {images: 400, bank_size: 256}
shifts: {corruptions: [gaussian_noise, fog], severities: [1, 5], images: 60, sets: {}}
tune:
  {enabled: true, severities: [2], images: [8, null], candidates: 6, keep: 0.5,
   clean_penalty: 1.0, gate: true, search: {}}
distance: {images: 100, permutations: 99}
alignment: {images: 10}
adapt:
  protocol: episodic
  online: {batch_size: 8, order: shuffled, shifts: separate}
  augment: {min_scale: 0.7, flip: false, jitter: 0.2}
  curve: {images: 4, severities: [5], candidates: 1}
  runs:
    none: {method: none}
    ssl: {method: ssl, views: 4, steps: 5, lr: 1.0e-3,
          per_model: {vit: {lr: 2.0e-3, mask_ratio: 0.5}}}
    actmad: {method: actmad, steps: 5, trainable: [encoder.layer1, encoder.layer2]}
machine: {device: auto, precision: 32, workers: 2, images_per_step: auto}
"""


@pytest.fixture
def methods(tmp_path):
    folder = tmp_path / "methods"
    folder.mkdir()
    for name, text in METHODS.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "__init__.py").write_text("")
    return folder


@pytest.fixture
def read(tmp_path, methods):
    """Read BASE with changes, path of a key → value; the value `del_` removes the key."""

    def read(changes=None, base=None):
        values = YAML(typ="safe", pure=True).load(BASE)
        for path, value in (changes or {}).items():
            *parents, key = path.split("/")
            section = values
            for parent in parents:
                section = section[parent]
            if value is del_:
                del section[key]
            else:
                section[key] = value
        file = tmp_path / "params.yaml"
        yaml = YAML(typ="safe", pure=True)
        with file.open("w") as out:
            yaml.dump(values, out)
        return read_params(file, base, methods)

    return read


del_ = object()


def message(read, changes):
    with pytest.raises(UserError) as caught:
        read(changes)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_legal_file_is_read_as_typed_values(read):
    params = read()
    assert params.data.unlabeled.part == (0.0, 0.45)
    assert params.models["conv"].pretrain.lr == 0.001
    assert params.models["vit"].finetune.objective_weight == 0.0
    assert params.machine.precision == "32"
    assert params.shifts.severities == (1, 5)
    assert params.model_dump()["models"]["vit"]["objective"]["mask_ratio"] == 0.75


def watched():
    """List the keys of params.yaml in dvc.yaml, with a model and a run of BASE for templates."""
    stages = YAML(typ="safe").load((PROJECT / "dvc.yaml").read_text())["stages"].values()
    keys = {key for stage in stages for key in stage.get("do", stage).get("params", ())}
    return sorted(
        key.replace("${item.model}", "conv").replace("${key}", "actmad").replace(".", "/")
        for key in keys
    )


@pytest.mark.parametrize("key", [key for key in watched() if "/runs/" not in key])
def test_a_key_that_dvc_watches_must_be_there(read, key):
    """Otherwise DVC would stop only at the stage that reads it, after running earlier ones."""
    assert message(read, {key: del_}).startswith(f"{key.replace('/', '.')}: missing")


def test_exponents_without_a_point_are_numbers_as_in_yaml_1_2(tmp_path, methods):
    file = tmp_path / "params.yaml"
    file.write_text(BASE)
    assert read_params(file, methods=methods).models["conv"].pretrain.lr == 1e-3


def test_values_are_frozen(read):
    with pytest.raises(ValueError, match="frozen"):
        read().data.image_size = 64


RUN = "adapt/runs/ssl/"
CONV = "models/conv/"
VIT = "models/vit/"
CLUST3 = {"name": "clust3", "stages": [1, 2], "heads": 5, "clusters": 10}
IT3 = {"name": "it3", "stage": None}
MISTAKES = [
    # path of the key, its value, how the message begins, what else it contains
    ("sed", 1, "sed: unknown key", "did you mean 'seed'?"),
    ("seed", "1", "seed: expected a valid integer", "found '1'"),
    ("seed", True, "seed: expected a valid integer", "found true"),
    ("seed", None, "seed: expected a valid integer", "found null"),
    ("seed", del_, "seed: missing", ""),
    ("data", 3, "data: expected keys with values", "found 3"),
    (
        "data/image_size",
        4,
        "data.image_size: expected a number greater than or equal to 8",
        "found 4",
    ),
    ("data/image_size", "atuo", "data.image_size: expected", "or 'auto', found 'atuo'"),
    (
        "data/pack_below",
        -1,
        "data.pack_below: expected a number greater than or equal to 0",
        "found -1",
    ),
    (
        "data/test/labels",
        "non",
        "data.test.labels: found 'non'",
        "did you mean 'none'? allowed: auto, none",
    ),
    ("data/labeled/labels", "none", "data.labeled.labels: unknown key", ""),
    (
        "data/duplicates",
        "alow",
        "data.duplicates: found 'alow'",
        "did you mean 'allow'? allowed: allow, error, skip",
    ),
    ("data/depth", 7, "data.depth: expected a number greater than or equal to 8", "found 7"),
    ("data/depth", 32, "data.depth: expected a number less than or equal to 31", "found 32"),
    (
        "data/test/part",
        [0.7, 1.0],
        "data.labeled.part: overlaps data.test.part",
        "make the parts disjoint",
    ),
    ("data/test/part", [1.0, 0.9], "data.test.part: expected [low, high]", "found [1.0, 0.9]"),
    ("data/test/part", [0.8, 1.1], "data.test.part: expected [low, high]", "found [0.8, 1.1]"),
    (
        "data/test/source",
        "sklearn/digit",
        "data.test.source: unknown source",
        "did you mean 'sklearn/digits'?",
    ),
    (
        "data/test/source",
        "torch/cifar_10",
        "data.test.source: unknown source",
        "did you mean 'torch/cifar10'?",
    ),
    ("data/test/source", "torch/cifar10", "data.test.split: missing", "train or test"),
    ("data/test/source", "hfds/a/b", "data.test.split: missing", ""),
    ("data/test/source", "folder", "data.test.root: missing", "image folder"),
    ("data/test/split", "test", "data.test.split: expected null", "found 'test'"),
    (
        "data/test/limit",
        0,
        "data.test.limit: expected a number greater than or equal to 1",
        "found 0",
    ),
    (
        "data/labeled/validation",
        1.0,
        "data.labeled.validation: expected a number less than 1",
        "found 1.0",
    ),
    ("data/labeled/validation", del_, "data.labeled.validation: missing", ""),
    ("adapt/augment", 3, "adapt.augment: expected keys with values", "found 3"),
    ("adapt/augment/flip", del_, "adapt.augment.flip: missing", ""),
    ("adapt/augment/zoom", 1, "adapt.augment.zoom: unknown key", "allowed: flip, jitter"),
    (CONV + "objective", 3, "models.conv.objective: expected keys with values", "found 3"),
    (CONV + "pretrain/augment", None, "models.conv.pretrain.augment: expected keys", "found null"),
    (
        "source_stats/images",
        1,
        "source_stats.images: expected a number greater than or equal to 2",
        "found 1",
    ),
    (
        "adapt/augment/min_scale",
        0.0,
        "adapt.augment.min_scale: expected a number greater than 0",
        "",
    ),
    ("adapt/augment/flip", 1, "adapt.augment.flip: expected a valid boolean", "found 1"),
    ("models", {}, "models: expected at least one entry", "found {}"),
    (
        CONV + "backbone",
        "resnet81",
        "models.conv.backbone: unknown backbone 'resnet81'",
        "did you mean 'resnet18'",
    ),
    (
        VIT + "backbone",
        "resnet18",
        "models.vit.backbone: mae works on patch tokens",
        "objective.name: simclr",
    ),
    (
        CONV + "weights",
        "no.safetensors",
        "models.conv.weights: expected null, timm or the path",
        "no.safetensors",
    ),
    (
        CONV + "objective/name",
        "simcrl",
        "models.conv.objective.name: found 'simcrl'",
        "did you mean 'simclr'?",
    ),
    (CONV + "objective/name", del_, "models.conv.objective.name: missing", ""),
    (
        CONV + "objective/temprature",
        1,
        "models.conv.objective.temprature: unknown key",
        "mean 'temperature'?",
    ),
    (CONV + "objective", {"name": "rotation"}, "models.conv.objective.shared_stages: missing", ""),
    (
        CONV + "objective",
        {"name": "rotation", "shared_stages": 0},
        "models.conv.objective.shared_stages: expected a number greater than or equal to 1",
        "found 0",
    ),
    (
        CONV + "objective",
        CLUST3 | {"stages": []},
        "models.conv.objective.stages: expected at least one entry",
        "found []",
    ),
    (
        CONV + "objective",
        CLUST3 | {"stages": [2, 2]},
        "models.conv.objective.stages: expected every entry once",
        "2 twice",
    ),
    (
        CONV + "objective",
        CLUST3 | {"clusters": 1},
        "models.conv.objective.clusters: expected a number greater",
        "found 1",
    ),
    (
        CONV + "objective",
        IT3,
        "models.conv.pretrain.epochs: it3 learns from labels, which pretraining has none of",
        "set 0",
    ),
    (
        CONV + "objective",
        IT3 | {"stage": 0},
        "models.conv.objective.stage: expected a number greater",
        "found 0",
    ),
    (
        CONV + "objective",
        {"name": "simsiam", "hidden_dim": 8, "projection_dim": 8, "prediction_dim": 0},
        "models.conv.objective.prediction_dim: expected a number greater than or equal to 1",
        "found 0",
    ),
    (
        CONV + "objective/temperature",
        0,
        "models.conv.objective.temperature: expected a number greater than 0",
        "",
    ),
    (
        CONV + "objective",
        {"name": "none"},
        "models.conv.finetune.mode: joint trains with an objective",
        "full or linear",
    ),
    (
        VIT + "objective/decoder_heads",
        3,
        "models.vit.objective.decoder_dim: expected a multiple",
        "found 64",
    ),
    (
        VIT + "objective",
        {"name": "none"},
        "models.vit.pretrain.epochs: there is nothing to pretrain",
        "set 0",
    ),
    (
        CONV + "pretrain/batch_size",
        1,
        "models.conv.pretrain.batch_size: expected a number greater",
        "found 1",
    ),
    (
        CONV + "pretrain/warmup_epochs",
        21,
        "models.conv.pretrain.warmup_epochs: expected at most epochs (20)",
        "21",
    ),
    (
        CONV + "pretrain/lr",
        "0.1",
        "models.conv.pretrain.lr: expected a valid number",
        "found '0.1'",
    ),
    (
        CONV + "pretrain/lr",
        float("nan"),
        "models.conv.pretrain.lr: expected a finite number",
        "found NaN",
    ),
    (
        CONV + "finetune/mode",
        "both",
        "models.conv.finetune.mode: found 'both'",
        "allowed: full, joint, linear, meta",
    ),
    (
        CONV + "finetune/probe",
        {"depth": 2, "heads": 2},
        "models.conv.finetune.probe: expected nothing",
        "found mode joint",
    ),
    (CONV + "finetune/mode", "meta", "models.conv.finetune.inner: missing", "pairs: 4}"),
    (
        CONV + "finetune/inner",
        {"lr": 0.1, "steps": 1, "pairs": 2},
        "models.conv.finetune.inner: expected nothing",
        "remove it",
    ),
    (
        "shifts/corruptions",
        ["gausian_noise"],
        "shifts.corruptions[0]: unknown corruption",
        "mean 'gaussian_noise'?",
    ),
    (
        "shifts/corruptions",
        ["fog", "spatter"],
        "shifts.corruptions[1]: 'spatter' is kept for tuning",
        "allowed: ",
    ),
    (
        "shifts/corruptions",
        ["fog", "fog"],
        "shifts.corruptions: expected every entry once",
        "'fog' twice",
    ),
    (
        "shifts/corruptions",
        [],
        "shifts.corruptions: expected at least one corruption or an entry of sets",
        "clean: validation",
    ),
    (
        "shifts/clean",
        "tset",
        "shifts.clean: found 'tset'",
        "did you mean 'test'? allowed: test, validation",
    ),
    ("shifts/images", 0, "shifts.images: expected a number greater than or equal to 1", "found 0"),
    ("shifts/sets", [], "shifts.sets: expected keys with values", "found []"),
    (
        "shifts/sets",
        {"my-photos": {}},
        "shifts.sets.my-photos: expected a name of a-z",
        "found 'my-photos'",
    ),
    ("shifts/sets", {"c": {"format": "cifar10_c"}}, "shifts.sets.c.root: missing", ""),
    (
        "shifts/severities",
        [1, 6],
        "shifts.severities[1]: expected a number less than or equal to 5",
        "found 6",
    ),
    ("seeds", [], "seeds: expected at least one entry", ""),
    ("seeds", [0, 0], "seeds: expected every entry once", "0 twice"),
    (
        "tune/severities",
        [6],
        "tune.severities[0]: expected a number less than or equal to 5",
        "found 6",
    ),
    (
        "tune/images",
        [8, 8],
        "tune.images: expected growing numbers, null (all) last",
        "found [8, 8]",
    ),
    (
        "tune/images",
        [None, 8],
        "tune.images: expected growing numbers, null (all) last",
        "found [null, 8]",
    ),
    ("tune/keep", 0.0, "tune.keep: expected a number greater than 0", "found 0"),
    (
        "tune/search",
        {"stepz": [1]},
        "tune.search.stepz: there is no such setting to tune",
        "did you mean 'steps'?",
    ),
    (
        "tune/search",
        {"steps": []},
        "tune.search.steps: expected a list of values to choose from",
        "found []",
    ),
    (
        "tune/search",
        {"steps": 4},
        "tune.search.steps: expected a list of values to choose from",
        "found 4",
    ),
    (
        "tune/search",
        {"steps": [0, 1]},
        "tune.search.steps: expected at least 1",
        "nothing is trained",
    ),
    (
        "tune/search",
        {"lr": [0.1, -1.0]},
        "tune.search.lr[1]: expected a number greater than 0",
        "found -1.0",
    ),
    (
        "tune/search",
        {"trainable": ["norms"]},
        "tune.search.trainable[0]: unknown group 'norms'",
        "did you mean 'norm'?",
    ),
    (
        RUN + "search",
        [1],
        "adapt.runs.ssl.search: expected settings with lists of values, or null",
        "found [1]",
    ),
    (
        RUN + "search",
        {"mask_ratio": [0.5]},
        "adapt.runs.ssl.search.mask_ratio: there is no such setting",
        "",
    ),
    (
        RUN + "per_model/vit/search",
        {"mask_ratio": [2.0]},
        "adapt.runs.ssl.per_model.vit.search.mask_ratio[0]: expected",
        "2.0",
    ),
    (
        "adapt/runs/none/search",
        {"lr": [0.1]},
        "adapt.runs.none.search.lr: the method takes no steps",
        "remove it",
    ),
    (
        "adapt/runs/ssl/search",
        {"lr": [0.1], "stepz": [1]},
        "adapt.runs.ssl.search.stepz: there is no such setting",
        "'steps'",
    ),
    (
        "adapt/runs/none/search",
        {"prior": [0.1]},
        "adapt.runs.none.search: the control has nothing to tune",
        "remove it",
    ),
    (
        "distance/images",
        5,
        "distance.images: expected a number greater than or equal to 20",
        "found 5",
    ),
    ("adapt/protocol", "episodc", "adapt.protocol: found 'episodc'", "did you mean 'episodic'?"),
    ("shifts/strength", "cifar10c", "shifts.strength: found 'cifar10c'", "mean 'cifar10_c'?"),
    ("adapt/online/shifts", "mixd", "adapt.online.shifts: found 'mixd'", "did you mean 'mixed'?"),
    (
        RUN + "protocol",
        "onlin",
        "adapt.runs.ssl.protocol: unknown protocol 'onlin'",
        "did you mean 'online'?",
    ),
    (
        "adapt/runs/actmad/protocol",
        "online",
        "adapt.runs.actmad.method: actmad is defined for episodic",
        "found protocol: online",
    ),
    (RUN + "models", ["vti"], "adapt.runs.ssl.models: unknown model 'vti'", "did you mean 'vit'?"),
    (
        RUN + "models",
        [],
        "adapt.runs.ssl.models: expected a list of models, found []",
        "remove it for all",
    ),
    ("adapt/runs/none/models", ["vit"], "adapt.runs.none: the control", "{method: none} alone"),
    ("machine/device", "gpu", "machine.device: unknown device 'gpu'", "cuda"),
    ("machine/precision", 16, "machine.precision: found 16", "allowed: 32, auto, bf16"),
    ("machine/device", "cuda:01", "machine.device: unknown device 'cuda:01'", "cuda:<number>"),
    ("machine/devices", 0, "machine.devices: expected", "or 'auto', found 0"),
    ("machine/images_per_step", 0, "machine.images_per_step: expected", "or 'auto', found 0"),
    ("adapt/runs/none", del_, "adapt.runs.none: missing", "add none: {method: none}"),
    (
        "adapt/runs/none/normalisation",
        "image",
        "adapt.runs.none: the control",
        "{method: none} alone",
    ),
    (RUN + "stepz", 5, "adapt.runs.ssl.stepz: unknown key", "did you mean 'steps'?"),
    (
        RUN + "steps",
        -1,
        "adapt.runs.ssl.steps: expected a number greater than or equal to 0",
        "found -1",
    ),
    (
        RUN + "method",
        "actmd",
        "adapt.runs.ssl.method: unknown method 'actmd'",
        "did you mean 'actmad'?",
    ),
    (
        RUN + "method",
        del_,
        "adapt.runs.ssl.method: missing",
        "actmad, mae, none, simclr, stream, views, ssl",
    ),
    (
        RUN + "per_model/vit/ratio",
        1,
        "adapt.runs.ssl.per_model.vit.ratio: unknown key",
        "mean 'mask_ratio'?",
    ),
    (
        RUN + "views",
        1,
        "adapt.runs.ssl.views: expected a number greater than or equal to 2",
        "found 1",
    ),
    (
        RUN + "mask_ratio",
        0.5,
        "adapt.runs.ssl.mask_ratio: no setting of simclr",
        "move it to per_model.vit",
    ),
    (
        RUN + "trainable",
        "nrom",
        "adapt.runs.ssl.trainable: unknown group 'nrom'",
        "did you mean 'norm'?",
    ),
    (
        RUN + "trainable",
        [],
        "adapt.runs.ssl.trainable: expected all, norm, encoder, lora, none or a list",
        "found []",
    ),
    (
        RUN + "per_model/vti",
        {"lr": 1.0},
        "adapt.runs.ssl.per_model.vti: unknown model",
        "did you mean 'vit'?",
    ),
    (
        CONV + "finetune/objective_weight",
        0.0,
        "models.conv.finetune.objective_weight: expected more than 0 with mode joint",
        "set mode: full, which fits the head afterwards",
    ),
    (
        RUN + "per_model/vit/lr",
        -1.0,
        "adapt.runs.ssl.per_model.vit.lr: expected a number greater than 0",
        "-1.0",
    ),
    (
        RUN + "per_model/vit/mask_ratio",
        1.5,
        "adapt.runs.ssl.per_model.vit.mask_ratio: expected a number less",
        "1.5",
    ),
    ("adapt/runs/none/steps", 3, "adapt.runs.none.steps: none does not train", "found 3"),
    (
        "adapt/runs/actmad/form",
        "natual",
        "adapt.runs.actmad.form: found 'natual'",
        "did you mean 'natural'?",
    ),
    (
        "adapt/runs/actmad/layers",
        [1],
        "adapt.runs.actmad.layers[0]: expected a valid string",
        "found 1",
    ),
    ("adapt/runs/actmad/derived", 1, "adapt.runs.actmad.derived: unknown key", ""),
]


@pytest.mark.parametrize(
    ("where", "value", "start", "also"), MISTAKES, ids=[case[2][:60] for case in MISTAKES]
)
def test_a_mistake_is_one_line_with_path_finding_and_choices(read, where, value, start, also):
    text = message(read, {where: value})
    assert text.startswith(start)
    assert also in text


# Without an objective nothing is pretrained, and no run needs one.
ALONE = {
    "models/vit/pretrain/epochs": 0,
    "models/vit/pretrain/warmup_epochs": 0,
    "adapt/runs": {"none": {"method": "none"}},
}


def test_a_probe_is_for_the_tokens_of_a_frozen_transformer(read):
    probe = {"depth": 2, "heads": 3}
    params = read({"models/vit/finetune/mode": "linear", "models/vit/finetune/probe": probe})
    assert params.models["vit"].finetune.probe.depth == 2
    text = message(
        read, {"models/conv/finetune/mode": "linear", "models/conv/finetune/probe": probe}
    )
    assert text.startswith("models.conv.finetune.probe: a probe reads patch tokens")


MIXER = "models/vit/mixer"
MIXER_MISTAKES = {
    "no name": ({MIXER: {}}, "models.vit.mixer.name: missing; allowed: attention, linear_att", ""),
    "another name": (
        {MIXER: {"name": "ttt_liner"}},
        "models.vit.mixer.name: found 'ttt_liner'; did you mean 'ttt_linear'?",
        "allowed: attention, linear_attention, ttt_conv, ttt_linear, ttt_mlp",
    ),
    "a list of names": ({MIXER: {"name": ["a"]}}, 'models.vit.mixer.name: found ["a"]; ', "ttt"),
    "another key": (
        {MIXER: {"name": "ttt_linear", "inner_rate": 1.0}},
        "models.vit.mixer.inner_rate: unknown key; did you mean",
        "allowed: heads, inner_batch, inner_bias, inner_lr,",
    ),
    "no learning rate": (
        {MIXER: {"name": "ttt_mlp", "inner_lr": 0.0}},
        "models.vit.mixer.inner_lr: expected a number greater than 0",
        "found 0.0",
    ),
    "no steps": (
        {MIXER: {"name": "ttt_mlp", "inner_steps": 0}},
        "models.vit.mixer.inner_steps: expected a number greater than or equal to 1",
        "found 0",
    ),
    "a key of another mixer": (
        {MIXER: {"name": "linear_attention", "inner_lr": 1.0}},
        "models.vit.mixer.inner_lr: unknown key",
        "allowed: feature_map, heads, name",
    ),
    "another feature map": (
        {MIXER: {"name": "linear_attention", "feature_map": "relu"}},
        "models.vit.mixer.feature_map: found 'relu'",
        "allowed: elu, identity",
    ),
    "no section": ({MIXER: "ttt_mlp"}, "models.vit.mixer: expected keys with values", "'ttt_mlp'"),
    "an MLP from zero": (
        {MIXER: {"name": "ttt_mlp", "learned_init": False}},
        "models.vit.mixer.learned_init: expected true: an MLP whose weights are all zero",
        "found false",
    ),
    "another backbone": (
        {"models/conv/mixer": {"name": "attention"}},
        "models.conv.mixer: a mixer takes the place of attention in a plain vision transformer",
        "found 'resnet18'; remove it",
    ),
    "timm's weights": (
        {MIXER: {"name": "ttt_mlp"}, "models/vit/weights": "timm", "models/vit/stem": "original"},
        "models.vit.weights: expected null or the path of a checkpoint with mixer ttt_mlp",
        "found timm",
    ),
    "dropped tokens": (
        {MIXER: {"name": "ttt_conv"}},
        "models.vit.mixer.name: ttt_conv needs the whole grid of patches, of which mae drops some",
        "choose ttt_linear or ttt_mlp",
    ),
    "a network that is kept": (
        {
            MIXER: {"name": "ttt_mlp"},
            "models/vit/weights": "timm",
            "models/vit/stem": "original",
            "models/vit/objective": {"name": "none"},
            "models/vit/finetune": {"mode": "none", "classes": ["a", "b"]},
        },
        "models.vit.mixer: with finetune.mode none the network is kept as it is",
        "remove it",
    ),
}


@pytest.mark.parametrize("case", MIXER_MISTAKES)
def test_a_mixer_that_does_not_fit_is_told_in_a_line(read, case):
    changes, start, also = MIXER_MISTAKES[case]
    text = message(read, changes)
    assert text.startswith(start)
    assert also in text


def test_a_mixer_has_the_defaults_of_its_declaration(read):
    params = read({MIXER: {"name": "ttt_linear", "inner_steps": 2}})
    section = params.models["vit"].model_dump(mode="json")["mixer"]
    assert section.pop("name") == "ttt_linear"
    assert section == asdict(InnerTraining(inner_steps=2))
    params = read({MIXER: {"name": "ttt_conv"}, "models/vit/objective": {"name": "none"}} | ALONE)
    assert params.models["vit"].mixer.inner_lr == 1.0


@pytest.mark.parametrize("given", [{}, {MIXER: None}], ids=["left out", "null"])
def test_a_model_without_a_mixer_is_hashed_and_kept_as_before_there_were_any(read, given):
    model = read(given).models["vit"]
    for section in (
        model.model_dump(mode="json"),
        model.model_dump(mode="json", exclude={"finetune"}),
        model.model_dump(mode="json", include={"backbone": True, "mixer": True}),
    ):
        assert "mixer" not in section
    assert read({MIXER: {"name": "attention"}}).models["vit"].mixer.name == "attention"


def test_a_run_can_be_for_some_models_and_have_a_protocol_of_its_own(read, methods):
    masked = {"method": "mae", "models": ["vit"]}
    stream = {"method": "stream", "protocol": "online", "momentum_of_teacher": 0.9}
    params = read({"adapt/runs/masked": masked, "adapt/runs/stream": stream})
    assert params.models_of("masked") == ("vit",)
    assert params.models_of("stream") == ("conv", "vit")
    assert ("conv", "masked") not in params.pairs
    assert {("vit", "masked"), ("conv", "stream")} < set(params.pairs)
    assert params.run_settings("stream", "vit", methods).protocol == "online"
    assert params.run_settings("masked", "vit", methods).protocol == "episodic"


def test_several_mistakes_are_counted(read):
    text = message(
        read,
        {
            "seed": -1,
            "data/image_size": 1,
            "machine/workers": -1,
            "machine/gpu": 1,
            "machine/cpu": 1,
        },
    )
    assert text.startswith("seed: ")
    # An unknown key hides the other mistakes of its section.
    assert text.endswith("(and 3 more)")
    assert message(read, {"machine/gpu": 1, "machine/cpu": 1}).endswith("(and 1 more)")
    assert "more)" not in message(read, {"seed": -1})


def test_names_must_fit_files_and_stages(read):
    assert message(read, {"adapt/runs/my-run": {"method": "none"}}).startswith(
        "adapt.runs.my-run: expected a name of a-z"
    )


def test_it3_is_trained_from_labels_alone_and_takes_no_step_without(read):
    alone = {"adapt/runs/ssl": del_, CONV + "objective": IT3}
    supervised = alone | {CONV + "pretrain/epochs": 0, CONV + "pretrain/warmup_epochs": 0}
    assert read(supervised).objectives["conv"] == "it3"
    step = {
        CONV + "finetune/mode": "meta",
        CONV + "finetune/inner": {"lr": 0.1, "steps": 1, "pairs": 4},
    }
    assert message(read, supervised | step).startswith(
        "models.conv.finetune.mode: meta takes a step without labels"
    )


def test_it3_and_a_probe_do_not_go_together(read):
    """With the label as an input it is the encoder's features that are classified."""
    changes = {VIT + "objective": IT3, VIT + "pretrain/epochs": 0, "adapt/runs/ssl": del_}
    changes |= {VIT + "pretrain/warmup_epochs": 0, VIT + "finetune/mode": "linear"}
    assert read(changes).objectives["vit"] == "it3"
    assert message(read, changes | {VIT + "finetune/probe": {"depth": 2, "heads": 3}}).startswith(
        "models.vit.finetune.probe: it3 gives the label at the encoder's input"
    )


LEARNED = {"name": "learned", "stage": 4, "dim": 64, "trained": True}
STEP = {"lr": 0.1, "steps": 1, "pairs": 1}


def test_a_learned_task_is_trained_by_its_step_alone(read):
    unpretrained = {CONV + "pretrain/epochs": 0, CONV + "pretrain/warmup_epochs": 0}
    learned = {"adapt/runs/ssl": del_, CONV + "objective": LEARNED}
    meta = {
        CONV + "finetune/mode": "meta",
        CONV + "finetune/inner": STEP,
        CONV + "finetune/objective_weight": 0.0,
    }
    assert read(learned | unpretrained | meta).objectives["conv"] == "learned"
    weight = {CONV + "finetune/objective_weight": 0.5}
    assert message(read, learned | unpretrained | meta | weight) == (
        "models.conv.finetune.objective_weight: learned's own loss would empty it; "
        "expected 0.0, found 0.5"
    )
    for changes in (learned | unpretrained, learned | meta):
        assert message(read, changes) == (
            "models.conv.objective.name: learned is learned by what its step does for the "
            "classifier, and its own loss would empty it; set finetune.mode: meta and "
            "pretrain.epochs: 0"
        )


def test_what_the_step_moves_and_the_share_of_perturbed_images(read):
    simsiam = {"name": "simsiam", "hidden_dim": 8, "projection_dim": 8, "prediction_dim": 4}
    meta = {CONV + "finetune/mode": "meta", CONV + "objective": simsiam, "adapt/runs/ssl": del_}
    for step, moved in ((STEP, "all"), (STEP | {"trainable": "norm"}, "norm")):
        inner = read(meta | {CONV + "finetune/inner": step}).models["conv"].finetune.inner
        assert inner.trainable == moved
        assert ("trainable" in inner.model_dump()) is (moved == "norm")
    for after, fits in ((0, True), (1, True), (50, False)):
        step = meta | {
            CONV + "finetune/inner": STEP | {"after": after},
            CONV + "finetune/epochs": 3,
        }
        if fits:
            inner = read(step).models["conv"].finetune.inner
            assert inner.after == after
            assert ("after" in inner.model_dump()) is (after > 0)
        else:
            assert message(read, step) == (
                "models.conv.finetune.inner.after: expected fewer than epochs (3), of which the "
                "rest are with the step, found 50"
            )
    text = message(read, meta | {CONV + "finetune/inner": STEP | {"trainable": "head"}})
    assert text.startswith("models.conv.finetune.inner.trainable: found 'head'")
    for share in ("perturb", "augmix"):
        assert (
            getattr(read({CONV + f"finetune/{share}": 0.5}).models["conv"].finetune, share) == 0.5
        )
        assert message(read, {CONV + f"finetune/{share}": 1.5}).startswith(
            f"models.conv.finetune.{share}: expected a number less than or equal to 1"
        )
    both = {CONV + "finetune/perturb": 0.7}
    assert read(both | {CONV + "finetune/augmix": 0.3}).models["conv"].finetune.augmix == 0.3
    assert message(read, both | {CONV + "finetune/augmix": 0.4}) == (
        "models.conv.finetune.augmix: expected at most 0.3, for a share of 0.7 is perturbed and no "
        "image is both, found 0.4"
    )


def test_what_is_left_out_leaves_the_keys_of_older_trainings_as_they_were(read):
    finetune = read().models["conv"].finetune
    assert not {"perturb", "augmix"} & finetune.model_dump().keys()
    assert finetune.model_copy(update={"perturb": 0.5}).model_dump()["perturb"] == 0.5


def test_a_method_must_support_the_protocol(read):
    online = {"method": "stream", "momentum_of_teacher": 0.9}
    text = message(read, {"adapt/runs/stream": online})
    assert text.startswith(
        "adapt.runs.stream.method: stream is defined for online, found adapt.protocol: episodic"
    )


@pytest.mark.parametrize(("batch_size", "fits"), [(1, False), (2, False), (3, True)])
def test_a_stream_must_have_batches_that_are_large_enough(read, batch_size, fits):
    """Of an odd number of images, batches of two leave one over; batches of three never do."""
    online = {"method": "stream", "protocol": "online", "momentum_of_teacher": 0.9}
    changes = {"adapt/runs/stream": online, "adapt/online/batch_size": batch_size}
    if fits:
        assert read(changes).adapt.online.batch_size == batch_size
    else:
        assert message(read, changes) == (
            "adapt.online.batch_size: stream (adapt.runs.stream) needs batches of 2 images or "
            f"more; expected 3 or more, found {batch_size}"
        )


def test_the_ssl_run_needs_an_objective(read):
    text = message(
        read,
        {
            "models/vit/objective": {"name": "none"},
            "models/vit/pretrain/epochs": 0,
            "models/vit/pretrain/warmup_epochs": 0,
        },
    )
    assert text.startswith(
        "adapt.runs.ssl.method: ssl means the objective of each model, but "
        "models.vit.objective.name"
    )


def test_unlabeled_and_labeled_images_may_overlap_if_allowed_and_neither_those_of_the_test(read):
    shared = {"data/duplicates": "allow", "data/unlabeled/part": [0.0, 0.8]}
    assert read(shared).data.unlabeled.part == (0.0, 0.8)
    for duplicates in ("error", "skip"):
        text = message(read, shared | {"data/duplicates": duplicates})
        assert text.startswith(
            "data.unlabeled.part: overlaps data.labeled.part on the same source: [0.0, 0.8] and "
            "[0.45, 0.8]"
        )
        assert text.endswith("make the parts disjoint or set data.duplicates: allow")
    for key, changes in (
        ("unlabeled", {"data/unlabeled/part": [0.0, 1.0]}),
        ("labeled", {"data/labeled/part": [0.7, 0.9]}),
    ):
        text = message(read, shared | changes)
        assert text.startswith(f"data.{key}.part: overlaps data.test.part")
        assert text.endswith("; make the parts disjoint")


@pytest.mark.parametrize(
    ("changes", "start", "also"),
    [
        ({"format": "cifar_c"}, ".format: found 'cifar_c'", "did you mean 'cifar10_c'?"),
        (
            {"root": "nowhere"},
            ".root: expected the folder of a data set in the format cifar10_c, found none at",
            "nowhere",
        ),
        ({"only": []}, ".only: expected at least one entry", "found []"),
        ({"only": ["fog", "fog"]}, ".only: expected every entry once", "'fog' twice"),
        (
            {"only": ["fog", "spatter"]},
            ".only: 'spatter' is kept for tuning and never tested on",
            "remove it",
        ),
        (
            {"format": "cifar100_c", "only": ["saturate"]},
            ".only: 'saturate' is kept for tuning",
            "",
        ),
        (
            {"format": "corruption_folders", "only": ["Speckle Noise"]},
            ".only: 'Speckle Noise' is kept for tuning",
            "",
        ),
        (
            {"format": "domain_folders", "only": ["gaussian_blur-4"]},
            ".only: 'gaussian_blur-4' is kept for tuning",
            "",
        ),
        (
            {"format": "domain_folders", "only": ["e\u0301", "\u00e9"]},
            ".only: expected every entry once",
            "'\u00e9' twice",
        ),
        (
            {"severities": [0]},
            ".severities[0]: expected a number greater than or equal to 1",
            "found 0",
        ),
        ({"severities": [5, 5]}, ".severities: expected every entry once", "5 twice"),
        (
            {"format": "cifar10_1", "severities": [1]},
            ".severities: expected null: cifar10_1 has no severities",
            "found [1]",
        ),
        (
            {"format": "domain_folders", "severities": [1]},
            ".severities: expected null: domain_folders has no",
            "found [1]",
        ),
        ({"labels": "none"}, ".labels: expected auto: cifar10_c comes with labels", "found 'none'"),
        (
            {"format": "cifar10_1", "labels": "none"},
            ".labels: expected auto: cifar10_1 comes with labels",
            "",
        ),
        ({"labels": "folders"}, ".labels: found 'folders'", "allowed: auto, none"),
        ({"rot": "x"}, ".rot: unknown key", "did you mean 'root'?"),
    ],
)
def test_a_mistake_in_a_set_that_comes_shifted(read, tmp_path, changes, start, also):
    photos = {"format": "cifar10_c", "root": str(tmp_path)} | changes
    text = message(read, {"shifts/sets": {"photos": photos}})
    assert text.startswith(f"shifts.sets.photos{start}")
    assert also in text


def test_a_set_or_its_folder_is_not_called_like_what_settings_are_tuned_under_either(
    read, tmp_path
):
    """Otherwise a set could hold such a corruption in folders of any name, one per severity."""
    (tmp_path / "gaussian_blur").mkdir()
    folders = {"format": "domain_folders", "root": str(tmp_path)}
    assert message(read, {"shifts/sets": {"spatter": folders}}).startswith(
        "shifts.sets.spatter: 'spatter' is kept for tuning"
    )
    blur = folders | {"root": str(tmp_path / "gaussian_blur")}
    text = message(read, {"shifts/sets": {"blur": blur}})
    assert text.startswith(
        "shifts.sets.blur.root: 'gaussian_blur' is kept for tuning and never tested on"
    )


def test_a_set_that_comes_shifted_starts_from_the_base_and_wants_everything(read, tmp_path):
    (tmp_path / "photos").mkdir()
    changes = {"shifts/sets": {"p": {"format": "domain_folders", "root": "photos"}}}
    photos = read(changes, base=tmp_path).shifts.sets["p"]
    assert photos.root == tmp_path / "photos"
    assert (photos.only, photos.severities, photos.labels) == (None, None, "auto")


def test_names_of_the_corruptions_that_settings_are_tuned_under_are_known_however_they_are_spelt():
    assert all(is_held_out(name) for name in (*HELD_OUT, "Gaussian Blur", "spatter3", "SPATTER-5"))
    assert not any(
        is_held_out(name)
        for name in (*CORRUPTIONS, "v4", "3", "motion_blur", "blur", "noise", "night")
    )


def test_a_project_in_a_folder_that_is_not_utf_8_is_told_so_at_once(read, tmp_path):
    base = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    (base / "photos").mkdir(parents=True)
    start = r"^shifts\.sets\.p\.root: expected a path in UTF-8, found"
    with pytest.raises(UserError, match=start + r" '.*caf\\udce9/photos'; rename"):
        read({"shifts/sets": {"p": {"format": "domain_folders", "root": "photos"}}}, base=base)


def test_there_is_something_to_test_on_without_corruptions(read, tmp_path):
    photos = {"p": {"format": "domain_folders", "root": str(tmp_path)}}
    assert read({"shifts/corruptions": [], "shifts/sets": photos}).shifts.corruptions == ()
    assert (
        read({"shifts/corruptions": [], "shifts/clean": "validation"}).shifts.clean == "validation"
    )
    assert read().shifts.clean == "test"


def test_the_strength_is_left_out_of_hashes_unless_it_is_that_of_cifar10_c(read):
    for own in (read(), read({"shifts/strength": "own"})):
        assert own.shifts.strength == "own"
        assert "strength" not in own.model_dump(mode="json")["shifts"]
    published = read({"shifts/strength": "cifar10_c"}).shifts
    assert published.model_dump(mode="json")["strength"] == "cifar10_c"
    for size, fits in ((32, True), ("auto", True), (48, False)):
        changes = {"shifts/strength": "cifar10_c", "data/image_size": size}
        if fits:
            assert read(changes).data.image_size == size
        else:
            assert message(read, changes) == (
                "shifts.strength: expected own, for cifar10_c is defined for images of 32 pixels, "
                "found 'cifar10_c' and images of 48; "
                "set data.image_size: 32, or leave strength out"
            )


def test_a_folder_may_be_left_to_itself_or_said_to_hold_no_classes(read, tmp_path):
    folder = {"data/test/source": "folder", "data/test/root": str(tmp_path)}
    assert read(folder).data.test.labels == "auto"
    assert read(folder | {"data/test/labels": "none"}).data.test.labels == "none"


def test_paths_start_from_the_base_and_must_exist(read, tmp_path):
    changes = {"data/test/source": "folder", "data/test/root": "photos"}
    assert message(read, changes).startswith(
        "data.test.root: expected an image folder, found nothing of the kind at photos"
    )
    (tmp_path / "photos").mkdir()
    assert read(changes, base=tmp_path).data.test.root == tmp_path / "photos"
    text = message(
        lambda changes: read(changes, base=tmp_path), changes | {"data/test/split": "val"}
    )
    assert text.startswith("data.test.split: expected the name of something inside")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected keys with values, found null"),
        ("seed: 0\nseed: 1\n", "line 2: not valid YAML (found duplicate key"),
        ("seed: [1\n", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_settings_file(tmp_path, text, expected):
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_params(file)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: expected the file of settings"):
        read_params(tmp_path / "none.yaml")


def test_run_settings_resolve_the_alias_and_overrides(read, methods):
    params = read()
    conv, vit = (params.run_settings("ssl", name, methods) for name in ("conv", "vit"))
    assert (conv.method, conv.loop.steps, conv.loop.lr) == ("simclr", 5, 1e-3)
    assert conv.settings == {"views": 4}
    assert (vit.method, vit.loop.lr) == ("mae", 2e-3)
    assert vit.settings == {"views": 4, "mask_ratio": 0.5}
    assert params.run_settings("none", "vit", methods).loop.steps == 0


def test_the_settings_defaults_are_the_inner_loops(read, methods):
    """A run that sets nothing is adapted as `InnerLoop()` adapts; what it sets reaches the loop."""
    plain = {"method": "actmad"}
    assert read({"adapt/runs/own": plain}).run_settings("own", "vit", methods).loop == InnerLoop()
    given = {"steps": 3, "lr": 0.5, "normalisation": "shrink", "threshold": 2.0, "average": 4}
    run = read({"adapt/runs/own": plain | given}).run_settings("own", "vit", methods)
    assert run.loop == InnerLoop(**given)
    assert run.with_values({"lr": 0.25}).loop == InnerLoop(**given | {"lr": 0.25})
    assert run.loop.settings.keys() == {field.name for field in fields(InnerLoop)} - {
        "augmentation"
    }


def test_run_settings_leave_defaults_to_the_method(read, methods):
    actmad = read().run_settings("actmad", "conv", methods)
    assert actmad.settings == {}
    assert actmad.loop.trainable == ("encoder.layer1", "encoder.layer2")


def test_run_settings_name_what_there_is(read, methods):
    with pytest.raises(UserError, match=r"unknown run 'sls' in params\.yaml; did you mean 'ssl'"):
        read().run_settings("sls", "vit", methods)
    with pytest.raises(UserError, match="unknown model 'vitt'"):
        read().run_settings("ssl", "vitt", methods)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n", "expected one public class with @dataclass and the base Method, found 0"),
        (
            METHODS["none"] + METHODS["views"],
            "expected one public class with @dataclass and the base Method, found 2",
        ),
        (METHODS["views"].replace("(Method)", ""), "found 0"),
        ("def f(:\n", "line 1: not valid Python"),
        (HEAD + LOSS + "    lr: float = 1.0\n", "the adapter already has a setting 'lr'"),
        (
            HEAD + "    rate: float = 1.0\n",
            "line 4: class Own has no loss to train with; write loss(self, net, views",
        ),
        (
            HEAD + LOSS + "    rate = 2.0\n",
            "line 6: rate has no type, so that it is no setting; write rate: float = 2.0",
        ),
        (
            HEAD + LOSS + "    rate: float\n",
            "line 6: setting rate has no default; write rate: float = <value>",
        ),
        (
            HEAD + LOSS + "    rate: Own = field(kw_only=True)\n",
            "line 6: setting rate has no default",
        ),
        (
            HEAD + LOSS + '    protocols = ("offline",)\n',
            "line 6: protocols: found 'offline'; did you mean 'online'?",
        ),
        (
            HEAD + LOSS + '    protocols = "online"\n',
            "expected several names, found 'online'; write ('online',)",
        ),
        (HEAD + LOSS + "    protocols = ()\n", "protocols: expected at least one entry, found"),
        (
            HEAD + LOSS + '    needs = "layers"\n',
            "line 6: needs: expected several names, found 'layers'; write ('layers',)",
        ),
        (
            HEAD + LOSS + "    smallest_batch = 0\n",
            "smallest_batch: expected a number greater than or equal to 1, found 0",
        ),
        (
            HEAD + LOSS + '    whole_batch: "bool" = 1\n',
            "line 6: whole_batch: expected a valid boolean, found 1",
        ),
    ],
)
def test_a_method_file_that_cannot_be_read(read, methods, text, expected):
    (methods / "views.py").write_text(text)
    declared.cache_clear()
    assert expected in message(read, {"adapt/runs/views": {"method": "views"}})


def test_a_setting_of_a_type_that_the_file_cannot_hold_is_told(read):
    text = message(read, {"adapt/runs/actmad/augmentation": {"flip": True}})
    assert text.startswith(
        "adapt.runs.actmad.augmentation: actmad has it, but of a type that this file cannot hold"
    )


def test_what_is_no_setting_needs_neither_type_nor_default(methods):
    constants = (
        "    LEVELS = 3\n    _private = 2\n"
        "    limits: ClassVar[dict]\n    after: int = field(init=False)\n"
    )
    hooks = (
        "    views = memo_views\n    predict: ClassVar = mean\n    head = None\n    _: KW_ONLY\n"
    )
    (methods / "views.py").write_text(HEAD + LOSS + constants + hooks + "    rate: float = 1.0\n")
    declared.cache_clear()
    method = declared("views", methods)
    assert list(method.settings.model_fields) == ["rate"]
    assert (method.others, method.predicts) == ((), True)


def test_what_a_class_may_say_of_itself_is_what_the_contract_knows():
    from tttlab.adaptation.method import Method
    from tttlab.config.method_settings import HOOKS, Attributes

    names = {name for name in vars(Method) if not name.startswith("_")}
    hooks = {name for name in names if callable(getattr(Method, name))}
    assert hooks == set(HOOKS)
    for name in names - hooks:
        assert Attributes.model_fields[name].default == getattr(Method, name), name


def test_a_loss_may_come_from_a_base_beside_method(methods):
    (methods / "views.py").write_text(
        HEAD.replace("(Method)", "(_Shared, Method)") + "    rate: float = 1.0\n"
    )
    declared.cache_clear()
    assert declared("views", methods).trains


def test_settings_read_from_text_are_those_of_the_class(methods):
    """What the source text says about the real methods is what Python makes of them."""
    import dataclasses
    import importlib

    for name in method_names():
        classes = [
            value
            for value in vars(importlib.import_module(f"tttlab.methods.{name}")).values()
            if dataclasses.is_dataclass(value) and value.__module__ == f"tttlab.methods.{name}"
        ]
        assert len(classes) == 1
        method = declared(name)
        fields = {field.name: field for field in dataclasses.fields(classes[0])}
        assert set(method.settings.model_fields) <= set(fields)
        for key, field in method.settings.model_fields.items():
            if fields[key].default is not dataclasses.MISSING:
                assert field.default == fields[key].default, f"{name}.{key}"
        assert method.protocols == tuple(classes[0].protocols)
        assert method.smallest_batch == classes[0].smallest_batch
        assert method.trains == classes[0].trains


def test_the_names_of_corruptions_are_those_that_are_implemented():
    from tttlab.shifts import corruptions

    assert tuple(corruptions.TABLE) == (*CORRUPTIONS, *HELD_OUT)


def test_backbone_names_are_those_of_timm():
    timm = pytest.importorskip("timm")
    assert set(timm.list_models()) <= backbone_names()
    assert all(timm.is_model(name) for name in backbone_names())


def test_the_projects_own_settings_are_legal_and_reading_them_imports_nothing_heavy():
    code = (
        "import sys; from pathlib import Path; from tttlab.config.params import read_params; "
        f"read_params(Path({str(PROJECT / 'params.yaml')!r})); "
        "heavy = ('torch', 'timm', 'sklearn', 'pandas', 'mlflow'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env={"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stdout.strip()) == (0, "[]"), process.stderr


SHARED = {"tune/search": {"steps": [1, 4], "lr": [0.1, 0.2]}}


class TestSearch:
    @pytest.fixture
    def resolve(self, read, methods):
        def resolve(run, model, changes=None):
            return read(SHARED | (changes or {})).run_settings(run, model, methods)

        return resolve

    def test_is_shared_by_all_runs_that_train(self, resolve):
        assert resolve("ssl", "conv").search == {"steps": (1, 4), "lr": (0.1, 0.2)}
        assert resolve("none", "conv").search == {}

    def test_of_a_run_without_steps_is_its_own_alone(self, resolve):
        still = {"adapt/runs/actmad/steps": 0}
        assert resolve("actmad", "vit", still).search == {}
        search = still | {"adapt/runs/actmad/search": {"form": ["l1", "natural"]}}
        run = resolve("actmad", "vit", search)
        assert run.search == {"form": ("l1", "natural")}
        assert run.values()["steps"] == 0
        assert run.is_control

    def test_of_a_run_adds_replaces_and_takes_away(self, resolve):
        search = {"lr": [0.5], "steps": None, "form": ["l1", "natural"]}
        run = resolve("actmad", "vit", {"adapt/runs/actmad/search": search})
        assert run.search == {"lr": (0.5,), "form": ("l1", "natural")}
        assert resolve("actmad", "vit", {"adapt/runs/actmad/search": None}).search == {}

    def test_of_one_model_adds_to_that_of_the_run(self, resolve):
        changes = {
            "adapt/runs/ssl/search": {"lr": [0.5]},
            "adapt/runs/ssl/per_model/vit/search": {"mask_ratio": [0.5, 0.75]},
        }
        of_run = {"steps": (1, 4), "lr": (0.5,)}
        assert resolve("ssl", "conv", changes).search == of_run
        assert resolve("ssl", "vit", changes).search == of_run | {"mask_ratio": (0.5, 0.75)}

    def test_steps_that_are_not_searched_are_those_of_the_run(self, resolve):
        run = resolve("actmad", "vit", {"adapt/runs/actmad/search": {"steps": None}})
        assert run.search == {"lr": (0.1, 0.2)}
        assert run.values() == {"lr": 1e-3, "steps": 5}

    def test_values_given_twice_count_once(self, resolve):
        run = resolve("actmad", "vit", {"adapt/runs/actmad/search": {"lr": [0.1, 0.1]}})
        assert run.search["lr"] == (0.1,)

    def test_names_the_values_that_a_run_has_without_tuning(self, resolve):
        search = {"trainable": ["norm"], "form": ["l1"], "layers": [["a"]]}
        values = resolve("actmad", "vit", {"adapt/runs/actmad/search": search}).values()
        assert values == {
            "steps": 5,
            "lr": 1e-3,
            "trainable": ("encoder.layer1", "encoder.layer2"),
            "form": "natural",  # the method's own, as are its layers
            "layers": (),
        }

    def test_a_value_that_the_run_leaves_to_the_method_is_tried_once(self, resolve):
        changes = {
            "adapt/runs/actmad/steps": 0,
            "adapt/runs/actmad/search": {"form": ["l1", "natural"]},
        }
        run = resolve("actmad", "vit", changes)
        grid = list_candidates(run.search, run.values(), 8, 0)
        assert [values["form"] for values in grid.candidates] == ["natural", "l1"]

    def test_chosen_values_take_the_place_of_those_of_the_file(self, resolve):
        chosen = {"lr": 0.2, "steps": 4, "mask_ratio": 0.25, "trainable": ["encoder.blocks"]}
        run = resolve("ssl", "vit").with_values(chosen)
        assert (run.loop.lr, run.loop.steps) == (0.2, 4)
        assert run.loop.trainable == ("encoder.blocks",)
        assert run.settings["mask_ratio"] == 0.25
        assert run.settings["views"] == 4
