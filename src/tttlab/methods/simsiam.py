"""SimSiam at test time: views of the image predict each other's projections, without negatives.

Chen and He, CVPR 2021, arXiv 2011.10566, as a test-time objective. Unlike a contrastive loss it
needs no other images, so that it has a gradient on a single one. MT3 (Bartler et al., AISTATS 2022,
arXiv 2103.16201) uses BYOL in the same way, with the source network as the target:
``target: source``. In the first step both targets give the same loss and the same gradient. Later
``self`` follows the network, and only the stop-gradient keeps all views from collapsing to one
point; ``source`` never changes. Needs nothing from the source domain but the two heads, whose
BatchNorm keeps its source statistics.

MT3's settings, in params.yaml the adapter's, are one step of plain SGD with lr 0.1 on 32 pairs of
views, and 0.01 for its baseline without meta-training. Its networks have GroupNorm, and all weights
are trained (``trainable: all``). Its loss of a pair, (2 − 2 cos) both ways, is four times as steep
as our mean of −cos: its lr 0.1 is 0.4 here. Ours counts every ordered pair of V views: 8 views are
56 pairs at the cost of 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.config.inner_loop import Augmentation
from tttlab.data.views import random_views
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics
from tttlab.objectives.simsiam import disagreement


@dataclass(frozen=True)
class SimSiamTraining(Method):
    """Predict the views of one image from each other.

    Attributes:
        num_views: V, views drawn at every step.
        target: whose projections are predicted: ``self``, the network's own without gradient, or
            ``source``, the source network's.
    """

    protocols = ("episodic", "online")
    head = "simsiam"
    num_views: Annotated[int, Ge(2)] = 8
    target: Literal["self", "source"] = "self"
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Draw ``(B, V, 3, H, W)`` fresh views."""
        return random_views(images, generators, self.num_views, self.augmentation)

    def loss(
        self, net: Bound, views: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Negative cosine similarity over the ordered pairs of ``views (V, 3, H, W)``."""
        outputs = net(views)
        if self.target == "self":
            return disagreement(outputs.predictions, outputs.projections), state
        with torch.no_grad():
            source = net.module(views)
        return disagreement(outputs.predictions, source.projections), state
