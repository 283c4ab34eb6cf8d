"""Do the test-time loss and the supervised loss pull the shared parameters in the same direction?

A step on one loss lowers another to first order exactly where their gradients have a positive inner product; Sun et al. (ICML
2020, arXiv 1909.13231, theorem 1 and figure 4) explain by it when test-time training helps. The supervised loss needs the
label, so this is analysis after the fact and never part of adapting.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.adaptation.inner_loop import (
    InnerLoop,
    Parameters,
    gradients_of,
    over_images,
    select_parameters,
)
from tttlab.adaptation.method import Method
from tttlab.adaptation.normalisation import normalised
from tttlab.networks.classifiers import as_network
from tttlab.networks.gradients import norms
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import Statistics
from tttlab.runtime.group_size import GroupSize, Wish, as_sizes, in_groups
from tttlab.seeding import torch_generator

LARGEST = 32  # images at once


class Alignment(NamedTuple):
    """Of N images, on the CPU.

    ``cosine (N,)`` of the angle between the gradients of the two losses, not a number where one of them is zero;
    ``inner (N,)``, their inner product: the first-order decrease of the supervised loss per unit of learning rate;
    ``supervised_loss (N,)``.
    """

    cosine: Tensor
    inner: Tensor
    supervised_loss: Tensor


def gradient_alignment(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    method: Method,
    loop: InnerLoop,
    *,
    statistics: Statistics,
    image_ids: Sequence[str],
    seed: int,
    images_per_step: Wish | GroupSize = "auto",
) -> Alignment:
    """Compare the gradients of a method's loss and of the cross-entropy at the source weights, image by image.

    Args:
        network: a `Network`, or any module from images to logits.
        images: ``(N, 3, H, W)``, as `tttlab.adaptation.adapter.adapt` takes them.
        labels: ``(N,)``.
        method: the test-time method.
        loop: which parameters are shared (``trainable``), and the normalisation policy.
        statistics: source statistics.
        image_ids: names of the images, so that the method sees the views of its first step.
        seed: of all random streams.
        images_per_step: images at once; changes no result.
    """
    network = as_network(network)
    statistics = {name: value.to(images.device) for name, value in statistics.items()}
    shared = select_parameters(network, loop.trainable)
    net = Bound(network, {name: value.detach() for name, value in shared.items()})

    def test_time(own: Parameters, views: Any) -> Tensor:
        return method.loss(net.rebound(own), views, statistics, method.init_state())[0]

    def supervised(own: Parameters, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(net.rebound(own)(image.unsqueeze(0)).logits[0], label)

    def compare(part: slice) -> Alignment:
        streams = [torch_generator(seed, "views", name, 0) for name in image_ids[part]]
        own = {
            name: value.detach().expand(len(streams), *value.shape).requires_grad_()
            for name, value in shared.items()
        }
        views = method.views(network, images[part], streams)
        first = gradients_of(over_images(test_time)(own, views), own, method)
        losses = over_images(supervised)(own, images[part], labels[part].to(images.device))
        second = gradients_of(losses, own, method)
        inner = sum(
            ((first[name] * second[name]).flatten(1).sum(1) for name in first if name in second),
            0 * losses.detach(),
        )
        lengths = norms(first.values()) * norms(second.values())
        return Alignment(
            torch.where(lengths > 0, inner / lengths, torch.nan), inner, losses.detach()
        )

    sizes = as_sizes(images_per_step, largest=LARGEST, timed=False)
    with evaluating(network), normalised(network, loop.normalisation, statistics):
        parts = list(in_groups(compare, len(images), images.device, sizes))
    return Alignment(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))
