"""CoTTA: learn from a slow teacher, averaged over views if the source is unsure; forget a little.

Wang et al., CVPR 2022, arXiv 2203.13591: the student is trained by cross-entropy against the
prediction of a teacher, whose weights are an exponential moving average of the student's. If the
source network (the anchor) has a mean confidence on the batch below a threshold, the teacher's
prediction is the average over augmented views. After every step each weight of the student goes
back to its source value with a small probability. Nothing is needed of the source domain beyond the
source weights; the paper's threshold is the 5 % quantile of the source network's confidence on
source images, less a margin.

In params.yaml the rest is the adapter's: ``trainable: all``, ``normalisation: image``, one step of
Adam with lr 1e-3 on batches of 200 (CIFAR).

As in the published code, the average is one of logits, every set of views is normalised as a batch
of its own, and the teacher moves before the student forgets.

What differs: the published views are stronger (colours, rotation, blur, noise). The published
prediction is the target that the student was trained on: the teacher's before the step, averaged or
not. Ours is the teacher's after the step, on the un-augmented images. The published code for
ImageNet-C makes the cross-entropy symmetric.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.adaptation.method import Method, State
from tttlab.config.inner_loop import Augmentation
from tttlab.data.views import random_views
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


@dataclass(frozen=True)
class CoTTA(Method):
    """Follow an averaged teacher, and restore weights at random.

    Attributes:
        num_views: V, views over which the teacher's prediction is averaged.
        confidence: average if the anchor's mean confidence is below; 0: never.
        restore: probability that a weight goes back to its source value after a step.
        teacher_momentum: share of the old teacher in the new one.
    """

    protocols = ("online",)
    whole_batch = True
    num_views: Annotated[int, Ge(1)] = 32
    confidence: Annotated[float, Ge(0), Le(1)] = 0.92
    restore: Annotated[float, Ge(0), Le(1)] = 0.01
    teacher_momentum: Annotated[float, Ge(0), Lt(1)] = 0.999
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Give the images ``(B, 1, 3, H, W)`` and fresh views of them ``(B, V, 3, H, W)``."""
        augmented = random_views(images, generators, self.num_views, self.augmentation)
        return images.unsqueeze(1), augmented

    def loss(
        self, net: Bound, views: tuple[Tensor, Tensor], statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Cross-entropy of the student against the teacher, mean over images.

        The views are images ``(N, 3, H, W)`` and augmented ones ``(N·V, 3, H, W)``.
        """
        images, augmented = views
        with torch.no_grad():
            anchor, teacher = net.module, teacher_of(net, state)
            if mean_confidence(anchor(images).logits) < self.confidence:
                # One view of every image at a time: a batch as large as the un-augmented one, with
                # batch statistics of its own.
                sets = augmented.unflatten(0, (len(images), self.num_views)).unbind(1)
                target = torch.stack([teacher(batch).logits for batch in sets]).mean(0)
            else:
                target = teacher(images).logits
        return F.cross_entropy(net(images).logits, target.softmax(-1)), state

    def after_step(
        self,
        parameters: dict[str, Tensor],
        source: dict[str, Tensor],
        state: State,
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], State]:
        """Move the teacher towards the student, then restore some of the student's weights."""
        teacher = {
            name: torch.lerp(value, parameters[name], 1 - self.teacher_momentum)
            for name, value in (state or source).items()
        }
        return restored(parameters, source, self.restore, generator), teacher

    def predict_batch(
        self, net: Bound, images: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Classify with the teacher."""
        return teacher_of(net, state)(images).logits, state


def teacher_of(net: Bound, state: State) -> Bound | nn.Module:
    """Bind the network to the teacher's weights, before the first step the source weights."""
    return net.rebound(state) if state else net.module


def mean_confidence(logits: Tensor) -> Tensor:
    """Average the probabilities of the likeliest classes over a batch of ``logits (N, K)``."""
    return logits.softmax(-1).amax(-1).mean()


def restored(
    parameters: dict[str, Tensor],
    source: dict[str, Tensor],
    probability: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Set each element of the parameters to its source value, independently, with a probability."""
    masks = {
        name: torch.rand(value.shape, generator=generator) < probability
        for name, value in source.items()
    }
    return {
        name: torch.where(mask.to(source[name].device), source[name], parameters[name])
        for name, mask in masks.items()
    }
