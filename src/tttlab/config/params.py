"""params.yaml as typed, frozen values: the only reader of that file.

The whole file is checked before anything heavy is imported, so a wrong key stops the first stage within a second.
timm's backbone names and the methods' settings are therefore read from source text, never by importing them.
"""

import difflib
import importlib.util
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tttlab.config.method_settings import METHODS
from tttlab.config.names import is_utf8, nfc
from tttlab.config.runs import RunError, RunSettings, models_of, resolve_run, run_mistakes
from tttlab.config.settings import Count, Fraction, Natural, NonNegative, Positive, Strict, fault, show, tell
from tttlab.errors import UserError, choices

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
HELD_OUT = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
TORCH_SOURCES = (
    *("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist"),  # these have the splits train and test
    *("places365", "inaturalist", "imagenet"),
)

_SOURCES = ("sklearn/digits", "folder", "tar", "hfds/<name>", *(f"torch/{name}" for name in TORCH_SOURCES))
_FOREIGN_BACKBONES = ("hf-hub:", "hf_hub:", "local-dir:")
_PLAIN_TRANSFORMERS = ("vit_", "deit")


# --- single values -----------------------------------------------------------------------------------------------


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise fault(f"expected a name of a-z, 0-9 and _ only (it names files and stages), found {name!r}")
    return name


@cache
def backbone_names() -> frozenset[str]:
    """Collect the architecture names of the installed timm without importing it; empty when timm is absent."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    names: set[str] = set()
    for file in (Path(spec.submodule_search_locations[0]) / "models").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        names.update(re.findall(r"^@register_model\s+def (\w+)", text, re.MULTILINE))
        for block in re.findall(r"^register_model_deprecations\(__name__, \{(.*?)\}\)", text, re.DOTALL | re.MULTILINE):
            names.update(re.findall(r"""^\s*['"](\w+)['"]:""", block, re.MULTILINE))
    return frozenset(names)


