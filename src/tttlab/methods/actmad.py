"""ActMAD on one image: move the activations' moments to where the source domain has them.

Mirza et al., CVPR 2023, arXiv 2211.12870, match means and variances of a *batch* at every location; on one image a variance
over the batch does not exist. This per-image variant takes every channel's moments over the positions of the un-augmented
image, and the source statistics with the same estimator. Needs the layer statistics of the source domain.

Two forms of the discrepancy:

``natural``  in units of natural variation. Per layer z² = mean over channels of ((m − E m)/sd m)², E and sd over source images,
             likewise for log-variances; the loss is max(0, z² − t). Since z² ≈ 1 on a source image, t ≥ 1 leaves images
             alone that are no stranger than usual: it gates itself.
``l1``       the published distance: mean absolute difference of means and of variances from the pooled source moments.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.errors import UserError
from tttlab.networks.classifiers import as_network
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
        form: see the module.
        tolerance: t of the natural form.
        layers: ``norm``: outputs of all BatchNorm layers, as published; ``stages``: outputs of residual stages or transformer
            blocks; ``tokens``: these and the patch embedding; ``auto``: ``norm`` where there is BatchNorm, else ``tokens``.
    """

    needs = ("layers",)
    form: Literal["natural", "l1"] = "natural"
    tolerance: Annotated[float, Ge(0)] = 1.0
    layers: Literal["auto", "norm", "stages", "tokens"] = "auto"

    def check(self, network: nn.Module) -> None:
        """Refuse a network that is not known to have such layers."""
        if self.layers == "norm" and not batch_norm_layers(network):
            raise UserError(
                "method actmad: layers 'norm' needs BatchNorm in the backbone and found none; set layers: stages"
            )
        self.matched_layers(network)

    def source_statistics(self, network: nn.Module, batches: Iterable[Tensor]) -> Statistics:
        """Measure the moments of the matched layers on source images ``(N, 3, H, W)``."""
        return layer_statistics(network, batches, self.matched_layers(as_network(network)))

    def matched_layers(self, network: nn.Module) -> list[str]:
        """Name the layers whose moments are matched."""
        norm = batch_norm_layers(network)
        if self.layers == "stages":
            return stage_layers(network)
        return token_layers(network) if self.layers == "tokens" or not norm else norm

    def loss(
        self, net: Bound, views: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Sum the discrepancies of ``views (V, 3, H, W)`` over the matched layers, divided by their number."""
        layers = self.matched_layers(net.module)
        with record(net.module, layers) as activations:
            net(views)
        moments = {layer: image_moments(activation) for layer, activation in activations.items()}
        if self.form == "l1":
            terms = [l1_discrepancy(moments[layer], statistics, layer) for layer in layers]
        else:
            terms = [
                natural_discrepancy(moments[layer], statistics, layer, self.tolerance)
                for layer in layers
            ]
        return torch.stack(terms).mean(), state


def natural_discrepancy(
    moments: Moments, statistics: Statistics, layer: str, tolerance: float = 1.0
) -> Tensor:
    """Squared distance from the typical source image in units of natural variation, beyond what is tolerated; both moments."""
    total = 0.0
    for name, value in zip(("mean", "log_variance"), moments, strict=True):
        scale = statistics[f"{layer}.{name}_scale"].clamp_min(1e-6)
        distance = ((value - statistics[f"{layer}.{name}_center"]) / scale).square().mean()
        total = total + (distance - tolerance).clamp_min(0)
    return total


def l1_discrepancy(moments: Moments, statistics: Statistics, layer: str) -> Tensor:
    """Mean absolute difference of means and of variances, halved as in the published code for CIFAR."""
    mean = (moments.mean - statistics[f"{layer}.pooled_mean"]).abs().mean()
    variance = (moments.log_variance.exp() - statistics[f"{layer}.pooled_variance"]).abs().mean()
    return (mean + variance) / 2
