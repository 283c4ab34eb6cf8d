"""What the source domain looks like from inside the network, one image at a time.

The estimator is the one used on a test image: the moments of a single, un-augmented image's activations. Over many source
images these moments have a centre and a natural variation, and a test image can be judged by its distance from the centre
in units of that variation.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tttlab.errors import UserError
from tttlab.networks.classifiers import as_network
from tttlab.networks.network import evaluating
from tttlab.networks.taps import (
    Moments,
    batch_moments,
    batch_norm_layers,
    record,
    token_layers,
    variance_floor,
)
from tttlab.runtime.group_size import GroupSize, through
from tttlab.seeding import torch_generator

Statistics = dict[str, Tensor]
LARGEST = 256  # images in one forward pass
_FILE = "statistics.safetensors"


class SourceImages:
    """Source images that are looked at when they are asked for, and as often: they may be more than memory holds.

    It is iterated over as batches ``(N, 3, H, W)``.

    Args:
        look: makes images ``(n, 3, H, W)`` from their places ``(n,)``.
        count: of all images.
        batch_size: most images of a batch.
    """

    def __init__(self, look: Callable[[Tensor], Tensor], count: int, batch_size: int) -> None:
        self.look, self.count, self.batch_size = look, count, batch_size

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.look, torch.arange(self.count).split(self.batch_size))


@dataclass
class Spread:
    """Mean and variance of samples that come bit by bit; they are summed in double precision, and none of them is kept.

    Attributes:
        count: samples so far.
        mean: of them.
        squares: sum of their squared deviations from it.

    Reference:
        Chan, Golub and LeVeque, The American Statistician 37, 1983, for the moments of two sets of samples together.
    """

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    @classmethod
    def of(cls, samples: Tensor) -> "Spread":
        """Measure samples ``(N, …)``, each of them a tensor ``(…)``."""
        mean = samples.mean(0, dtype=torch.double)
        return cls(len(samples), mean, (samples - mean).square_().sum(0))

    def add(self, other: "Spread") -> None:
        """Take in other samples."""
        count, away = self.count + other.count, other.mean - self.mean
        self.squares = self.squares + other.squares + away**2 * (self.count * other.count / count)
        self.mean = self.mean + away * (other.count / count)
        self.count = count

    def variance(self, correction: int = 1) -> Tensor:
        """Give the unbiased variance, or with ``correction`` 0 that of a population; of too few samples not a number."""
        return (
            self.squares / (self.count - correction)
            if self.count > correction
            else self.squares * torch.nan
        )


@torch.no_grad()
def layer_statistics(
    network: nn.Module, batches: Iterable[Tensor], layers: Sequence[str] | None = None
) -> Statistics:
    """Measure the per-image channel moments of named layers over the source domain.

    Args:
        network: the source network, a `Network` or any module from images to logits; it is run in evaluation mode.
        batches: source images ``(N, 3, H, W)``.
        layers: names as for `taps.record`; None: input and output of every BatchNorm layer, and every stage of the encoder.

    Returns:
        for every layer ``<layer>.mean_center``, ``.mean_scale``, ``.log_variance_center``, ``.log_variance_scale``: mean and
        standard deviation over images of the per-image moments; ``.pooled_mean``, ``.pooled_variance``: moments over all
        positions of all images; each ``(C,)``.
    """
    network = as_network(network)
    layers = list(layers or standard_layers(network))
    widths = {
        f"encoder.{stage['module']}": stage["num_chs"]
        for stage in getattr(network.encoder, "feature_info", ())
    }
    found = {layer: LayerMoments() for layer in layers}
    sizes = GroupSize(largest=LARGEST, timed=False)
    floors, count = {layer: variance_floor(network, layer) for layer in layers}, 0
    with (
        evaluating(network),
        record(
            network,
            layers,
            lambda layer, activation: batch_moments(activation, floors[layer], count),
        ) as moments,
    ):

        def look(images: Tensor) -> dict[str, Moments]:
            nonlocal count
            count = len(images)
            network(images)
            return dict(moments)

        for own in through(look, batches, sizes):
            for layer in layers:
                check_width(network, layer, widths.get(layer), own[layer].mean.shape[1])
                found[layer].add(own[layer])
    return {
        f"{layer}.{name}": value
        for layer, own in found.items()
        for name, value in own.summary().items()
    }


def check_width(network: nn.Module, layer: str, expected: int | None, found: int) -> None:
    """Raise a `UserError` if a layer's channels are not where they are looked for; ``expected`` None: not known."""
    if expected not in (None, found):
        raise UserError(
            f"layer {layer} of {type(network.encoder).__name__}: expected {expected} channels second, "
            f"found {found}; backbones with channels last are not supported"
        )


