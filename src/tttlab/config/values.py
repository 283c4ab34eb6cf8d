"""Single values of params.yaml: the names that are known, and what a value must be."""

import difflib
import importlib.util
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictFloat,
    StrictInt,
    ValidationInfo,
)

from tttlab.config.devices import DEVICES, is_device
from tttlab.config.names import is_utf8, nfc
from tttlab.config.strict import Count, fault, show
from tttlab.errors import choices

# Those of the benchmark CIFAR-10-C.
BENCHMARK = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
UNCORRUPTED = "test"  # the shift's name where the test images are themselves shifted
CORRUPTIONS = BENCHMARK  # those that params.yaml may name
# Settings are tuned under these, so nothing is tested on them.
HELD_OUT = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)
STRENGTHS = ("own", "cifar10_c")  # ours, and those that CIFAR-10-C was made with
SMALLEST_SIDE = 8  # pixels
CIFAR_SIDE = 32  # pixels; the latter are defined for images of this side
TORCH_SOURCES = (
    # These have the splits train and test.
    *("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist"),
    *("places365", "inaturalist", "imagenet"),
)
_SOURCES = (
    "sklearn/digits",
    "folder",
    "tar",
    "hfds/<name>",
    *(f"torch/{name}" for name in TORCH_SOURCES),
)
FOREIGN_BACKBONES = ("hf-hub:", "hf_hub:", "local-dir:")
PLAIN_TRANSFORMERS = ("vit_", "deit")


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise fault(
            f"expected a name of a-z, 0-9 and _ only (it names files and stages), found {name!r}"
        )
    return name


@cache
def backbone_names() -> frozenset[str]:
    """Collect the architecture names of the installed timm, without importing it.

    The set is empty where timm is not installed.
    """
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    names: set[str] = set()
    for file in (Path(spec.submodule_search_locations[0]) / "models").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        # A line break is found ten times as fast as ^ is.
        names.update(re.findall(r"\n@register_model\s+def (\w+)", text))
        deprecations = r"\nregister_model_deprecations\(__name__, \{(.*?)\}\)"
        for block in re.findall(deprecations, text, re.DOTALL):
            names.update(re.findall(r"""^\s*['"](\w+)['"]:""", block, re.MULTILINE))
    return frozenset(names)


def _check_backbone(name: str) -> str:
    known = backbone_names()
    foreign = name.startswith(FOREIGN_BACKBONES) or is_own_module(name)
    if known and not foreign and name.partition(".")[0] not in known:
        raise fault(tell_unknown_backbone(name))
    return name


def is_own_module(backbone: str) -> bool:
    """Tell whether a backbone is the dotted path of a callable, such as my_package.my_network."""
    if backbone.startswith(FOREIGN_BACKBONES) or backbone.partition(".")[0] in backbone_names():
        return False
    first, *others = backbone.split(".")
    return bool(others) and all(part.isidentifier() for part in (first, *others))


def is_plain_transformer(backbone: str) -> bool:
    """Tell by its name whether a backbone is a plain vision transformer."""
    return backbone.rpartition("/")[2].startswith(PLAIN_TRANSFORMERS)


def tell_unknown_backbone(name: str) -> str:
    """Say that timm does not know a backbone, with the most similar names."""
    close = difflib.get_close_matches(name.partition(".")[0], backbone_names(), n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"unknown backbone {name!r}; {hint}allowed: the names that timm.list_models() prints"


def _read_classes(names: Any, info: ValidationInfo) -> Any:
    """Read a list of classes; text is the path of a file with a name in every line."""
    if isinstance(names, str):
        path = resolve(Path(names), info)
        try:
            names = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise fault(
                "expected a list of names, or a text file with a name in every line, "
                f"found no such file at {path}"
            ) from error
        names = [line.strip() for line in names if line.strip()]
        if not names:
            raise fault(f"expected a name in every line of {path}, found none")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise fault(
            "expected names in the order of the logits, or the path of a text file with one in "
            f"every line, found {show(names)}; quote names that are numbers"
        )
    return [nfc(name) for name in names]


def is_held_out(shift: str) -> bool:
    """Tell whether settings are chosen under a corruption, however its name is spelt.

    The name may have a severity.
    """
    return re.sub(r"[\W\d_]+", "_", shift.casefold()).strip("_") in HELD_OUT


def tell_held_out(name: str) -> str:
    """Say why a corruption cannot be tested on."""
    return (
        f"{name!r} is kept for tuning and never tested on, "
        "for settings are chosen under it; remove it"
    )


def _check_corruption(name: str) -> str:
    if name in HELD_OUT:
        raise fault(
            f"{name!r} is kept for tuning and never tested on; allowed: {', '.join(CORRUPTIONS)}"
        )
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
    if not is_device(device):
        raise fault(f"unknown device {device!r}; {choices(device, DEVICES)}")
    return device


def resolve(path: Path | None, info: ValidationInfo) -> Path | None:
    """Read a path as relative to the folder of the project."""
    base = (info.context or {}).get("base", Path())
    if path and not is_utf8(str(base / path)):
        raise fault(f"expected a path in UTF-8, found {str(base / path)!r}; rename the folder")
    return path and base / path.expanduser()


DISTINCT = AfterValidator(_check_distinct)  # of several values: none is there twice
Name = Annotated[str, AfterValidator(_check_name)]
ShiftName = Annotated[str, AfterValidator(nfc)]
# Of a network, in the order of its logits.
ClassNames = Annotated[
    tuple[str, ...], Field(min_length=2), BeforeValidator(_read_classes), DISTINCT
]
Severity = Annotated[StrictInt, Field(ge=SEVERITIES[0], le=SEVERITIES[-1])]
Severities = Annotated[tuple[Severity, ...], Field(min_length=1), DISTINCT]
BackboneName = Annotated[str, AfterValidator(_check_backbone)]
CorruptionName = Annotated[str, AfterValidator(_check_corruption)]
SourceName = Annotated[str, AfterValidator(_check_source)]
DeviceName = Annotated[str, AfterValidator(_check_device)]
Part = Annotated[tuple[StrictFloat, StrictFloat], AfterValidator(_check_part)]
GrowingCounts = Annotated[
    tuple[Count | None, ...], Field(min_length=1), AfterValidator(_check_growing)
]
