"""TTT++: contrast the views of a batch's images, and match the features' moments to the source's.

Liu et al., NeurIPS 2021 (When Does Self-Supervised Test-Time Training Fail or Thrive?). The loss is
NT-Xent, with the other images of the batch as negatives, plus two alignment terms: for the
encoder's features and for the projections, the distance of mean μ and covariance Σ from the source
domain's, with width D:

    s·(‖Σ_s − Σ_t‖²/(4·D²))/c + ½·s·(‖μ_s − μ_t‖²/D)/m

c and m are what the same distances are on average of as many images from the *source* domain, so
that the terms of images without any shift are about s and s/2, however many there are. A single
batch would estimate the covariance poorly: its moments are taken together with the features of the
images before it, without gradient. The contrast sees augmented views, the alignment the images
themselves. Needs a SimCLR head and source images.

In params.yaml the rest is the adapter's: ``trainable: encoder``, ``normalisation: image``, SGD with
momentum 0.9, batches of 256; CIFAR-10: lr 1e-2; CIFAR-100: lr 1e-4, scales 5 and 20, queue 2048.

What differs from the published code:

- It passes over the test images up to 500 times (twice only for BatchNorm's statistics, with
  alignment from the fourth pass on), halves its learning rate and stops by the *test error*, and
  predicts with BatchNorm's moving averages. Ours passes once, never sees a label, and leaves
  normalisation to the adapter's policy.
- It aligns each batch alone until the queue is full. Ours uses the queue as far as it is filled,
  which is a better estimate from the second batch on.
- Its c and m are distances of a source batch to the first one, which it leaves out of everything
  else, whatever the number of test images. Ours are distances of as many images as there are to the
  moments of all source images: with a full queue and many source images about half of its, so that
  equal scales weigh about twice as much.
- It crops and mirrors the source images at random; ours are not augmented.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.config.inner_loop import Augmentation
from tttlab.data.views import random_views
from tttlab.errors import UserError
from tttlab.networks.classifiers import as_network
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import Statistics, concatenate, shuffled_parts
from tttlab.objectives.simclr import nt_xent
from tttlab.runtime.group_size import FORWARD_LARGEST, GroupSize, through

PLACES = ("features", "projections")
NAMES = ("mean", "covariance", "noise_mean", "noise_covariance", "images")


class Seen(NamedTuple):
    """Images in order of arrival, each a row of its features and its projections.

    ``queue (M, D + P)`` has those of earlier batches, ``batch (N, D + P)`` those of the present
    batch at its latest step. They are apart so that an image joins the queue once, however many
    steps its batch takes.
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
        queue_size: images whose moments are taken: the whole batch, and the latest images before
            it. Source mini-batches have the same size, or half the source images if these are too
            few for two mini-batches.
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
        """Summarise source images: ``alignment.<place>.<name>``, see `PLACES` and `NAMES`."""
        network = as_network(network)

        def look(images: Tensor) -> tuple[Tensor, ...]:
            outputs = network(images)
            return tuple(getattr(outputs, place) for place in PLACES)

        with evaluating(network):
            rows = list(through(look, batches, GroupSize(largest=FORWARD_LARGEST, timed=False)))
        statistics: Statistics = {}
        for index, place in enumerate(PLACES):
            values = summarise(concatenate([row[index] for row in rows]), self.queue_size)
            for name, value in zip(NAMES, values, strict=True):
                statistics[f"alignment.{place}.{name}"] = value
        return statistics

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Give the images ``(B, 1, 3, H, W)``, and two fresh views of each ``(B, 2, 3, H, W)``."""
        return images.unsqueeze(1), random_views(images, generators, 2, self.augmentation)

    def loss(
        self, net: Bound, views: tuple[Tensor, Tensor], statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Contrast of pairs of views ``(2·N, 3, H, W)``, plus alignment of images ``(N, 3, H, W)``.

        The moments are those of the images and of the images before them.
        """
        images, pairs = views
        outputs = net(images)
        batch = torch.cat([outputs.features, outputs.projections], dim=1)
        queue = state.queue if state else batch[:0].detach()
        latest = torch.cat([queue, batch])[-max(self.queue_size, len(batch)) :]
        loss = nt_xent(net(pairs).projections.unflatten(0, (-1, 2)), self.temperature)
        if len(latest) > 1:  # one image has no covariance
            widths = (outputs.features.shape[1], outputs.projections.shape[1])
            scales = (self.scale_features, self.scale_projections)
            for place, scale, rows in zip(PLACES, scales, latest.split(widths, dim=1), strict=True):
                loss = loss + scale * misalignment(rows, place, statistics)
        return loss, Seen(queue, batch.detach())

    def predict_batch(
        self, net: Bound, images: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Classify the batch after its steps, and let it join the queue."""
        if state:
            state = Seen(torch.cat(state)[-self.queue_size :], state.batch[:0])
        return net(images).logits, state


def misalignment(rows: Tensor, place: str, statistics: Statistics) -> Tensor:
    """Distance of the moments of ``rows (N, D)`` from the source domain's, over source noise.

    The noise of moments falls with the number of images on either side.
    """
    values = [statistics[f"alignment.{place}.{name}"] for name in NAMES]
    mean, covariance, noise_mean, noise_covariance, images = values
    mean_distance, covariance_distance = distances(rows, mean, covariance)
    terms = covariance_distance / noise_covariance + 0.5 * mean_distance / noise_mean
    return terms / (1 / len(rows) + 1 / images)


def distances(rows: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Give the squared distances of the moments of ``rows (N, D)``, that of covariances by CORAL.

    Returns:
        ‖μ − mean‖²/D and ‖Σ − covariance‖²/(4·D²).
    """
    mu, sigma = moments(rows)
    return (mu - mean).square().mean(), (sigma - covariance).square().mean() / 4


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Take mean ``(D,)`` and unbiased covariance ``(D, D)`` of ``rows (N, D)``."""
    return rows.mean(0), torch.cov(rows.T)


def summarise(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Take the moments of source ``rows (N, D)``, and how far those of few images lie from them.

    A mini-batch of p of the N images lies off by the noise of one image times 1/p − 1/N.

    Args:
        rows: features or projections of all source images.
        size: of a mini-batch.

    Returns:
        values of the `NAMES`: the moments, the squared distances that one image's noise makes, N.

    Raises:
        UserError: there are too few images for two mini-batches with a covariance.
    """
    if len(rows) < 4:
        raise UserError(
            f"method ttt_plus_plus: expected 4 source images or more, found {len(rows)}; "
            "raise source_stats.images"
        )
    mean, covariance = moments(rows)
    parts = shuffled_parts(rows, max(2, len(rows) // size))
    noise = [
        torch.stack(distances(part, mean, covariance)) / (1 / len(part) - 1 / len(rows))
        for part in parts
    ]
    return mean, covariance, *torch.stack(noise).mean(0), mean.new_tensor(len(rows))
