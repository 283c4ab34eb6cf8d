"""The settings that ``ttt-lab check`` writes: a params.yaml for one network and two folders."""

import hashlib
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tttlab.config.values import SMALLEST_SIDE, is_own_module
from tttlab.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
MODEL = "network"  # its name in the settings
NO_REQUEST = ("do", "out")  # what a command line holds beside the request's options
HEAD = """\
# Written by ttt-lab check. Edit what you like, then go on with this file as it stands:
#   ttt-lab check --out {folder}
# What each key means is told in the project's params.yaml.
# Settings that nobody has edited give way to another command: SHA-256 {digest}
"""
UNTRAINED = {
    "epochs": 0,
    "batch_size": 64,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.0,
    "warmup_epochs": 0,
}
# To re-normalise, to average, both, and to train: each tuned, so that they can be compared.
RUNS = {
    "none": {"method": "none"},
    "bn": {
        "method": "none",
        "normalisation": "mixed",
        "prior": 0.1,
        "search": {"prior": [0.02, 0.05, 0.1, 0.2, 0.4]},
    },
    "shrink": {
        "method": "none",
        "normalisation": "shrink",
        "threshold": 4.0,
        "search": {"threshold": [1.0, 2.0, 4.0, 8.0]},
    },
    "views": {"method": "none", "average": 8, "search": {"average": [4, 8, 16]}},
    "shrink_views": {
        "method": "none",
        "normalisation": "shrink",
        "threshold": 4.0,
        "average": 8,
        "search": {"threshold": [1.0, 2.0, 4.0], "average": [8]},
    },
}
MEMO = {"method": "memo", "num_views": 8, "steps": 1, "lr": 1e-3, "trainable": "norm"}
# Training takes longest by far.
SLOW = {
    "memo": MEMO,
    "actmad": {
        "method": "actmad",
        "form": "natural",
        "tolerance": 4.0,
        "steps": 2,
        "lr": 0.01,
        "clip": 1.0,
        "trainable": "norm",
    },
}
QUICK = {
    "views": {"method": "none", "average": 8, "search": {"average": [8]}},
    "memo": MEMO | {"num_views": 4, "search": {"normalisation": ["source"]}},
}


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        backbone: a timm name, or the dotted path of a callable.
        weights: the path of a file, ``timm``, or None for a callable.
        labeled: folder of labeled images, a folder for each class.
        test: folder of shifted images, with class folders or without.
        classes: a file with the names of the classes, in the order of the logits; None: the
            checkpoint tells them.
        image_size: side of the square images, pixels; None: timm's.
        mean: of R, G and B; None: timm's.
        std: of R, G and B; None: timm's.
        flip: whether a mirrored image is still of its class, so that views may be mirrored.
        quick: whether fewer images and settings will do.
    """

    backbone: str
    weights: str | None
    labeled: Path
    test: Path
    classes: Path | None = None
    image_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    flip: bool = False
    quick: bool = False


def request_of(arguments: "Namespace") -> Request | None:
    """Read the request from the options of a command line; None: ``--out`` alone is given.

    Raises:
        UserError: something is missing, or does not go together.
    """
    options = {name: value for name, value in vars(arguments).items() if name not in NO_REQUEST}
    if all(value is None or value is False for value in options.values()):
        return None
    for name in ("network", "labeled", "test"):
        if options[name] is None:
            raise UserError(
                f"--{name}: missing; give --network, --labeled and --test, or --out alone to go on "
                "with an earlier check, whose settings are edited in its params.yaml"
            )
    for name in ("labeled", "test"):
        if not options[name].is_dir():
            raise UserError(f"--{name}: expected a folder, found none at {options[name]}")
    size, classes = options["image_size"], options["classes"]
    if size is not None and size < SMALLEST_SIDE:
        raise UserError(f"--image-size: expected {SMALLEST_SIDE} pixels or more, found {size}")
    backbone, weights = find_network(options.pop("network"), options["backbone"])
    if is_own_module(backbone) and size is None:
        raise UserError(
            f"--image-size: missing; give the side in pixels of the images that {backbone} takes"
        )
    found = {
        "backbone": backbone,
        "weights": weights,
        "labeled": options["labeled"].resolve(),
        "test": options["test"].resolve(),
        "classes": None if classes is None else classes.resolve(),
    }
    return Request(**options | found)


def find_network(network: str, backbone: str | None) -> tuple[str, str | None]:
    """Tell backbone and weights, as params.yaml names them, from ``--network`` and ``--backbone``.

    Raises:
        UserError: there is no such file, or its architecture is not known.
    """
    file = Path(network)
    if network != "timm" and not file.exists():
        if not is_own_module(network) or file.suffix in WEIGHTS:
            raise UserError(
                "--network: expected a file of weights, the dotted path of a callable, or timm, "
                f"found no file at {network}"
            )
        if backbone is not None:
            raise UserError(
                f"--backbone: expected nothing, for {network} is a network of its own, "
                f"found {backbone}; remove it"
            )
        return network, None
    if backbone is None and network != "timm":
        from tttlab.networks.known_classes import read_told  # seconds of imports

        backbone = read_told(file).architecture
    if backbone is None:
        raise UserError(f"--backbone: missing; name the timm architecture of {network}")
    return backbone, network if network == "timm" else str(file.resolve())


def settings(request: Request) -> dict[str, Any]:
    """Make the whole file of settings, as params.yaml has them."""
    quick, views = request.quick, {"min_scale": 0.7, "flip": request.flip, "jitter": 0.2}
    network = {
        "backbone": request.backbone,
        "backbone_options": {},
        "stem": "original",
        "weights": request.weights,
        "objective": {"name": "none"},
        "pretrain": UNTRAINED | {"augment": views},
        "finetune": {
            "mode": "none",
            "classes": None if request.classes is None else str(request.classes),
            "mean": None if request.mean is None else [*request.mean],
            "std": None if request.std is None else [*request.std],
        },
    }
    return {
        "seed": 0,
        "seeds": [0],
        "data": data(request),
        "models": {MODEL: network},
        "source_stats": {"images": 100 if quick else 400, "bank_size": 256},
        "shifts": {
            "clean": "validation",
            "corruptions": [],
            "severities": [3],
            "images": 200 if quick else 1000,
            "sets": {},
        },
        "tune": {
            "enabled": True,
            "severities": [4],
            "images": [8, 24] if quick else [10, 40, 100],
            "candidates": 3 if quick else 8,
            "keep": 0.35,
            "clean_penalty": 1.0,
            "gate": False,
            "search": {
                "steps": [1] if quick else [1, 2],
                "lr": [1e-3, 1e-2] if quick else [1e-3, 1e-2, 1e-1],
                "normalisation": ["source", "shrink"],
            },
        },
        "adapt": {
            "protocol": "episodic",
            "online": {"batch_size": 64, "order": "shuffled", "shifts": "separate"},
            "augment": views,
            "curve": {"images": 0, "severities": [3], "candidates": 0},
            "runs": RUNS | QUICK if quick else RUNS | SLOW,
        },
        "distance": {"images": 100 if quick else 200, "permutations": 99},
        "alignment": {"images": 0},
        # Several processes would each start this command.
        "machine": {"device": "auto", "devices": 1, "workers": 2, "images_per_step": "auto"},
    }


def data(request: Request) -> dict[str, Any]:
    """Make the section of the images: nothing is trained, so half of the labeled ones validate."""
    folder = {"source": "folder", "split": None, "part": [0.0, 1.0], "limit": None}
    labeled = folder | {"root": str(request.labeled)}
    return {
        "image_size": "auto" if request.image_size is None else request.image_size,
        # Nothing is pretrained: the unlabeled images are the labeled ones.
        "duplicates": "allow",
        "unreadable": "error",
        "pack_below": 1024,
        "depth": None,
        "unlabeled": labeled,
        "labeled": labeled | {"validation": 0.5},
        "test": folder | {"root": str(request.test), "labels": "auto"},
    }


def as_text(request: Request, folder: Path) -> str:
    """Write the file of settings for a folder of results."""
    from ruamel.yaml import YAML

    buffer, writer = io.StringIO(), YAML()
    writer.default_flow_style = None
    writer.width = 100
    writer.representer.ignore_aliases = lambda _data: True
    writer.dump(settings(request), buffer)
    values = buffer.getvalue()
    return HEAD.format(folder=shlex.quote(str(folder)), digest=digest_of(values)) + values


def values_of(text: str) -> str:
    """Take the settings out of the text of a file: what stands below the comments of its head."""
    lines = text.splitlines(keepends=True)
    return "".join(dropwhile(lambda line: line.startswith("#"), lines))


def digest_of(values: str) -> str:
    """Hash settings as text."""
    return hashlib.sha256(values.encode()).hexdigest()


def is_edited(text: str) -> bool:
    """Tell whether the settings of a file are no longer those that were written."""
    values = values_of(text)
    return digest_of(values) not in text.removesuffix(values)
