"""TTT++: contrast the views of a batch's images, and keep the features' first two moments where the source domain has them.

Liu et al., NeurIPS 2021 (When Does Self-Supervised Test-Time Training Fail or Thrive?). The loss is NT-Xent, the other images
of the batch being the negatives, and at two places, the encoder's features and the projections, the distance of mean and
covariance, Σ, to the source domain's, D being the width:

    s·(‖Σ_s − Σ_t‖²/(4·D²))/c + ½·s·(‖μ_s − μ_t‖²/D)/m

c and m are what a mini-batch of *source* images scores on average against all of them, so that the terms of a batch without
any shift come to about s and s/2. A batch alone would estimate the covariance poorly: its moments are taken together with the
features, without gradient, of the images that came before. Contrast sees augmented views, alignment the images themselves.
Needs a SimCLR head and source images.

In params.yaml the rest is the adapter's: ``trainable: encoder``, ``normalisation: image``, SGD with momentum 0.9, batches of
256; CIFAR-10: lr 1e-2; CIFAR-100: lr 1e-4, scales 5 and 20, queue 2048.

What differs from the published code: it goes over the test images up to 500 times (twice only for BatchNorm's statistics, and
aligning from the fourth time on), halves its learning rate and stops by the *test error*, and predicts with BatchNorm's moving
averages; ours passes once, never sees a label, and leaves normalisation to the adapter's policy. It aligns each batch on its
own until the queue is full, ours with whatever the queue holds already, which is a better estimate from the second batch on.
Its c and m are distances to the first source batch, which it leaves out of everything else, ours to the moments of all source
images, of which none is left out: by that alone they are about half of its, and equal scales weigh about twice. It crops and
mirrors the source images at random, ours are as they are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.data.views import Augmentation, random_views
from tttlab.errors import UserError
from tttlab.networks.classifiers import as_network
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import LARGEST, Statistics, random_parts
from tttlab.objectives.simclr import nt_xent
from tttlab.runtime.group_size import GroupSize, through

PLACES = ("features", "projections")
NAMES = ("mean", "covariance", "noise_mean", "noise_covariance")


class Seen(NamedTuple):
    """What is remembered of images, in order of arrival: rows of features and projections next to each other.

    ``queue (M, D + P)`` of earlier batches; ``batch (N, D + P)`` of the present one at its latest step: however many steps it
    takes, an image joins the queue once.
    """

    queue: Tensor
    batch: Tensor


@dataclass(frozen=True)
class TTTPlusPlus(Method):
    """Contrast views within the batch, and align moments with the source domain.

    Attributes:
        temperature: τ of NT-Xent.
        scale_features: s of the encoder's features; 0: they are not aligned.
        scale_projections: s of the projections; 0: they are not aligned.
        queue_size: images whose moments are taken: those of the batch, all of them, and the latest before it; source
            mini-batches have as many, or half the source images if these are fewer than two such.
    """

    protocols = ("online",)
    whole_batch = True
    head = "simclr"
    needs = ("alignment",)
    temperature: Annotated[float, Gt(0)] = 0.5
    scale_features: Annotated[float, Ge(0)] = 0.05
    scale_projections: Annotated[float, Ge(0)] = 0.2
    queue_size: Annotated[int, Ge(2)] = 1536
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    @torch.no_grad()
    def source_statistics(self, network: nn.Module, batches: Iterable[Tensor]) -> Statistics:
        """Summarise both places over source images: ``alignment.<place>.`` and one of `NAMES`."""
        network = as_network(network)

        def look(images: Tensor) -> tuple[Tensor, ...]:
            outputs = network(images)
            return tuple(getattr(outputs, place) for place in PLACES)

        with evaluating(network):
            rows = list(through(look, batches, GroupSize(largest=LARGEST, timed=False)))
        statistics: Statistics = {}
        for place, parts in zip(PLACES, zip(*rows, strict=True), strict=True):
            found = summarise(torch.cat(parts), self.queue_size)
            statistics |= {
                f"alignment.{place}.{name}": value for name, value in zip(NAMES, found, strict=True)
            }
        return statistics

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Give the images themselves ``(B, 1, 3, H, W)``, and two fresh views of each ``(B, 2, 3, H, W)``."""
        return images.unsqueeze(1), random_views(images, generators, 2, self.augmentation)

    def loss(
        self, net: Bound, views: tuple[Tensor, Tensor], statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Contrast of views ``(2·N, 3, H, W)`` plus alignment of images ``(N, 3, H, W)`` and of those seen before."""
        images, pairs = views
        outputs = net(images)
        parts = [getattr(outputs, place) for place in PLACES]
        rows, widths = torch.cat(parts, dim=1), [part.shape[1] for part in parts]
        queue = state.queue if state else rows[:0].detach()
        known = torch.cat([queue, rows])[-max(self.queue_size, len(rows)) :]
        loss = nt_xent(net(pairs).projections.unflatten(0, (-1, 2)), self.temperature)
        if len(known) > 1:  # one image has no covariance
            scales = (self.scale_features, self.scale_projections)
            for place, scale, part in zip(PLACES, scales, known.split(widths, dim=1), strict=True):
                loss = loss + scale * misalignment(part, place, statistics)
        return loss, Seen(queue, rows.detach())

    def predict_batch(
        self, net: Bound, images: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Classify the batch, which has taken its steps, and let it join the queue."""
        if state:
            state = Seen(torch.cat(state)[-self.queue_size :], state.batch[:0])
        return net(images).logits, state


def misalignment(rows: Tensor, place: str, statistics: Statistics) -> Tensor:
    """Distance of the moments of ``rows (N, D)`` to the source domain's, in units of source noise."""
    *source, noise_mean, noise_covariance = (
        statistics[f"alignment.{place}.{name}"] for name in NAMES
    )
    mean, covariance = distances(rows, *source)
    return covariance / noise_covariance + 0.5 * mean / noise_mean


def distances(rows: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Compare the moments of ``rows (N, D)`` to ``mean (D,)``, squared per dimension, and ``covariance (D, D)``, by CORAL."""
    own_mean, own_covariance = moments(rows)
    return (own_mean - mean).square().mean(), (own_covariance - covariance).square().mean() / 4


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Take mean ``(D,)`` and unbiased covariance ``(D, D)`` of ``rows (N, D)``."""
    return rows.mean(0), torch.cov(rows.T)


def summarise(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Take the moments of all source ``rows (N, D)``, and the mean distances of mini-batches of ``size`` to them: `NAMES`.

    Raises:
        UserError: there are too few images for two mini-batches with a covariance.
    """
    if len(rows) < 4:
        raise UserError(
            f"method ttt_plus_plus: expected 4 source images or more, found {len(rows)}; raise source_stats.images"
        )
    own = moments(rows)
    parts = random_parts(rows, max(2, len(rows) // size))
    return *own, *torch.stack([torch.stack(distances(part, *own)) for part in parts]).mean(0)
