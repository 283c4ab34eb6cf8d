"""Confident views: many views of the image, of which only the surest vote. Nothing is trained.

After ZERO (Farina et al., NeurIPS 2024, arXiv 2405.18330), which asks a vision-language model: what
a step of entropy minimisation over confident views predicts is mostly what these views say already.
So a method that trains on views must beat it, too: it costs their forward passes alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from tttlab.adaptation.method import Method, surest
from tttlab.config.inner_loop import Augmentation
from tttlab.data.augmix import draw_views
from tttlab.data.views import log_mean_probabilities
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


@dataclass(frozen=True)
class ConfidentViews(Method):
    """Let the views of lowest entropy vote.

    Attributes:
        num_views: V, number of augmented views beside the image itself, which is one more.
        keep: share of these 1 + V that vote; at least one does.
        vote: True: a view has one vote for its likeliest class, as in the paper. False: the views'
            class probabilities are averaged.
        kind: of the views: ``crops`` of changed brightness | ``augmix``: AugMix of such crops.
    """

    protocols = ("episodic", "online")
    trains = False
    num_views: Annotated[int, Ge(1)] = 32
    keep: Annotated[float, Gt(0), Le(1)] = 0.3
    vote: bool = True
    kind: Literal["crops", "augmix"] = "crops"
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Draw the views, the image itself first: ``(B, 1 + V, 3, H, W)``."""
        drawn = draw_views(self.kind, images, generators, self.num_views, self.augmentation)
        return torch.cat([images.unsqueeze(1), drawn], dim=1)

    def predict(self, net: Bound, image: Tensor, views: Tensor, statistics: Statistics) -> Tensor:
        """Return the logarithm of each class's share ``(K,)``.

        With votes, the mean probabilities of the views that vote count as one voter more: they
        decide where votes are equal, and no share is zero.
        """
        kept = surest(net(views).logits, self.keep)
        mean = log_mean_probabilities(kept)
        if not self.vote:
            return mean
        classes = torch.arange(kept.shape[-1], device=kept.device)
        votes = (kept.argmax(-1, keepdim=True) == classes).sum(0)
        return ((votes + mean.exp()) / (len(kept) + 1)).log()
