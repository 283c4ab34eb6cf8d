"""MEMO: the image's views should agree on one class, and be sure of it.

Zhang, Levine and Finn, NeurIPS 2022, arXiv 2110.09506: minimise the entropy of the class
probabilities averaged over augmented copies of one image. It needs only a classifier: no
self-supervised head, and nothing of the source domain. The published copies are those of `kind:
augmix`; the default are crops of changed brightness, over which the control `views` averages
without training. With `keep` only the surest views count, as in TPT (Shu et al., NeurIPS 2022,
arXiv 2209.07511); the control is then `views` with the same `keep`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State, entropy, surest
from tttlab.config.inner_loop import Augmentation
from tttlab.data.augmix import draw_views
from tttlab.data.views import log_mean_probabilities
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


@dataclass(frozen=True)
class MEMO(Method):
    """Minimise the entropy of the marginal prediction over views.

    Attributes:
        num_views: V, views drawn at every step.
        keep: share of the views, those of lowest entropy, that count at a step; at least one does.
        kind: of the views: ``crops`` of changed brightness | ``augmix``: AugMix of such crops.
    """

    protocols = ("episodic", "online")
    num_views: Annotated[int, Ge(2)] = 8
    keep: Annotated[float, Gt(0), Le(1)] = 1.0
    kind: Literal["crops", "augmix"] = "crops"
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Draw ``(B, V, 3, H, W)`` fresh views."""
        return draw_views(self.kind, images, generators, self.num_views, self.augmentation)

    def loss(
        self, net: Bound, views: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Entropy, in nats, of the mean class probabilities of ``views (V, 3, H, W)``."""
        logits = net(views).logits
        if self.keep < 1:
            logits = surest(logits, self.keep)
        return entropy(log_mean_probabilities(logits)), state