class LayerMoments:
    """What is known of one layer's moments over the images so far."""

    def __init__(self) -> None:
        self.mean, self.log_variance, self.variance = Spread(), Spread(), Spread()

    def add(self, moments: Moments) -> None:
        """Take in the moments of some images ``(N, C)``."""
        self.kind = moments.mean.dtype
        self.mean.add(Spread.of(moments.mean))
        self.log_variance.add(Spread.of(moments.log_variance))
        self.variance.add(Spread.of(moments.log_variance.exp()))

    def summary(self) -> Statistics:
        """Summarise by centre, natural variation, and pooled moments, each ``(C,)``."""
        found = {
            "mean_center": self.mean.mean,
            "mean_scale": self.mean.variance().sqrt(),
            "log_variance_center": self.log_variance.mean,
            "log_variance_scale": self.log_variance.variance().sqrt(),
            "pooled_mean": self.mean.mean,
            # The law of total variance: all images have equally many positions.
            "pooled_variance": self.variance.mean + self.mean.variance(correction=0),
        }
        return {name: value.to(self.kind) for name, value in found.items()}


def kinds(statistics: Statistics) -> set[str]:
    """Tell what a method can find here: ``layers`` (moments of layers), and what names begin with: ``bank``, ``fisher.<…>``."""
    known = {name.partition(".")[0] for name in statistics}
    return known | (
        {"layers"} if any(name.endswith(".mean_center") for name in statistics) else set()
    )


def standard_layers(network: nn.Module) -> list[str]:
    """Name every layer that the built-in methods and normalisation policies look at."""
    normalisation = batch_norm_layers(network)
    others = token_layers(network) if network.stages or not normalisation else []
    return [f"{name}.input" for name in normalisation] + normalisation + others


def looked_up(batches: Iterable[Tensor]) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Count source images, and say how to look at those with some places ``(n,)``: ``(n, 3, H, W)``."""
    if isinstance(batches, SourceImages):
        return batches.count, batches.look
    images = torch.cat(list(batches))
    return len(images), images.__getitem__


def random_parts(rows: Tensor, count: int) -> tuple[Tensor, ...]:
    """Divide source images, or their features, ``(N, …)`` into parts of nearly equal size.

    At random, but always alike: images often come class by class, and a part of a single class is no sample of the domain.
    """
    order = torch.randperm(len(rows), generator=torch_generator(0, "source batches"))
    return rows[order.to(rows.device)].tensor_split(count)


@torch.no_grad()
def projection_bank(network: nn.Module, batches: Iterable[Tensor], size: int) -> Statistics:
    """Keep the projections of the first ``size`` source images: ``{"bank": (size, P)}``."""
    rows: list[Tensor] = []
    with evaluating(network):
        for own in through(
            lambda images: network(images).projections,
            batches,
            GroupSize(largest=LARGEST, timed=False),
        ):
            rows.append(own)
            if sum(map(len, rows)) >= size:
                break
    return {"bank": torch.cat(rows)[:size]}


def save(statistics: Statistics, folder: Path, *, checkpoint: str, images: int) -> None:
    """Write ``statistics.safetensors`` with the hash of the checkpoint it was measured on."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.cpu().contiguous() for name, value in statistics.items()}
    save_file(tensors, folder / _FILE, metadata={"checkpoint": checkpoint, "images": str(images)})


def load(folder: Path, checkpoint: str) -> Statistics:
    """Read what `save` wrote.

    Args:
        folder: where.
        checkpoint: SHA-256 of the network's weights, which must be those the statistics were measured on.

    Raises:
        UserError: there are none, or they belong to another checkpoint.
    """
    try:
        with safe_open(folder / _FILE, framework="pt") as file:
            measured_on = file.metadata()["checkpoint"]
            statistics = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / _FILE}: expected source statistics, found none that can be read; run the stage source_stats"
        ) from error
    if measured_on != checkpoint:
        raise UserError(
            f"{folder / _FILE}: expected statistics of checkpoint {checkpoint[:12]}, found those of "
            f"{measured_on[:12]}; run the stage source_stats again"
        )
    return statistics
