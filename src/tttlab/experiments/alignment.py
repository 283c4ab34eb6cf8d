"""The agreement of the gradients of the test-time loss and of the supervised loss.

A step on one loss lowers another to first order exactly if their gradients have a positive inner
product. Sun et al. (ICML 2020, arXiv 1909.13231, theorem 1 and figure 4) explain by it when
test-time training helps. The supervised loss needs the labels: this is analysis after the fact and
never part of adapting.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tttlab.adaptation.inner_loop import Parameters, gradients_of, over_images
from tttlab.adaptation.method import first_state
from tttlab.adaptation.normalisation import normalised
from tttlab.adaptation.task import Task
from tttlab.adaptation.trainable import select_parameters
from tttlab.networks.gradients import as_rows, norms, present_gradients, with_gradients
from tttlab.networks.network import Bound, evaluating
from tttlab.runtime.group_size import GroupSize, Wish, as_sizes, in_groups
from tttlab.seeding import torch_generator

LARGEST = 32  # images at once


class Alignment(NamedTuple):
    """The agreement of the two gradients for N images, on the CPU.

    Attributes:
        cosine: ``(N,)`` of the angle between the gradients by all trainable parameters; one that a
            loss does not depend on counts as zero there. Not a number if a gradient is zero.
        inner: ``(N,)`` their inner product, which is the first-order decrease of the supervised
            loss per unit of learning rate.
        supervised_loss: ``(N,)``.
    """

    cosine: Tensor
    inner: Tensor
    supervised_loss: Tensor


@with_gradients
def gradient_alignment(
    task: Task,
    images: Tensor,
    labels: Tensor,
    image_ids: Sequence[str],
    images_per_step: Wish | GroupSize = "auto",
) -> Alignment:
    """Compare, image by image, the gradients of a method's loss and of the cross-entropy.

    Both are taken at the source weights.

    Args:
        task: the source network and the method. Of its loop only ``trainable``, which selects
            the parameters, and the normalisation policy are used.
        images: ``(N, 3, H, W)``, as `tttlab.adaptation.adapter.adapt` takes them.
        labels: ``(N,)``.
        image_ids: names of the images; they determine the views, which are those of a first step.
        images_per_step: images at once; changes no result.
    """
    task = task.ready(images.device)
    network, method, loop, statistics = task.network, task.method, task.loop, task.statistics
    shared = select_parameters(network, loop.trainable)
    net = Bound(network, {name: value.detach() for name, value in shared.items()})

    state = first_state(method, images.device)

    def test_time(parameters: Parameters, views: Any) -> Tensor:
        return method.loss(net.rebound(parameters), views, statistics, state)[0]

    def supervised(parameters: Parameters, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(net.rebound(parameters)(image.unsqueeze(0)).logits[0], label)

    def compare(part: slice) -> Alignment:
        streams = [torch_generator(task.seed, "views", name, 0) for name in image_ids[part]]
        stacked = {
            name: value.detach().expand(len(streams), *value.shape).requires_grad_()
            for name, value in shared.items()
        }
        views = method.views(network, images[part], streams)
        first = gradients_of(over_images(test_time)(stacked, views), stacked, method)
        losses = over_images(supervised)(stacked, images[part], labels[part].to(images.device))
        second = present_gradients(losses, stacked)
        products = (first[name] * second[name] for name in first if name in second)
        inner = sum((as_rows(product).sum(1) for product in products), 0 * losses.detach())
        # The labels' loss may depend on nothing that is trained: a self-supervised head, say.
        lengths = norms(first.values()) * norms(second.values()) if second else 0 * inner
        cosine = torch.where(lengths > 0, inner / lengths, torch.nan)
        return Alignment(cosine, inner, losses.detach())

    sizes = as_sizes(images_per_step, largest=LARGEST, timed=False)
    with evaluating(network), normalised(network, loop, statistics):
        parts = list(in_groups(compare, len(images), images.device, sizes))
    return Alignment(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))
