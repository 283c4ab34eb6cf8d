"""Statistics of the source domain inside the network, estimated image by image.

The estimator is the one used on a test image: the moments of a single un-augmented image's
activations. Over many source images these moments have a centre and a natural variation, and a test
image's distance from the centre is measured in units of that variation.
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
from tttlab.runtime.group_size import FORWARD_LARGEST, GroupSize, through
from tttlab.seeding import torch_generator

Statistics = dict[str, Tensor]
_FILE = "statistics.safetensors"


class SourceImages:
    """Source images that are read on every access, for sets larger than memory.

    Iterating yields batches ``(N, 3, H, W)``.

    Args:
        look: reads the images ``(n, 3, H, W)`` at some indices ``(n,)``.
        count: number of all images.
        batch_size: largest number of images in a batch.
    """

    def __init__(self, look: Callable[[Tensor], Tensor], count: int, batch_size: int) -> None:
        self.look, self.count, self.batch_size = look, count, batch_size

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.look, torch.arange(self.count).split(self.batch_size))


@dataclass
class Spread:
    """Running mean and variance of samples, in double precision, without keeping the samples.

    Attributes:
        count: number of samples so far.
        mean: their mean.
        squares: sum of their squared deviations from the mean.

    Reference:
        Chan, Golub and LeVeque, The American Statistician 37, 1983, on combining the moments of two
        sets of samples.
    """

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    @classmethod
    def of(cls, samples: Tensor) -> "Spread":
        """Measure ``N`` samples ``(N, …)``."""
        mean = samples.mean(0, dtype=torch.double)
        return cls(len(samples), mean, (samples - mean).square_().sum(0))

    def add(self, other: "Spread") -> None:
        """Add other samples, in place."""
        count, delta = self.count + other.count, other.mean - self.mean
        self.squares = self.squares + other.squares + delta**2 * (self.count * other.count / count)
        self.mean = self.mean + delta * (other.count / count)
        self.count = count

    def variance(self, correction: int = 1) -> Tensor:
        """Sample variance (``correction`` 0: population variance); NaN of too few samples."""
        if self.count <= correction:
            return self.squares * torch.nan
        return self.squares / (self.count - correction)


@torch.no_grad()
def layer_statistics(
    network: nn.Module, batches: Iterable[Tensor], layers: Sequence[str] | None = None
) -> Statistics:
    """Measure the per-image channel moments of named layers over the source domain.

    Args:
        network: the source network, a `Network` or any module from images to logits; it runs in
            evaluation mode.
        batches: source images ``(N, 3, H, W)``.
        layers: names as for `taps.record`; None: `standard_layers`.

    Returns:
        for every layer, each ``(C,)``: ``<layer>.mean_center``, ``.mean_scale``,
        ``.log_variance_center``, ``.log_variance_scale``, the mean and standard deviation over
        images of the per-image moments; ``.pooled_mean``, ``.pooled_variance``, the moments over
        all positions of all images; ``.total_variance``, the latter with the variance between
        images as the domain has it, and not these images alone.

    Raises:
        UserError: there are no images, or a layer's channels do not come second.
    """
    network = as_network(network)
    layers = list(layers or standard_layers(network))
    widths = {
        f"encoder.{stage['module']}": stage["num_chs"]
        for stage in getattr(network.encoder, "feature_info", ())
    }
    totals = {layer: LayerMoments() for layer in layers}
    sizes = GroupSize(largest=FORWARD_LARGEST, timed=False)
    floors, count = {layer: variance_floor(network, layer) for layer in layers}, 0

    def reduce(layer: str, activation: Tensor) -> Moments:
        return batch_moments(activation, floors[layer], count)

    with evaluating(network), record(network, layers, reduce) as moments:

        def look(images: Tensor) -> dict[str, Moments]:
            nonlocal count
            count = len(images)
            network(images)
            return dict(moments)

        for group_moments in through(look, batches, sizes):
            for layer in layers:
                width = group_moments[layer].mean.shape[1]
                check_width(network, layer, widths.get(layer), width)
                totals[layer].add(group_moments[layer])
    if not count:
        raise UserError("expected source images, found none")
    return {
        f"{layer}.{name}": value
        for layer, total in totals.items()
        for name, value in total.summary().items()
    }


def check_width(network: nn.Module, layer: str, expected: int | None, found: int) -> None:
    """Raise a `UserError` unless a layer has ``expected`` channels; None: not known."""
    if expected not in (None, found):
        raise UserError(
            f"layer {layer} of {type(network.encoder).__name__}: "
            f"expected {expected} channels second, found {found}; "
            "backbones with channels last are not supported"
        )


class LayerMoments:
    """One layer's per-image moments, accumulated over images."""

    def __init__(self) -> None:
        self.mean, self.log_variance, self.variance = Spread(), Spread(), Spread()

    def add(self, moments: Moments) -> None:
        """Add the moments ``(N, C)`` of some images."""
        self.dtype = moments.mean.dtype
        self.mean.add(Spread.of(moments.mean))
        self.log_variance.add(Spread.of(moments.log_variance))
        self.variance.add(Spread.of(moments.log_variance.exp()))

    def summary(self) -> Statistics:
        """Return centre, natural variation and pooled moments, each ``(C,)``."""
        values = {
            "mean_center": self.mean.mean,
            "mean_scale": self.mean.variance().sqrt(),
            "log_variance_center": self.log_variance.mean,
            "log_variance_scale": self.log_variance.variance().sqrt(),
            "pooled_mean": self.mean.mean,
            # The law of total variance: all images have equally many positions.
            "pooled_variance": self.variance.mean + self.mean.variance(correction=0),
            # The same for the domain that the images are drawn from.
            "total_variance": self.variance.mean + self.mean.variance(),
        }
        return {name: value.to(self.dtype) for name, value in values.items()}


