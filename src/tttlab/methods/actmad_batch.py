"""ActMAD on a batch: move the mean and variance of every activation, place by place, to the source domain's.

Mirza et al., CVPR 2023, arXiv 2211.12870, as published: at the output of every BatchNorm layer (of every stage, where there is
none) the mean and the unbiased variance are taken over the images of the batch alone, so that they are maps of the activation's
own shape, ``(C, H, W)`` or ``(L, C)``. The loss is half the sum over layers of the mean absolute differences to the same maps
of the source domain: their mean over source batches of 128 images. Needs source images for those; `actmad` is the variant for
single images, which have no variance over a batch.

In params.yaml the rest is the adapter's: ``trainable: all``, ``normalisation: source``, one step of SGD with momentum 0.9 on
every batch of 128, lr 1e-2 (CIFAR-10), 1e-3 (CIFAR-100), 2.5e-4 (ImageNet). What differs: the published steps are Nesterov's
and decay the weights by 5e-4, the published images, source and test, are cropped and mirrored at random, ours are as they are;
and the published code tests after every batch on all test images and reports the lowest error, ours predicts each batch once.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.networks.classifiers import as_network
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import Spread, Statistics, looked_up, random_parts
from tttlab.networks.taps import batch_norm_layers, record, token_layers
from tttlab.runtime.group_size import GroupSize, through

SOURCE_BATCH = 128  # both maps are unbiased at any size, so this weighs on their noise alone


@dataclass(frozen=True)
class BatchActMAD(Method):
    """Match the moments of a batch's activations, at every place of every map, to the source domain."""

    protocols = ("online",)
    whole_batch = True
    smallest_batch = 2  # a single image has no variance over a batch
    needs = ("maps",)

    def check(self, network: nn.Module) -> None:
        """Refuse a network that is not known to have such layers."""
        matched_layers(network)

    @torch.no_grad()
    def source_statistics(self, network: nn.Module, batches: Iterable[Tensor]) -> Statistics:
        """Average the maps of moments over batches of source images: ``maps.<layer>.mean`` and ``.variance``."""
        network = as_network(network)
        layers, (count, look) = matched_layers(network), looked_up(batches)
        parts = random_parts(
            torch.arange(count), math.ceil(count / SOURCE_BATCH)
        )  # nearly equal: none of one image
        total: Statistics = {}
        sizes = GroupSize(largest=SOURCE_BATCH, timed=False)
        with (
            evaluating(network),
            record(network, layers, lambda _layer, own: Spread.of(own)) as spreads,
        ):

            def run(images: Tensor) -> dict[str, Spread]:
                network(images)
                return dict(spreads)

            for part in parts:
                for layer, whole in together(through(run, [look(part)], sizes)).items():
                    for name, value in zip(
                        names(layer), (whole.mean, whole.variance()), strict=True
                    ):
                        total[name] = total.get(name, 0) + value / len(parts)
        kind = next(network.parameters()).dtype
        return {name: value.to(kind) for name, value in total.items()}

    def loss(
        self, net: Bound, views: Any, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Half the sum, over layers, of the distances of the maps of ``views (N, 3, H, W)``."""
        layers = matched_layers(net.module)
        with record(net.module, layers) as activations:
            net(views)
        return 0.5 * torch.stack(
            [discrepancy(activations[layer], statistics, layer) for layer in layers]
        ).sum(), state


def matched_layers(network: nn.Module) -> list[str]:
    """Name the layers whose maps are matched."""
    return batch_norm_layers(network) or token_layers(network)


def names(layer: str) -> tuple[str, str]:
    """Name a layer's two maps among the statistics."""
    return f"maps.{layer}.mean", f"maps.{layer}.variance"


def together(groups: Iterable[dict[str, Spread]]) -> dict[str, Spread]:
    """Join the moments of a batch's groups, layer by layer."""
    whole: dict[str, Spread] = {}
    for own in groups:
        for layer, spread in own.items():
            whole.setdefault(layer, Spread()).add(spread)
    return whole


def moments(activation: Tensor) -> tuple[Tensor, Tensor]:
    """Take mean and unbiased variance over the batch alone: ``(N, …)`` → two ``(…)``."""
    return activation.mean(0), activation.var(0)


def discrepancy(activation: Tensor, statistics: Statistics, layer: str) -> Tensor:
    """Mean absolute difference of the means' map plus that of the variances'."""
    pairs = zip(moments(activation), names(layer), strict=True)
    return sum((value - statistics[name]).abs().mean() for value, name in pairs)
