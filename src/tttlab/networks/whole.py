"""Networks that are kept as they are, with their own classifier: timm's, or any other module.

A whole network is a `Classifier` that takes images in [0, 1]. Its first logits are those of the
labeled images' classes, in the order of their labels; the classes that it knows besides come after.
"""

import copy
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from tttlab.config.values import is_own_module
from tttlab.errors import UserError
from tttlab.networks.building import build_encoder, pretrained_config
from tttlab.networks.classifiers import Classifier, as_network
from tttlab.networks.files import fill, read_weights
from tttlab.networks.known_classes import read_told
from tttlab.networks.network import evaluating

Scale = tuple[Sequence[float], Sequence[float]]  # mean and deviation of R, G and B


def build_whole(
    settings: Mapping[str, Any], image_size: int, num_classes: int | None = None
) -> Classifier:
    """Create a network with its own classifier, in evaluation mode, its logits as they come.

    Args:
        settings: ``backbone``: a timm name, or the dotted path of a callable that returns a module
            from images to logits, or a `Classifier`. Optionally ``backbone_options`` (of timm, or
            arguments of the callable), ``stem``, ``weights`` (None, the path of a file, or
            ``timm``), ``mean`` and ``std``.
        image_size: side of the square images, pixels.
        num_classes: K of a timm model without weights, as one of our checkpoints rebuilds it.

    Raises:
        UserError: the network cannot be built, has no classifier, or its weights do not fit.
    """
    backbone, weights = settings["backbone"], settings.get("weights")
    path = Path(weights) if weights not in (None, "timm") else None
    state = read_weights(path) if path else None
    if is_own_module(backbone):
        model = call_own(backbone, settings.get("backbone_options") or {})
    else:
        if state is not None:
            num_classes = count_classes(backbone, state, path)
        model = build_encoder(
            backbone,
            image_size,
            stem=settings.get("stem", "original"),
            options=settings.get("backbone_options"),
            pretrained=weights == "timm",
            num_classes=None if weights == "timm" else num_classes,
        )
    network = as_network(model)
    if not isinstance(network, Classifier):
        raise UserError(
            f"models: backbone {backbone}: expected a module from images to logits, "
            f"found a {type(model).__name__}; return the module alone"
        )
    if state is not None:
        fill(network.encoder, state, path)
    scale = find_scale(settings, network.encoder, read_told(path).config if path else {})
    if scale:
        network.standardise(*scale)
    return network.eval()


def count_classes(backbone: str, state: Mapping[str, Tensor], path: Path) -> int:
    """Count the classes of the classifier in a timm model's state dict.

    Raises:
        UserError: it has no classifier.
    """
    config = pretrained_config(backbone) if timm.is_model(backbone.split(".")[0]) else None
    names = (config and config.classifier) or ("fc", "classifier", "head", "head.fc")
    names = (names,) if isinstance(names, str) else names
    for name in names:
        if f"{name}.weight" in state:
            return len(state[f"{name}.weight"])
    raise UserError(
        f"{path}: expected the weights of a {backbone} with its classifier "
        f"({names[0]}.weight), found none; set finetune.mode: linear, which fits one to this "
        "encoder"
    )


def call_own(path: str, options: Mapping[str, Any]) -> nn.Module:
    """Call a function or class of the user's own that returns the network.

    Raises:
        UserError: there is no such callable, it fails, or it returns no module.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        model = copy.deepcopy(found) if isinstance(found, nn.Module) else found(**options)
    except UserError:
        raise
    except Exception as error:  # the user's own code may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"models: backbone {path}: expected a callable that returns a torch.nn.Module, "
            f"found {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f"models: backbone {path}: expected it to return a torch.nn.Module, "
            f"found {type(model).__name__}"
        )
    return model


def find_scale(
    settings: Mapping[str, Any], model: nn.Module, told: Mapping[str, Any]
) -> Scale | None:
    """Find mean and deviation of the images: the settings', the checkpoint's, or timm's.

    Args:
        settings: optionally with ``mean`` and ``std``.
        model: the network.
        told: the checkpoint's own configuration, see `read_told`.

    Returns:
        None where nobody tells any: the network sees images in [0, 1].
    """
    if settings.get("mean"):
        return settings["mean"], settings["std"]
    if {"mean", "std"} <= told.keys():
        return told["mean"], told["std"]
    if not getattr(model, "pretrained_cfg", None):
        return None
    known = resolve_data_config({}, model=model)
    return known["mean"], known["std"]


def count_logits(network: Classifier, image_size: int, key: str) -> int:
    """Run a whole network on two random images, and count its logits.

    Args:
        network: from `build_whole`.
        image_size: side of the square images, pixels.
        key: the model's key in params.yaml, for messages.

    Raises:
        UserError: it fails.
    """
    parameter = next(network.parameters(), None)
    if parameter is None:
        raise UserError(
            f"{key}.backbone: expected a network with parameters, found none in "
            f"{type(network.encoder).__name__}"
        )
    if parameter.dtype != torch.float32:
        raise UserError(
            f"{key}.backbone: expected parameters of torch.float32, found {parameter.dtype}; "
            "make the network float()"
        )
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    try:
        with evaluating(network), torch.no_grad():
            return network(images.to(parameter)).logits.shape[1]
    except UserError as error:
        raise UserError(f"{key}.backbone: {error}") from error
    except Exception as error:  # the user's own code may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{key}.backbone: expected a network that takes images (N, 3, {image_size}, "
            f"{image_size}), found {type(error).__name__}: {reason}"
        ) from error


def tell_wrong_count(logits: int, classes: Sequence[str], key: str) -> str | None:
    """Say that a network has not as many logits as classes; None: it has."""
    if logits == len(classes):
        return None
    return (
        f"{key}.finetune.classes: expected {logits} names, one for every logit of the network, "
        f"found {len(classes)}"
    )
