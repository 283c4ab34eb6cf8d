"""Averaging over augmented views without training: what the views alone are worth.

A method that trains on views must beat it: it costs the same forward passes and no backward ones.
"""

import math
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
class ViewAverage(Method):
    """Average the class probabilities of the image and its views, or let the surest views vote.

    Reference:
        Farina et al., NeurIPS 2024, arXiv 2405.18330 (ZERO), for ``keep`` and ``vote``: what a step
        of entropy minimisation over confident views predicts is mostly what they say already.

    Attributes:
        num_views: V, number of augmented views beside the image itself, which is one more.
        keep: share of these 1 + V, those of lowest entropy, that count; at least one does.
        vote: True: a view has one vote for its likeliest class, as in ZERO. False: the views' class
            probabilities are averaged.
        kind: of the views: ``crops`` of changed brightness | ``augmix``: AugMix of such crops.
    """

    protocols = ("episodic", "online")
    trains = False
    num_views: Annotated[int, Ge(1)] = 8
    keep: Annotated[float, Gt(0), Le(1)] = 1.0
    vote: bool = False
    kind: Literal["crops", "augmix"] = "crops"
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def averaged_views(self) -> int:
        """Tell how many views the prediction averages over."""
        return self.num_views

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
        logits = net(views).logits
        if self.keep < 1:
            logits = surest(logits, self.keep)
        mean = log_mean_probabilities(logits)
        if not self.vote:
            return mean
        classes = torch.arange(logits.shape[-1], device=logits.device)
        votes = (logits.argmax(-1, keepdim=True) == classes).sum(0)
        # In logarithms, for a very sure network's probabilities are zero as numbers.
        return torch.logaddexp(votes.to(mean).log(), mean) - math.log(len(logits) + 1)