def available_statistics(statistics: Statistics) -> set[str]:
    """Return the kinds of statistics: ``layers`` (layer moments) and the prefixes of all names.

    A prefix is what precedes the first dot: ``bank``, or ``fisher`` of ``fisher.<parameter>``.
    """
    available = {name.partition(".")[0] for name in statistics}
    if any(name.endswith(".mean_center") for name in statistics):
        available.add("layers")
    return available


def standard_layers(network: nn.Module) -> list[str]:
    """Name the layers that the built-in methods and normalisation policies use.

    These are the input and output of every BatchNorm layer, and the `token_layers` that are known.
    """
    normalisation = batch_norm_layers(network)
    tokens = token_layers(network) if network.stages or not normalisation else []
    return [f"{name}.input" for name in normalisation] + normalisation + tokens


def concatenate(groups: Sequence[Tensor]) -> Tensor:
    """Put what was measured on groups of source images together.

    Raises:
        UserError: there were no images.
    """
    if not groups:
        raise UserError("expected source images, found none")
    return torch.cat(groups)


def indexed_images(batches: Iterable[Tensor]) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Return the number of source images, and a function from indices ``(n,)`` to images."""
    if isinstance(batches, SourceImages):
        return batches.count, batches.look
    images = concatenate(list(batches))
    return len(images), images.__getitem__


def shuffled_parts(rows: Tensor, count: int) -> tuple[Tensor, ...]:
    """Divide source images or features ``(N, …)`` at random into parts of nearly equal size.

    Images often come class by class, and one class does not represent the domain. The permutation
    is always the same.
    """
    order = torch.randperm(len(rows), generator=torch_generator(0, "source batches"))
    return rows[order.to(rows.device)].tensor_split(count)


@torch.no_grad()
def projection_bank(network: nn.Module, batches: Iterable[Tensor], size: int) -> Statistics:
    """Compute the projections of the first ``size`` source images: ``{"bank": (size, P)}``."""
    groups: list[Tensor] = []
    sizes = GroupSize(largest=FORWARD_LARGEST, timed=False)
    with evaluating(network):
        for projections in through(lambda images: network(images).projections, batches, sizes):
            groups.append(projections)
            if sum(map(len, groups)) >= size:
                break
    return {"bank": concatenate(groups)[:size]}


def save(
    statistics: Statistics, folder: Path, *, checkpoint: str, images: int | None = None
) -> None:
    """Write ``statistics.safetensors``.

    Args:
        statistics: what was measured.
        folder: created if it does not exist.
        checkpoint: SHA-256 of the weights that it was measured on.
        images: number of source images, noted for people.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.cpu().contiguous() for name, value in statistics.items()}
    metadata = {"checkpoint": checkpoint} | ({} if images is None else {"images": str(images)})
    save_file(tensors, folder / _FILE, metadata=metadata)


def load(folder: Path, checkpoint: str) -> Statistics:
    """Read what `save` wrote.

    Args:
        folder: where `save` wrote.
        checkpoint: SHA-256 of the network's weights; the statistics must be of the same weights.

    Raises:
        UserError: there are no statistics, or they belong to another checkpoint.
    """
    try:
        with safe_open(folder / _FILE, framework="pt") as file:
            measured_on = file.metadata()["checkpoint"]
            # keys() is needed: the file is no mapping.
            statistics = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / _FILE}: expected source statistics, found none that can be read; "
            "run the stage source_stats"
        ) from error
    if measured_on != checkpoint:
        raise UserError(
            f"{folder / _FILE}: expected statistics of checkpoint {checkpoint[:12]}, "
            f"found those of {measured_on[:12]}; run the stage source_stats again"
        )
    return statistics
