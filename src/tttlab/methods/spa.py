"""SPA: what the network says of the image teaches it about the image's poorer views.

Niu et al., ICML 2025, arXiv 2504.08010, "Self-Bootstrapping for Versatile Test-Time Adaptation":
two views show less than the image and move nothing (`tttlab.data.deteriorating`): one lacks part of
its low frequencies, one fades into noise. For each the Kullback-Leibler divergence from the
prediction of the image, which is held fixed, is minimised; a view of which the network is as sure
as of the image has nothing to learn and is left out. It needs only a classifier.

In params.yaml the rest is the adapter's: the published code takes ``trainable: norm``, SGD with
momentum 0.9, lr 0.01 or 0.0025, one step on batches of 64, and sets ViT and GroupNorm as its
networks.

What differs: the published code puts a linear predictor, at first the identity, behind the features
of the poorer views, and learns how strong the noise is at every patch; ours has neither. The noise
is about the image's own mean colour, with the deviation ``spread``, in place of the standard normal
in normalised pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State, divergence
from tttlab.data.deteriorating import faded, without_low_frequencies
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


@dataclass(frozen=True)
class SPA(Method):
    """Draw the predictions of poorer views to that of the image.

    Attributes:
        mask: share of the low frequencies that one view lacks.
        noise: share of noise in the other.
        spread: standard deviation of the noise, of the range of pixels.
        selective: whether a view of which the network is as sure as of the image is left out.
    """

    protocols = ("episodic", "online")
    mask: Annotated[float, Ge(0), Le(1)] = 0.2
    noise: Annotated[float, Ge(0), Le(1)] = 0.4
    spread: Annotated[float, Gt(0)] = 0.5
    selective: bool = True

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Give each image, without some low frequencies, and faded: ``(B, 3, 3, H, W)``."""
        masked = without_low_frequencies(images, generators, self.mask)
        noised = faded(images, generators, self.noise, self.spread)
        return torch.stack([images, masked, noised], dim=1)

    def loss(
        self, net: Bound, views: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Divergence, in nats, from the first of ``views (3, 3, H, W)``, summed over the others."""
        with torch.no_grad():
            target = net(views[:1]).logits.softmax(-1)
        logits = net(views[1:]).logits
        terms = divergence(target, logits)
        if self.selective:
            terms = terms * (logits.detach().softmax(-1).amax(-1) < target.amax(-1))
        return terms.sum(), state
