"""What the source domain looks like from inside the network, one image at a time.

The estimator is the one used on a test image: the moments of a single, un-augmented image's activations. Over many source
images these moments have a centre and a natural variation, and a test image can be judged by its distance from the centre
in units of that variation.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tttlab.errors import UserError
from tttlab.networks import as_network, evaluating
from tttlab.seeding import torch_generator
from tttlab.taps import Moments, batch_moments, batch_norm_layers, record, token_layers

Statistics = dict[str, Tensor]
_FILE = "statistics.safetensors"


@torch.no_grad()
def layer_statistics(network: nn.Module, batches: Iterable[Tensor], layers: Sequence[str] | None = None) -> Statistics:
    """Measure the per-image channel moments of named layers over the source domain.

    Args:
        network: the source network, a `Network` or any timm classifier; it is run in evaluation mode.
        batches: source images ``(N, 3, H, W)``.
        layers: names as for `taps.record`; None: input and output of every BatchNorm layer, and every stage of the encoder.

    Returns:
        for every layer ``<layer>.mean_center``, ``.mean_scale``, ``.log_variance_center``, ``.log_variance_scale``: mean and
        standard deviation over images of the per-image moments; ``.pooled_mean``, ``.pooled_variance``: moments over all
        positions of all images; each ``(C,)``.
    """
    network = as_network(network)
    layers = list(layers or standard_layers(network))
    collected: dict[str, list[Moments]] = {layer: [] for layer in layers}
    with evaluating(network), record(network, layers) as activations:
        for images in batches:
            network(images)
            for layer in layers:
                collected[layer].append(batch_moments(activations[layer]))
    statistics: Statistics = {}
    widths = {f"encoder.{stage['module']}": stage["num_chs"] for stage in network.encoder.feature_info}
    for layer, parts in collected.items():
        moments = Moments(*(torch.cat(part) for part in zip(*parts, strict=True)))
        if moments.mean.shape[1] != widths.get(layer, moments.mean.shape[1]):
            raise UserError(f"layer {layer} of {type(network.encoder).__name__}: expected {widths[layer]} channels second, "
                            f"found {moments.mean.shape[1]}; backbones with channels last are not supported")  # fmt: skip
        statistics |= {f"{layer}.{name}": value for name, value in summarise_moments(moments).items()}
    return statistics


def kinds(statistics: Statistics) -> set[str]:
    """Tell what a method can find here: ``layers`` (moments of layers), and what names begin with: ``bank``, ``fisher.<…>``."""
    known = {name.partition(".")[0] for name in statistics}
    return known | ({"layers"} if any(name.endswith(".mean_center") for name in statistics) else set())


def standard_layers(network: nn.Module) -> list[str]:
    """Name every layer that the built-in methods and normalisation policies look at."""
    normalisation = batch_norm_layers(network)
    return [f"{name}.input" for name in normalisation] + normalisation + token_layers(network)


def summarise_moments(moments: Moments) -> Statistics:
    """Summarise per-image moments ``(N, C)`` by centre, natural variation, and pooled moments, each ``(C,)``."""
    mean, log_variance = moments
    return {
        "mean_center": mean.mean(0),
        "mean_scale": mean.std(0),
        "log_variance_center": log_variance.mean(0),
        "log_variance_scale": log_variance.std(0),
        "pooled_mean": mean.mean(0),
        # The law of total variance: all images have equally many positions.
        "pooled_variance": log_variance.exp().mean(0) + mean.var(0, correction=0),
    }


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
        for images in batches:
            rows.append(network(images).projections)
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
        raise UserError(f"{folder / _FILE}: expected source statistics, found none that can be read; run the stage "
                        "source_stats") from error  # fmt: skip
    if measured_on != checkpoint:
        raise UserError(f"{folder / _FILE}: expected statistics of checkpoint {checkpoint[:12]}, found those of "
                        f"{measured_on[:12]}; run the stage source_stats again")  # fmt: skip
    return statistics
