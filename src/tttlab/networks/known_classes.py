"""The classes that a trained network knows, and their order beside that of the labeled images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tttlab.config.names import nfc
from tttlab.errors import UserError, choices

# Under these names a checkpoint may tell its classes; timm writes the last one.
NAMES = ("classes", "class_names", "label_names")
SIDECAR = "config.json"  # of timm, beside weights that it has saved for a hub


class Told(NamedTuple):
    """What a checkpoint tells of itself beside its weights.

    Attributes:
        classes: in the order of its logits; None: it does not tell.
        config: timm's ``pretrained_cfg``, with mean and deviation of its images; often empty.
        architecture: its timm name; None: it does not tell.
    """

    classes: tuple[str, ...] | None
    config: Mapping[str, Any]
    architecture: str | None = None


def read_told(path: Path) -> Told:
    """Read what a checkpoint tells of itself, without its weights.

    Its classes are looked for under `NAMES`: in the metadata of a ``.safetensors`` file, as JSON;
    beside the weights in a file from ``torch.save``; in timm's ``config.json`` in the same folder.
    """
    beside = _read_json(path.with_name(SIDECAR))
    config = beside.get("pretrained_cfg")
    config = config if isinstance(config, dict) else {}
    architecture = beside.get("architecture")
    for told in (_metadata(path), beside, config):
        for name in NAMES:
            classes = told.get(name)
            if isinstance(classes, list | tuple) and all(isinstance(c, str) for c in classes):
                return Told(tuple(map(nfc, classes)), config, architecture)
    return Told(None, config, architecture)


def _metadata(path: Path) -> dict[str, Any]:
    """Read what stands beside the tensors of a file; {} if nothing can be read."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                texts = file.metadata() or {}
            return {name: json.loads(texts[name]) for name in NAMES if name in texts}
        import torch  # seconds, and few models are files of others

        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever torch raises; reading the weights tells what is wrong with them
        return {}
    return content if isinstance(content, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def told_classes(weights: str | None) -> tuple[str, ...] | None:
    """Give the classes that a model's weights tell, as params.yaml names these; None: none."""
    return None if weights in (None, "timm") else read_told(Path(weights)).classes


def class_list(settings: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Give a network's classes in the order of its logits: the settings', or the checkpoint's.

    Args:
        settings: a model's section of params.yaml, with ``weights`` and ``finetune``.
        key: its key, for messages.

    Raises:
        UserError: neither tells them.
    """
    if settings["finetune"]["classes"]:
        return tuple(settings["finetune"]["classes"])
    classes = told_classes(settings["weights"])
    if classes is None:
        raise UserError(
            f"{key}.finetune.classes: missing, and the checkpoint does not tell its classes; give "
            "their names in the order of the logits, as a list or as the path of a text file with "
            "one in every line"
        )
    return classes


def order_of(classes: Sequence[str], labeled: Sequence[str], key: str) -> list[int]:
    """Order a network's logits by the labeled images' classes, then by its other classes.

    So a label is the number of its logit, whatever else the network knows.

    Args:
        classes: the network's, in the order of its logits.
        labeled: the names of the labeled images' folders, in the order of their labels.
        key: the model's key in params.yaml, for messages.

    Returns:
        for every logit of the new order its number in the old one.

    Raises:
        UserError: a folder is none of the network's classes.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    for name in labeled:
        if name not in numbers:
            allowed = choices(name, classes)
            allowed = allowed if len(allowed) <= 300 else f"{allowed[:300]}…"
            raise UserError(
                f"data.labeled: class {name!r} is none of the {len(classes)} classes of {key}; "
                f"{allowed}; rename the folder, or correct {key}.finetune.classes"
            )
    first = dict.fromkeys(numbers[name] for name in labeled)
    return [*first, *(number for number in range(len(classes)) if number not in first)]
