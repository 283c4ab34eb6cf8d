"""SimCLR: projections of one image's views agree, those of different images do not.

Chen et al., ICML 2020, arXiv 2002.05709. At test time it needs projections of source images as
negatives: the NT-Xent loss of a single image's views is constant.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.errors import pipeline_extra
from tttlab.networks.network import Network, feature_width
from tttlab.networks.objective import Objective
from tttlab.runtime.ranks import Share

with pipeline_extra():
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead
    from lightly.utils import dist


class Projector(nn.Module):
    """lightly's SimCLR projection head, ``features (N, D)`` → ``projections (N, P)``."""

    objective = "simclr"

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.layers = SimCLRProjectionHead(input_dim, hidden_dim, output_dim)

    def project(self, features: Tensor) -> Tensor:
        """Project ``features (N, D)`` to ``(N, P)``."""
        return self.layers(features)


@dataclass(frozen=True)
class SimCLR(Objective):
    """The contrastive objective.

    Attributes:
        temperature: τ of NT-Xent.
        hidden_dim: width of the projection head.
        projection_dim: P.
    """

    temperature: Annotated[float, Gt(0)] = 0.5
    hidden_dim: Annotated[int, Ge(1)] = 128
    projection_dim: Annotated[int, Ge(1)] = 64
    num_views = 2
    alone = False  # its negatives are other images

    def head(self, encoder: nn.Module) -> Projector:
        """Build the projection head for an encoder."""
        return Projector(feature_width(encoder), self.hidden_dim, self.projection_dim)

    def loss(
        self,
        network: Network,
        views: Tensor,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> Tensor:
        """Compute NT-Xent over a batch.

        Args:
            network: with a `Projector` as head.
            views: ``(N, 2, 3, H, W)``.
            generator: unused; objectives share one signature.
            share: which part of the batch ``views`` holds; None: all of it.

        Returns:
            scalar, mean over the anchors of the whole batch, the same on every rank.
        """
        del generator
        projections = network(views.flatten(0, 1)).projections.unflatten(0, views.shape[:2])
        if share and share.ranks > 1:
            projections = gather(projections, share)
        return nt_xent(projections, self.temperature)


def nt_xent(projections: Tensor, temperature: float) -> Tensor:
    """Compute NT-Xent of two views per image; the other images' views are the negatives.

    Args:
        projections: ``(N, 2, P)``.
        temperature: τ.

    Returns:
        scalar, mean over the 2·N anchors; 0 for a single image, which has no negatives.
    """
    return NTXentLoss(temperature, memory_bank_size=0)(projections[:, 0], projections[:, 1])


def gather(rows: Tensor, share: Share) -> Tensor:
    """Gather the rows of a batch from all ranks; a row's gradient sums over all ranks' losses.

    ``NTXentLoss(gather_distributed=True)`` would need equally many images on every rank.

    Args:
        rows: ``(n, …)`` of this rank.
        share: which part of the batch they are.

    Returns:
        ``(N, …)``, the same on all ranks.
    """
    padding = rows.new_zeros(max(share.sizes) - len(rows), *rows.shape[1:])
    parts = dist.gather(torch.cat([rows, padding]))
    return torch.cat([part[:size] for part, size in zip(parts, share.sizes, strict=True)])


def bank_contrast(projections: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """Compute NT-Xent of one image's views with a bank of source projections as negatives.

    Every ordered pair of views is an anchor and its positive. Only the bank's rows are negatives:
    −log e^{sᵢⱼ/τ} / (e^{sᵢⱼ/τ} + Σ_b e^{sᵢb/τ}), with cosine similarity s.

    Args:
        projections: ``(V, P)``, V ≥ 2.
        bank: ``(M, P)`` projections of source images.
        temperature: τ.

    Returns:
        scalar, mean over the V·(V − 1) pairs.
    """
    count = projections.shape[0]
    projections, bank = F.normalize(projections, dim=-1), F.normalize(bank, dim=-1)
    positives = projections @ projections.T / temperature
    negatives = torch.logsumexp(projections @ bank.T / temperature, dim=-1, keepdim=True)
    losses = torch.logaddexp(positives, negatives) - positives
    off_diagonal = 1 - torch.eye(count, device=losses.device, dtype=losses.dtype)
    return (losses * off_diagonal).sum() / (count * (count - 1))
