"""Runs tried on their models as these are before any training."""

from collections.abc import Iterable

import torch

from tttlab.config.params import Params
from tttlab.networks import source_statistics
from tttlab.networks.checkpoints import build_network
from tttlab.runtime import devices
from tttlab.seeding import torch_generator
from tttlab.workflow.loading import SourceNetwork, build_run
from tttlab.workflow.sizes import image_size

CLASSES, IMAGES = 10, 16  # what they really are shows when the images are there
SMALL = 64  # pixels


def try_runs(params: Params, model: str, names: Iterable[str]) -> None:
    """Try runs on a model with random weights and random images, smaller than the real ones if they go through.

    Raises:
        UserError: one of the runs cannot be done.
    """
    full = image_size(params)
    if full > SMALL:
        try:
            return try_at(params, model, names, SMALL)
        except Exception:  # the size may be to blame, so that no message counts
            pass
    return try_at(params, model, names, full)


def try_at(params: Params, model: str, names: Iterable[str], size: int) -> None:
    """Try runs with images of ``size`` pixels."""
    source = build_untrained(params, model, size)
    for name in names:
        build_run(params, name, model, source, {})


def build_untrained(params: Params, model: str, size: int) -> SourceNetwork:
    """Build a model for images of ``size`` pixels with random weights, and measure it on random images."""
    settings = params.models[model].model_dump(mode="json")
    settings |= {"weights": None, "probe": settings["finetune"]["probe"]}
    device = devices.choose_device(params.machine.device, params.machine.precision)
    network, _ = build_network(settings, CLASSES, size, seed=params.seed)
    network.to(device)
    batches = [
        torch.rand(IMAGES, 3, size, size, generator=torch_generator(params.seed, "untrained")).to(
            device
        )
    ]
    statistics = source_statistics.layer_statistics(network, batches)
    if hasattr(network.head, "project"):
        statistics |= source_statistics.projection_bank(
            network, batches, params.source_stats.bank_size
        )
    return SourceNetwork(network, {"image_size": size}, statistics, device, lambda: batches)