def _check_backbone(name: str) -> str:
    known = backbone_names()
    if known and not name.startswith(_FOREIGN_BACKBONES) and name.partition(".")[0] not in known:
        close = difflib.get_close_matches(name.partition(".")[0], known, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise fault(f"unknown backbone {name!r}; {hint}allowed: the names that timm.list_models() prints")
    return name


def is_held_out(shift: str) -> bool:
    """Whether a shift is a corruption that settings are chosen under, however it is spelt, with a severity or without."""
    return re.sub(r"[\W\d_]+", "_", shift.casefold()).strip("_") in HELD_OUT


def _held_out(name: str) -> str:
    return f"{name!r} is kept for tuning and never tested on, for settings are chosen under it; remove it"


def _check_corruption(name: str) -> str:
    if name in HELD_OUT:
        raise fault(f"{name!r} is kept for tuning and never tested on; allowed: {', '.join(CORRUPTIONS)}")
    if name not in CORRUPTIONS:
        raise fault(f"unknown corruption {name!r}; {choices(name, CORRUPTIONS)}")
    return name


def _check_distinct(values: tuple) -> tuple:
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise fault(f"expected every entry once, found {twice[0]!r} twice; remove one")
    return values


def _check_growing(counts: tuple[int | None, ...]) -> tuple[int | None, ...]:
    sizes = [float("inf") if count is None else count for count in counts]
    if any(size >= later for size, later in pairwise(sizes)):
        raise fault(f"expected growing numbers, null (all) last, found {show(list(counts))}")
    return counts


def _check_source(source: str) -> str:
    if source not in _SOURCES and not re.fullmatch("hfds/.+", source):
        raise fault(f"unknown source {source!r}; {choices(source, _SOURCES)}")
    return source


def _check_part(part: tuple[float, float]) -> tuple[float, float]:
    low, high = part
    if not 0 <= low < high <= 1:
        raise fault(f"expected [low, high] with 0 <= low < high <= 1, found {list(part)}")
    return part


def _check_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise fault(f"unknown device {device!r}; {choices(device, ['auto', 'cpu', 'cuda', 'cuda:<number>'])}")
    return device


Name = Annotated[str, AfterValidator(_check_name)]
ShiftName = Annotated[str, AfterValidator(nfc)]
Severities = Annotated[
    tuple[Annotated[StrictInt, Field(ge=1, le=5)], ...], Field(min_length=1), AfterValidator(_check_distinct)
]


def _resolve(path: Path | None, info: ValidationInfo) -> Path | None:
    base = (info.context or {}).get("base", Path())
    if path and not is_utf8(str(base / path)):
        raise fault(f"expected a path in UTF-8, found {str(base / path)!r}; rename the folder")
    return path and base / path.expanduser()


# --- sections ----------------------------------------------------------------------------------------------------


class ImageSpec(Strict):
    """Where one image set comes from, and which part of it is taken."""

    source: Annotated[str, AfterValidator(_check_source)]
    root: Annotated[Path | None, AfterValidator(_resolve)] = None
    split: str | None = None
    part: Annotated[tuple[StrictFloat, StrictFloat], AfterValidator(_check_part)] = (0.0, 1.0)
    limit: Count | None = None

    @model_validator(mode="after")
    def _reachable(self) -> "ImageSpec":
        kind = self.source.partition("/")[0]
        if kind in ("folder", "tar"):
            self._check_root(kind)
        elif kind == "sklearn":
            given = next((key for key in ("root", "split") if getattr(self, key) is not None), None)
            if given:
                raise fault(f"expected null: {self.source} is built in, found {str(getattr(self, given))!r}", given)
        elif self.split is None:
            raise fault(f"missing; {self.source} comes in splits, name one (for example train or test)", "split")
        elif re.match("torch/.*(cifar|mnist)", self.source) and self.split not in ("train", "test"):
            raise fault(f"unknown split {self.split!r} of {self.source}; allowed: test, train", "split")
        return self

    def _check_root(self, kind: str) -> None:
        what = "an image folder" if kind == "folder" else "a tar file or a folder of them"
        if self.root is None:
            raise fault(f"missing; source {kind} needs the path of {what}", "root")
        if not self.root.exists() or (kind == "folder" and not self.root.is_dir()):
            raise fault(f"expected {what}, found nothing of the kind at {self.root}", "root")
        if self.split is not None and not (self.root / self.split).exists():
            raise fault(f"expected the name of something inside {self.root}, found {self.split!r}", "split")

    def overlaps(self, other: "ImageSpec") -> bool:
        """Tell whether both specs can take the same image of the same source."""
        same = all(getattr(self, key) == getattr(other, key) for key in ("source", "root", "split"))
        return same and self.part[0] < other.part[1] and other.part[0] < self.part[1]


class LabeledSpec(ImageSpec):
    """An image spec whose images are split further into training and validation."""

    validation: Fraction


class TargetSpec(ImageSpec):
    """An image spec whose images may have no labels."""

    labels: Literal["auto", "none"] = "auto"


class Data(Strict):
    """The three image sets."""

    image_size: Annotated[StrictInt, Field(ge=8)] | Literal["auto"]
    duplicates: Literal["error", "allow", "skip"] = "error"
    unreadable: Literal["error", "skip"] = "error"
    pack_below: Natural = 1024
    depth: Annotated[StrictInt, Field(ge=8, le=31)] | None = None
    unlabeled: ImageSpec
    labeled: LabeledSpec
    test: TargetSpec

    @model_validator(mode="after")
    def _disjoint(self) -> "Data":
        for one, other in (("unlabeled", "labeled"), ("unlabeled", "test"), ("labeled", "test")):
            allowed = self.duplicates == "allow" and other == "labeled"
            parts = [list(getattr(self, key).part) for key in (one, other)]
            if getattr(self, one).overlaps(getattr(self, other)) and not allowed:
                way_out = " or set data.duplicates: allow" if other == "labeled" else ""
                raise fault(
                    f"overlaps data.{other}.part on the same source: {parts[0]} and {parts[1]}; "
                    f"make the parts disjoint{way_out}",
                    f"{one}.part",
                )
        return self


class Views(Strict):
    """Random views of an image: smallest crop area, mirroring, strength of brightness and contrast."""

    min_scale: Annotated[StrictFloat, Field(gt=0, le=1)]
    flip: StrictBool
    jitter: Annotated[StrictFloat, Field(ge=0, le=1)]


class SimCLR(Strict):
    """Contrastive objective."""

    name: Literal["simclr"]
    temperature: Positive
    hidden_dim: Count
    projection_dim: Count


class MAE(Strict):
    """Masked reconstruction."""

    name: Literal["mae"]
    mask_ratio: Fraction
    decoder_dim: Count
    decoder_depth: Count
    decoder_heads: Count

    @model_validator(mode="after")
    def _heads_fit(self) -> "MAE":
        if self.decoder_dim % self.decoder_heads:
            raise fault(f"expected a multiple of decoder_heads {self.decoder_heads}, found {self.decoder_dim}",
                         "decoder_dim")  # fmt: skip
        return self


class Rotation(Strict):
    """Classification of the rotation, in a branch of its own behind the shared stages (null: half of the stages)."""

    name: Literal["rotation"]
    shared_stages: Count | None


class SimSiam(Strict):
    """Positives only."""

    name: Literal["simsiam"]
    hidden_dim: Count
    projection_dim: Count
    prediction_dim: Count


class ClusT3(Strict):
    """Clustering of the places of early feature maps."""

    name: Literal["clust3"]
    stages: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(_check_distinct)]
    heads: Count
    clusters: Annotated[StrictInt, Field(ge=2)]


