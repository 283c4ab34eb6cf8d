"""ActMAD on one image: move the activations' moments to where the source domain has them.

Mirza et al., CVPR 2023, arXiv 2211.12870, match means and variances of a *batch* at every location.
A single image has no variance over a batch. This variant therefore takes every channel's moments
over the positions of the un-augmented image, and the source statistics with the same estimator.
It needs the layer statistics of the source domain.

The discrepancy has two forms:

``natural``  in units of natural variation. Per layer, z² is the mean over channels of
             ((m − E m)/sd m)², E and sd over source images, once for the means m and once for the
             log-variances. The loss is max(0, z² − t). A source image has z² ≈ 1, so that with
             t ≥ 1 the loss leaves typical images alone: it gates itself.
``l1``       the published distance: the mean absolute difference of means and of variances from
             the pooled source moments.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.errors import UserError
from tttlab.networks.classifiers import as_network
from tttlab.networks.natural_units import natural_distance
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics, layer_statistics
from tttlab.networks.taps import (
    Moments,
    batch_norm_layers,
    image_moments,
    record,
    stage_layers,
    token_layers,
)


@dataclass(frozen=True)
class ActMAD(Method):
    """Match activation moments of one image to the source domain.

    Attributes:
        form: of the discrepancy, ``natural`` or ``l1``; see the module.
        tolerance: t of the natural form.
        layers: ``norm``: outputs of all BatchNorm layers, as published; ``stages``: outputs of
            residual stages or transformer blocks; ``tokens``: the same and the patch embedding;
            ``auto``: ``norm`` where there is BatchNorm, else ``tokens``.
    """

    needs = ("layers",)
    form: Literal["natural", "l1"] = "natural"
    tolerance: Annotated[float, Ge(0)] = 1.0
    layers: Literal["auto", "norm", "stages", "tokens"] = "auto"

    def check(self, network: nn.Module) -> None:
        """Refuse a network without the layers to match."""
        if self.layers == "norm" and not batch_norm_layers(network):
            raise UserError(
                "method actmad: layers 'norm' needs BatchNorm in the backbone and found none; "
                "set layers: stages"
            )
        self.matched_layers(network)

    def source_statistics(self, network: nn.Module, batches: Iterable[Tensor]) -> Statistics:
        """Measure the moments of the matched layers on source images ``(N, 3, H, W)``."""
        return layer_statistics(network, batches, self.matched_layers(as_network(network)))

    def matched_layers(self, network: nn.Module) -> list[str]:
        """Name the layers whose moments are matched."""
        if self.layers == "stages":
            return stage_layers(network)
        if self.layers == "tokens":
            return token_layers(network)
        return batch_norm_layers(network) or token_layers(network)

    def loss(
        self, net: Bound, views: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Discrepancy of ``views (V, 3, H, W)``, mean over the matched layers."""
        layers = self.matched_layers(net.module)
        with record(net.module, layers) as activations:
            net(views)
        moments = {layer: image_moments(activation) for layer, activation in activations.items()}
        natural = partial(natural_discrepancy, tolerance=self.tolerance)
        discrepancy = l1_discrepancy if self.form == "l1" else natural
        terms = [discrepancy(moments[layer], statistics, layer) for layer in layers]
        return torch.stack(terms).mean(), state


def natural_discrepancy(
    moments: Moments, statistics: Statistics, layer: str, tolerance: float = 1.0
) -> Tensor:
    """Squared distance beyond the tolerance, in units of natural variation, sum of both moments."""
    total = 0.0
    for name, value in zip(("mean", "log_variance"), moments, strict=True):
        deviation = value - statistics[f"{layer}.{name}_center"]
        distance = natural_distance(deviation, statistics[f"{layer}.{name}_scale"])
        total = total + (distance - tolerance).clamp_min(0)
    return total


def l1_discrepancy(moments: Moments, statistics: Statistics, layer: str) -> Tensor:
    """Mean absolute difference of means plus that of variances, halved as in the code for CIFAR."""
    mean = (moments.mean - statistics[f"{layer}.pooled_mean"]).abs().mean()
    variance = (moments.log_variance.exp() - statistics[f"{layer}.pooled_variance"]).abs().mean()
    return (mean + variance) / 2
