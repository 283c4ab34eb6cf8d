"""Averaging over augmented views without training: what the views alone are worth.

A method that trains on views must beat it: it costs the same forward passes and no backward ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from tttlab.adaptation.method import Method
from tttlab.config.inner_loop import Augmentation
from tttlab.data.augmix import draw_views
from tttlab.data.views import log_mean_probabilities
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


@dataclass(frozen=True)
class ViewAverage(Method):
    """Average the class probabilities of the image and its views.

    Attributes:
        num_views: V, number of augmented views beside the image itself.
        kind: of the views: ``crops`` of changed brightness | ``augmix``: AugMix of such crops.
    """

    protocols = ("episodic", "online")
    trains = False
    num_views: Annotated[int, Ge(1)] = 8
    kind: Literal["crops", "augmix"] = "crops"
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Draw the views, the image itself first: ``(B, 1 + V, 3, H, W)``."""
        drawn = draw_views(self.kind, images, generators, self.num_views, self.augmentation)
        return torch.cat([images.unsqueeze(1), drawn], dim=1)

    def predict(self, net: Bound, image: Tensor, views: Tensor, statistics: Statistics) -> Tensor:
        """Return the logarithm of the mean probabilities ``(K,)``."""
        return log_mean_probabilities(net(views).logits)