class IT3(Strict):
    """Classification of images that come with their labels, behind a stage (null: half of the stages)."""

    name: Literal["it3"]
    stage: Count | None


class NoObjective(Strict):
    """Supervised training only."""

    name: Literal["none"]


class Training(Strict):
    """Length and optimiser of one training."""

    epochs: Natural
    batch_size: Annotated[StrictInt, Field(ge=2)]
    optimizer: Literal["sgd", "adamw"]
    lr: Positive
    weight_decay: NonNegative
    warmup_epochs: Natural
    augment: Views

    @model_validator(mode="after")
    def _warmup_fits(self) -> "Training":
        if self.warmup_epochs > self.epochs:
            raise fault(f"expected at most epochs ({self.epochs}), found {self.warmup_epochs}", "warmup_epochs")
        return self


class InnerStep(Strict):
    """The step on the objective that meta-learned fine-tuning differentiates through."""

    lr: Positive
    steps: Count
    pairs: Count


class Probe(Strict):
    """Transformer blocks between a frozen encoder and the classifier."""

    depth: Count
    heads: Count


class Finetune(Training):
    """Supervised training: classifier only, everything, together with the objective, or after a step on it."""

    mode: Literal["linear", "full", "joint", "meta"]
    objective_weight: NonNegative
    inner: InnerStep | None = None
    probe: Probe | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> "Finetune":
        if self.mode != "linear" and self.probe is not None:
            raise fault(f"expected nothing: a probe is for mode linear, which freezes the encoder, found mode {self.mode}; "
                        "remove it", "probe")  # fmt: skip
        if self.mode == "meta" and self.inner is None:
            raise fault("missing; mode meta needs its inner step, for example {lr: 0.1, steps: 1, pairs: 4}", "inner")
        if self.mode != "meta" and self.inner is not None:
            raise fault(f"expected nothing: only mode meta takes an inner step, found mode {self.mode}; remove it", "inner")
        return self


