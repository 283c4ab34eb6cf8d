"""The trial of runs on untrained models."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tttlab.config.models import Model
from tttlab.config.params import Params
from tttlab.errors import UserError
from tttlab.networks import source_statistics
from tttlab.networks.checkpoints import build_network
from tttlab.networks.classifiers import Classifier
from tttlab.networks.known_classes import class_list
from tttlab.networks.taps import batch_norm_layers
from tttlab.networks.whole import build_whole, count_logits, tell_wrong_count
from tttlab.runtime import devices
from tttlab.seeding import torch_generator
from tttlab.workflow.loading import SourceNetwork, build_run
from tttlab.workflow.sizes import image_size

CLASSES, IMAGES = 10, 16  # arbitrary: the true numbers are unknown before `prepare`
SMALL = 64  # pixels, the side of the images of a first trial


def try_runs(params: Params, model: str, names: Iterable[str]) -> None:
    """Try runs on a model with random weights and random images.

    Small images are tried first. If they fail, images of the true size decide. At last the network
    that training will begin with is built: at its true size, and with its weights.

    Raises:
        UserError: one of the runs does not work, or the network cannot be built.
    """
    full = image_size(params)
    try:
        try_at(params, model, names, min(full, SMALL))
    except Exception:
        if full <= SMALL:
            raise
        try_at(params, model, names, full)  # perhaps it was because of the size
    if not params.models[model].whole:
        network, _ = build_network(network_settings(params, model), CLASSES, full, params.seed)
        check_statistics(params.models[model], network, f"models.{model}")


def check_statistics(model: Model, network: nn.Module, key: str) -> None:
    """Refuse meta-learned fine-tuning of BatchNorm without statistics, which it would never set.

    Args:
        model: its settings.
        network: what training begins with.
        key: of the settings.

    Raises:
        UserError: no statistics are set before the first step.
    """
    if model.finetune.mode != "meta" or model.pretrain.epochs or model.finetune.inner.after:
        return
    for name in batch_norm_layers(network):
        layer = network.get_submodule(name)
        if layer.track_running_stats and not layer.running_mean.any():
            raise UserError(
                f"{key}.finetune.mode: meta does not change the statistics of BatchNorm, and "
                f"{name} has none; expected a pretrained network, finetune.inner.after (epochs "
                "before the step), or a norm_layer that needs none, such as groupnorm1"
            )


def try_at(params: Params, model: str, names: Iterable[str], size: int) -> None:
    """Try runs with images of ``size`` pixels, and every value that tuning may choose for them."""
    source = build_untrained(params, model, size)
    for name in names:
        build_run(params, name, model, source, {})
        for key, values in params.run_settings(name, model).decisive_search.items():
            for value in values:
                try:
                    build_run(params, name, model, source, {key: value})
                except UserError as error:
                    raise UserError(f"{error} (search: {key}: {value})") from error


def network_settings(params: Params, model: str) -> dict[str, Any]:
    """Give the settings that a model's network is built from."""
    settings = params.models[model].model_dump(mode="json")
    return settings | {"probe": settings["finetune"]["probe"]}


def build_untrained(params: Params, model: str, size: int) -> SourceNetwork:
    """Build a model with random weights for images of ``size`` pixels, with random statistics.

    A network that is kept whole has its own weights, which are there already.
    """
    device = devices.choose_device(params.machine.device, params.machine.precision)
    if params.models[model].whole:
        network = build_checked(params, model, size)
    else:
        settings = network_settings(params, model) | {"weights": None}
        network, _ = build_network(settings, CLASSES, size, seed=params.seed)
    network.to(device)
    generator = torch_generator(params.seed, "untrained")
    batches = [torch.rand(IMAGES, 3, size, size, generator=generator).to(device)]
    statistics = source_statistics.layer_statistics(network, batches)
    if hasattr(getattr(network, "head", None), "project"):
        statistics |= source_statistics.projection_bank(
            network, batches, params.source_stats.bank_size
        )
    return SourceNetwork(network, {"image_size": size}, statistics, device, lambda: batches)


def build_checked(params: Params, model: str, size: int) -> Classifier:
    """Build a network that is kept whole, with its weights, and compare its logits and classes.

    Raises:
        UserError: it cannot be built, or its classes are unknown, too many or too few.
    """
    section, key = params.models[model].model_dump(mode="json"), f"models.{model}"
    classes = class_list(section, key)
    scale = {name: section["finetune"][name] for name in ("mean", "std")}
    network = build_whole(section | scale, size)
    if wrong := tell_wrong_count(count_logits(network, size, key), classes, key):
        raise UserError(wrong)
    return network
