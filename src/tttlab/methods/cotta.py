"""CoTTA: learn from a slowly moving teacher that looks at many views where the source is unsure, and forget a little.

Wang et al., CVPR 2022, arXiv 2203.13591: the student is trained by cross-entropy against the prediction of a teacher, whose
weights are an exponential moving average of the student's. Where the source network (the anchor) is less confident than a
threshold, mean over a batch, the teacher's prediction is the average over augmented views. After every step each weight of the
student goes back to its source value with a small probability. Nothing is needed of the source domain beyond its weights; the
paper's threshold is the 5 % quantile of the source network's confidence on source images, less a margin. In params.yaml the
rest is the adapter's: ``trainable: all``, ``normalisation: image``, one step of Adam with lr 1e-3 on batches of 200 (CIFAR).

As in the published code, the average is one of logits, every set of views is normalised as a batch of its own, and the teacher
moves before the student forgets. What differs: the published views are stronger (colours, rotation, blur, noise); the published
prediction is the one that the student was trained on, that of the teacher before the step, averaged or not, while ours is the
teacher's after the step, of the plain images; the published code for ImageNet-C makes the cross-entropy symmetric.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.data.views import Augmentation, random_views
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


@dataclass(frozen=True)
class CoTTA(Method):
    """Follow an averaged teacher, and restore weights at random.

    Attributes:
        num_views: V, views that the teacher's prediction is averaged over where the anchor is unsure.
        confidence: the anchor's mean confidence below which it is; 0: never average.
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
        return images.unsqueeze(1), random_views(
            images, generators, self.num_views, self.augmentation
        )

    def loss(
        self, net: Bound, views: tuple[Tensor, Tensor], statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Cross-entropy of the student against the teacher, mean over images ``(N, 3, H, W)`` with views ``(N·V, 3, H, W)``."""
        images, augmented = views
        with torch.no_grad():
            anchor, teacher = net.module, teacher_of(net, state)
            if mean_confidence(anchor(images).logits) < self.confidence:
                # One view of every image at a time: a batch like the plain one, for its statistics and for the memory.
                sets = augmented.unflatten(0, (len(images), self.num_views)).unbind(1)
                target = torch.stack([teacher(part).logits for part in sets]).mean(0)
            else:
                target = teacher(images).logits
        return -(target.softmax(-1) * net(images).logits.log_softmax(-1)).sum(-1).mean(), state

    def after_step(
        self,
        parameters: dict[str, Tensor],
        source: dict[str, Tensor],
        state: State,
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], State]:
        """Move the teacher towards the student, then restore a random share of the student's weights."""
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
    """Bind the network to the teacher's weights; before the first step these are the source network's."""
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
    """Set every number of the parameters to its source value with a probability, each on its own."""
    masks = {
        name: torch.rand(value.shape, generator=generator) < probability
        for name, value in source.items()
    }
    return {
        name: torch.where(mask.to(source[name].device), source[name], parameters[name])
        for name, mask in masks.items()
    }