class Model(Strict):
    """One network: its backbone, where its weights come from, and how it is trained."""

    backbone: Annotated[str, AfterValidator(_check_backbone)]
    backbone_options: dict[str, Any]
    stem: Literal["small", "stride2", "original"]
    weights: str | None
    objective: Annotated[SimCLR | MAE | Rotation | SimSiam | ClusT3 | IT3 | NoObjective, Field(discriminator="name")]
    pretrain: Training
    finetune: Finetune

    @field_validator("weights")
    @classmethod
    def _weights_exist(cls, weights: str | None, info: ValidationInfo) -> str | None:
        if weights in (None, "timm"):
            return weights
        path = _resolve(Path(weights), info)
        if not path.exists():
            raise fault(f"expected null, timm or the path of a checkpoint, found no file at {path}")
        return str(path)

    @model_validator(mode="after")
    def _objective_fits(self) -> "Model":
        architecture = self.backbone.rpartition("/")[2]
        if self.objective.name == "mae" and not architecture.startswith(_PLAIN_TRANSFORMERS):
            raise fault(
                "MAE masks patch tokens and needs a plain vision transformer (vit_*, deit_*), "
                f"found {self.backbone!r}; choose one or set objective.name: simclr",
                "backbone",
            )
        if self.objective.name == "none" and self.finetune.mode in ("joint", "meta"):
            raise fault(f"{self.finetune.mode} trains with an objective, but objective.name is none; set full or linear",
                         "finetune.mode")  # fmt: skip
        if self.objective.name == "simclr" and self.finetune.mode == "meta":
            raise fault("meta takes a step on one image alone, which simclr contrasts with others; set objective.name: "
                        "simsiam, rotation, clust3 or mae", "finetune.mode")  # fmt: skip
        if self.objective.name == "it3" and self.finetune.mode == "meta":
            raise fault("meta takes a step without labels, of which it3 makes its loss; set joint", "finetune.mode")
        if self.finetune.probe and not architecture.startswith(_PLAIN_TRANSFORMERS):
            raise fault("a probe reads patch tokens and needs a plain vision transformer (vit_*, deit_*), found "
                        f"{self.backbone!r}; remove it, or choose such a backbone", "finetune.probe")  # fmt: skip
        if self.objective.name == "none" and self.pretrain.epochs:
            raise fault("there is nothing to pretrain with objective.name: none; set 0", "pretrain.epochs")
        if self.objective.name == "it3" and self.pretrain.epochs:
            raise fault("it3 learns from labels, which pretraining has none of; set 0", "pretrain.epochs")
        return self


class SourceStats(Strict):
    """How much source data the source statistics see."""

    images: Annotated[StrictInt, Field(ge=2)] | None
    bank_size: Count


class ShiftSet(Strict):
    """Shifted images as others distribute them."""

    format: Literal["cifar10_c", "cifar100_c", "cifar10_1", "corruption_folders", "domain_folders"]
    root: Annotated[Path, AfterValidator(_resolve)]
    only: Annotated[tuple[ShiftName, ...], Field(min_length=1), AfterValidator(_check_distinct)] | None = None
    severities: Severities | None = None
    labels: Literal["auto", "none"] = "auto"

    @model_validator(mode="after")
    def _makes_sense(self) -> "ShiftSet":
        if not self.root.is_dir():
            raise fault(f"expected the folder of a data set in the format {self.format}, found none at {self.root}", "root")
        for key, names in (("only", self.only or ()), ("root", (self.root.name,))):
            if held_out := next(filter(is_held_out, names), None):
                raise fault(_held_out(held_out), key)
        if self.severities and self.format in ("cifar10_1", "domain_folders"):
            raise fault(f"expected null: {self.format} has no severities, found {list(self.severities)}", "severities")
        if self.labels == "none" and self.format.startswith("cifar"):
            raise fault(f"expected auto: {self.format} comes with labels, found 'none'", "labels")
        return self


class Shifts(Strict):
    """The shifts of the test set: synthetic corruptions, and distributed sets."""

    clean: Literal["test", "validation"] = "test"
    corruptions: Annotated[
        tuple[Annotated[str, AfterValidator(_check_corruption)], ...],
        AfterValidator(_check_distinct),
    ]
    severities: Severities
    images: Count | None
    sets: dict[Name, ShiftSet]

    @model_validator(mode="after")
    def _something_to_test(self) -> "Shifts":
        if held_out := next(filter(is_held_out, self.sets), None):
            raise fault(_held_out(held_out), f"sets.{held_out}")
        if not self.corruptions and not self.sets and self.clean == "test":
            raise fault("expected at least one corruption or an entry of sets, found neither; if the test images are "
                        "themselves shifted, set shifts.clean: validation", "corruptions")  # fmt: skip
        return self


class Curve(Strict):
    """How much of the test set is adapted to along the steps, and by settings that tuning did not choose."""

    images: Natural
    severities: Severities
    candidates: Natural


class Online(Strict):
    """How test images arrive under the protocol ``online``."""

    batch_size: Count
    order: Literal["shuffled", "by_class"]
    shifts: Literal["separate", "continual", "gradual", "mixed"]


class Adapt(Strict):
    """The runs: name → method, adapter settings and the method's own settings, checked by ``read_params``."""

    protocol: Literal["episodic", "online"]
    online: Online
    augment: Views
    curve: Curve
    runs: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]


