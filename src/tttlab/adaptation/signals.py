"""Signals of a test image, measured before adaptation and without its label.

A gate reads one of them to decide whether to adapt; the analysis relates them to the gain.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tttlab.adaptation.inner_loop import over_images
from tttlab.adaptation.method import first_state
from tttlab.adaptation.normalisation import normalised
from tttlab.adaptation.task import Task
from tttlab.adaptation.trainable import bind
from tttlab.errors import UserError
from tttlab.networks.natural_units import natural_distance, varies
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics
from tttlab.networks.taps import (
    Moments,
    batch_moments,
    batch_norm_layers,
    record,
    token_layers,
    variance_floor,
)
from tttlab.runtime.group_size import FORWARD_LARGEST, GroupSize, Wish, as_sizes, in_groups
from tttlab.seeding import torch_generator

Signal = Literal["confidence", "distance", "loss"]


@torch.no_grad()
def logits_and_distance(
    network: nn.Module | Bound, images: Tensor, statistics: Statistics
) -> tuple[Tensor, Tensor]:
    """Classify images and measure their distance to the source, in one forward pass.

    Args:
        network: the source network, in evaluation mode, or bound to an image's parameters.
        images: ``(N, 3, H, W)``.
        statistics: source statistics of the network's layers.

    Returns:
        logits ``(N, K)`` and distance to the source ``(N,)``, about 1 for source images. The
        distance is a mean over layers and over their channels' means and log-variances: of the
        squared deviation from the typical source image, divided by its variance over source images.

    Raises:
        UserError: the statistics lack a layer.
    """
    module = network.module if isinstance(network, Bound) else network
    batch_norms = batch_norm_layers(module)
    layers = [f"{name}.input" for name in batch_norms] if batch_norms else token_layers(module)
    if missing := [layer for layer in layers if f"{layer}.mean_center" not in statistics]:
        raise UserError(
            f"the distance to the source needs source statistics of {len(missing)} layers that "
            f"have none, such as {missing[0]}; see "
            "tttlab.networks.source_statistics.layer_statistics"
        )

    def keep(layer: str, activation: Tensor) -> Moments:
        return batch_moments(activation, variance_floor(module, layer), len(images))

    with record(module, layers, keep) as moments:
        logits = network(images).logits
    squares = [
        squared_deviation(moment, statistics, f"{layer}.{name}")
        for layer in layers
        for name, moment in zip(Moments._fields, moments[layer], strict=True)
    ]
    return logits, torch.stack(squares).mean(0)


def squared_deviation(moment: Tensor, statistics: Statistics, name: str) -> Tensor:
    """Mean squared deviation ``(N,)`` of a moment ``(N, C)`` over channels.

    The unit is the channel's variance over source images. Channels that never vary are left out.
    """
    center, scale = statistics[f"{name}_center"], statistics[f"{name}_scale"]
    if not varies(scale).any():
        return moment.new_ones(len(moment))
    return natural_distance(moment - center, scale)


@torch.no_grad()
def first_loss(task: Task, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Compute the loss ``(N,)`` of every image before the first step, on that step's views.

    Args:
        task: from `Task.ready`.
        images: ``(N, 3, H, W)``.
        generators: the random streams of the images' views.
    """
    net, method = bind(task.network, task.method, task.loop), task.method
    state = first_state(method, images.device)

    def loss(views: Tensor) -> Tensor:
        return method.loss(net, views, task.statistics, state)[0]

    with normalised(task.network, task.loop, task.statistics):
        return over_images(loss)(method.views(task.network, images, generators))


@torch.no_grad()
def measure_signal(
    signal: Signal,
    task: Task,
    images: Tensor,
    image_ids: Sequence[str],
    images_per_step: Wish | GroupSize = "auto",
) -> tuple[Tensor, Tensor]:
    """Measure one signal of images.

    Args:
        signal: name of the signal.
        task: the source network, in evaluation mode, and the method that gives the ``loss``.
        images: ``(N, 3, H, W)``, as `tttlab.adaptation.adapter.adapt` takes them.
        image_ids: names of the images, which key their random streams.
        images_per_step: images in a group, a machine setting; a `GroupSize` keeps what it has
            learnt from one call to the next.

    Returns:
        logits of the source network ``(N, K)``, and the signal ``(N,)``.
    """
    task = task.ready(images.device)
    sizes = as_sizes(images_per_step, largest=FORWARD_LARGEST, timed=False)

    def look(part: slice) -> tuple[Tensor, Tensor]:
        group = images[part]
        if signal == "distance":
            return logits_and_distance(task.network, group, task.statistics)
        logits = task.network(group).logits
        if signal == "confidence":
            return logits, logits.softmax(-1).amax(-1)
        streams = [torch_generator(task.seed, "views", name, 0) for name in image_ids[part]]
        return logits, first_loss(task, group, streams)

    logits, values = zip(*in_groups(look, len(images), images.device, sizes), strict=True)
    return torch.cat(logits), torch.cat(values)
