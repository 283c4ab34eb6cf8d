"""SimSiam: each view of an image predicts the projections of the others; no negatives.

Chen and He, CVPR 2021, arXiv 2011.10566. What is predicted is held fixed (stop-gradient), without which all images would end in
one point. Needs nothing from the source domain but the two heads.
"""

from dataclasses import dataclass

import torch
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.networks.network import Network, feature_width
from tttlab.networks.objective import Objective
from tttlab.runtime.ranks import Share


class SimSiamHead(nn.Module):
    """lightly's SimSiam heads, ``features (N, D)`` → projections and predictions ``(N, P)``."""

    objective = "simsiam"

    def __init__(
        self, input_dim: int, hidden_dim: int, projection_dim: int, prediction_dim: int
    ) -> None:
        super().__init__()
        self.projection = SimSiamProjectionHead(input_dim, hidden_dim, projection_dim)
        self.prediction = SimSiamPredictionHead(projection_dim, prediction_dim, projection_dim)

    def project_and_predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Project ``features (N, D)`` to ``(N, P)``, and predict from this, ``(N, P)``, what another view's would be."""
        projections = self.projection(features)
        return projections, self.prediction(projections)


@dataclass(frozen=True)
class SimSiam(Objective):
    """The objective of positives only.

    Attributes:
        hidden_dim: width of the projection head.
        projection_dim: P.
        prediction_dim: width of the prediction head, a bottleneck.
    """

    hidden_dim: int = 128
    projection_dim: int = 128
    prediction_dim: int = 32
    num_views = 2

    def head(self, encoder: nn.Module) -> SimSiamHead:
        """Build both heads for an encoder."""
        return SimSiamHead(
            feature_width(encoder), self.hidden_dim, self.projection_dim, self.prediction_dim
        )

    def loss(
        self,
        network: Network,
        views: Tensor,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> Tensor:
        """Negative cosine similarity, symmetrised.

        Args:
            network: with a `SimSiamHead`.
            views: ``(N, 2, 3, H, W)``.
            generator: unused; objectives share one signature.
            share: unused: but for BatchNorm, the whole batch's loss is the mean of the parts'.

        Returns:
            scalar in [−1, 1], mean over images.
        """
        del generator, share
        found = network(views.flatten(0, 1))
        predictions, projections = (
            part.unflatten(0, views.shape[:2]) for part in (found.predictions, found.projections)
        )
        return disagreement(predictions, projections)


def disagreement(predictions: Tensor, projections: Tensor) -> Tensor:
    """Negative cosine similarity of each view's prediction with the projections of the image's other views.

    With two views this is the published symmetrised loss; with more, every ordered pair counts once.

    Args:
        predictions: ``(…, V, P)``, V ≥ 2.
        projections: ``(…, V, P)``; held fixed.

    Returns:
        scalar, mean over images and their V·(V − 1) pairs.
    """
    count = predictions.shape[-2]
    cosines = F.normalize(predictions, dim=-1) @ F.normalize(projections.detach(), dim=-1).mT
    others = 1 - torch.eye(count, device=cosines.device, dtype=cosines.dtype)
    return -(cosines * others).sum((-2, -1)).mean() / (count * (count - 1))