class Tune(Strict):
    """How settings are chosen on labeled source images under corruptions that are never tested on."""

    enabled: StrictBool
    severities: Severities
    images: Annotated[tuple[Count | None, ...], Field(min_length=1), AfterValidator(_check_growing)]
    candidates: Count
    keep: Annotated[StrictFloat, Field(gt=0, le=1)]
    clean_penalty: NonNegative
    gate: StrictBool
    search: dict[str, Any] = Field(default_factory=dict)


class Distance(Strict):
    """How much of every image set its distance to the source is measured on."""

    images: Annotated[StrictInt, Field(ge=20)]
    permutations: Annotated[StrictInt, Field(ge=19)]


class Alignment(Strict):
    """How many test images per shift the gradients of the two losses are compared on."""

    images: Natural


class Machine(Strict):
    """Where and how fast; changes no result but for rounding, and BatchNorm over several processes without GPUs."""

    device: Annotated[str, AfterValidator(_check_device)] = "auto"
    precision: Annotated[Literal["auto", "32", "bf16"], BeforeValidator(lambda value: "32" if value == 32 else value)] = "auto"
    devices: Count | Literal["auto"] = "auto"
    workers: Natural = 2
    images_per_step: Count | Literal["auto"] = "auto"


class Params(Strict):
    """The whole file."""

    seed: Natural
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1), AfterValidator(_check_distinct)]
    data: Data
    models: Annotated[dict[Name, Model], Field(min_length=1)]
    source_stats: SourceStats
    shifts: Shifts
    tune: Tune
    adapt: Adapt
    distance: Distance
    alignment: Alignment
    machine: Machine = Machine()

    def run_settings(self, run: str, model: str, methods: Path = METHODS) -> RunSettings:
        """Resolve the alias and the ``per_model`` overrides of ``run`` for ``model``.

        Args:
            run: a key of ``adapt.runs``.
            model: a key of ``models``.
            methods: the folder of method files.

        Raises:
            UserError: there is no such run or model, or the settings do not fit.
        """
        for what, name, known in (("model", model, self.models), ("run", run, self.adapt.runs)):
            if name not in known:
                raise UserError(f"unknown {what} {name!r} in params.yaml; {choices(name, known)}")
        try:
            return resolve_run(self.adapt.runs, self.objectives, run, model, self.adapt.protocol, methods, self.tune.search)
        except RunError as error:
            raise UserError(error.args[0]) from error

    def models_of(self, run: str) -> tuple[str, ...]:
        """List the models that a run of ``adapt.runs`` is for."""
        return models_of(self.adapt.runs[run], self.models)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """List every (model, run) that is computed, model after model."""
        return [(model, run) for model in self.models for run in self.adapt.runs if model in self.models_of(run)]

    @property
    def objectives(self) -> dict[str, str]:
        """Model name → name of its objective."""
        return {name: model.objective.name for name, model in self.models.items()}


# --- the file ----------------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> Any:
    from ruamel.yaml import YAML  # YAML 1.2 as DVC reads it: 1e-3 is a number, on and off are words
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: expected the file of settings, found none that can be read") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}, line {line}: not valid YAML ({error.problem or error.context})") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys with values, found {show(values)}")
    return values


def read_params(path: Path, base: Path | None = None, methods: Path = METHODS) -> Params:
    """Read and check the whole file of settings.

    Args:
        path: the YAML file.
        base: folder that relative paths inside the file start from (default: as they are).
        methods: the folder of method files.

    Raises:
        UserError: the first mistake with its path, what was found and what is allowed, and how many more there are.
    """
    values = _read_yaml(path)
    try:
        params = Params.model_validate(values, context={"base": base or Path()})
    except ValidationError as error:
        mistakes = [f"{key}: {text}" if key else text for key, text in tell(error, values)]
    else:
        adapt = params.adapt
        found = run_mistakes(adapt.runs, params.objectives, adapt.protocol, adapt.online.batch_size, methods,
                             params.tune.search)  # fmt: skip
        mistakes = list(dict.fromkeys(found))
    if mistakes:
        more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
        raise UserError(f"{mistakes[0]}{more}")
    return params
