"""ActMAD on a batch: match mean and variance at every position of the activations to the source's.

Mirza et al., CVPR 2023, arXiv 2211.12870, as published: at the output of every BatchNorm layer (of
every stage where there is none), mean and unbiased variance are taken over the images of the batch
alone. They are maps of the activation's own shape, ``(C, H, W)`` or ``(L, C)``. The loss is half
the sum over layers of the mean absolute differences to the maps of the source domain, which are
means over source batches of 128 images. The method needs source images for these maps. `actmad` is
the variant for single images, which have no variance over a batch.

In params.yaml the rest is the adapter's: ``trainable: all``, ``normalisation: source``, one step
of SGD with momentum 0.9 on every batch of 128, lr 1e-2 (CIFAR-10), 1e-3 (CIFAR-100), 2.5e-4
(ImageNet).

What differs from the published code: it takes Nesterov steps with weight decay 5e-4, and crops and
mirrors source and test images at random; ours are not augmented. It tests on all test images after
every batch and reports the lowest error; ours predicts each batch once.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.errors import UserError
from tttlab.networks.classifiers import as_network
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import Spread, Statistics, indexed_images, shuffled_parts
from tttlab.networks.taps import batch_norm_layers, record, token_layers
from tttlab.runtime.group_size import GroupSize, through

SOURCE_BATCH = 128  # both maps are unbiased at any size: this affects only their noise


@dataclass(frozen=True)
class BatchActMAD(Method):
    """Match the moments of a batch's activations, at every position, to the source domain."""

    protocols = ("online",)
    whole_batch = True
    smallest_batch = 2  # a single image has no variance over a batch
    needs = ("maps",)

    def check(self, network: nn.Module) -> None:
        """Refuse a network without the layers to match."""
        matched_layers(network)

    @torch.no_grad()
    def source_statistics(self, network: nn.Module, batches: Iterable[Tensor]) -> Statistics:
        """Average the maps over source batches: ``maps.<layer>.mean`` and ``.variance``.

        Raises:
            UserError: there are fewer than two source images.
        """
        network = as_network(network)
        layers = matched_layers(network)
        count, look = indexed_images(batches)
        if count < 2:
            raise UserError(f"expected at least two source images, found {count}")
        # Parts of nearly equal size, so that none is left with a single image.
        parts = shuffled_parts(torch.arange(count), math.ceil(count / SOURCE_BATCH))
        sizes = GroupSize(largest=SOURCE_BATCH, timed=False)
        averages: Statistics = {}

        def spread_of(_layer: str, activation: Tensor) -> Spread:
            return Spread.of(activation)

        with evaluating(network), record(network, layers, spread_of) as spreads:

            def run(images: Tensor) -> dict[str, Spread]:
                network(images)
                return dict(spreads)

            for part in parts:
                groups = through(run, [look(part)], sizes)
                for layer, spread in joined(groups).items():
                    maps = (spread.mean, spread.variance())
                    for name, value in zip(map_names(layer), maps, strict=True):
                        averages[name] = averages.get(name, 0) + value / len(parts)
        dtype = next(network.parameters()).dtype
        return {name: value.to(dtype) for name, value in averages.items()}

    def loss(
        self, net: Bound, views: Any, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Discrepancy of ``views (N, 3, H, W)``, half the sum over the matched layers."""
        return discrepancy(net, views, statistics), state


def matched_layers(network: nn.Module) -> list[str]:
    """Name the layers whose maps are matched."""
    return batch_norm_layers(network) or token_layers(network)


def map_names(layer: str, kind: str = "maps") -> tuple[str, str]:
    """Name a layer's two maps among the statistics of a kind."""
    return f"{kind}.{layer}.mean", f"{kind}.{layer}.variance"


def joined(groups: Iterable[dict[str, Spread]]) -> dict[str, Spread]:
    """Join the moments of a batch's groups, layer by layer."""
    batch: dict[str, Spread] = {}
    for group in groups:
        for layer, spread in group.items():
            batch.setdefault(layer, Spread()).add(spread)
    return batch


def moments(activation: Tensor) -> tuple[Tensor, Tensor]:
    """Take mean and unbiased variance over the batch alone: ``(N, …)`` → two ``(…)``."""
    return activation.mean(0), activation.var(0)


def discrepancy(net: Bound, images: Tensor, statistics: Statistics, kind: str = "maps") -> Tensor:
    """Compare the maps of ``images (N, 3, H, W)`` with the source's, of a kind.

    Half the sum over layers of the mean absolute differences of both maps.
    """
    layers = matched_layers(net.module)
    with record(net.module, layers) as activations:
        net(images)
    terms = [
        (value - statistics[name]).abs().mean()
        for layer in layers
        for value, name in zip(moments(activations[layer]), map_names(layer, kind), strict=True)
    ]
    return 0.5 * torch.stack(terms).sum()
