"""SimCLR at test time: the image's views agree, against a bank of source projections.

Chen et al., ICML 2020, arXiv 2002.05709, as a test-time objective. The published loss has no
gradient on one image, because its two views have no negatives. Here the negatives are frozen
projections of source images: the method needs this bank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.config.inner_loop import Augmentation
from tttlab.data.views import random_views
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics
from tttlab.objectives.simclr import bank_contrast


@dataclass(frozen=True)
class SimCLRTraining(Method):
    """Contrast the views of one image with source images.

    Attributes:
        num_views: V, views drawn at every step.
        temperature: τ.
    """

    protocols = ("episodic", "online")
    head = "simclr"
    needs = ("bank",)
    num_views: Annotated[int, Ge(2)] = 8
    temperature: Annotated[float, Gt(0)] = 0.5
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Draw ``(B, V, 3, H, W)`` fresh views."""
        return random_views(images, generators, self.num_views, self.augmentation)

    def loss(
        self, net: Bound, views: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """NT-Xent of ``views (V, 3, H, W)`` against the bank."""
        return bank_contrast(net(views).projections, statistics["bank"], self.temperature), state
