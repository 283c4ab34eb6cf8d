"""SimSiam: each view of an image predicts the projections of its other views; no negatives.

Chen and He, CVPR 2021, arXiv 2011.10566. The projections that are predicted get no gradient
(stop-gradient); otherwise all images would collapse to one point. It needs only the two heads from
the source domain.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.errors import pipeline_extra
from tttlab.networks.network import Network, feature_width
from tttlab.networks.objective import Objective
from tttlab.runtime.ranks import Share

with pipeline_extra():
    from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead


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
        """Turn ``features (N, D)`` into projections and predictions, each ``(N, P)``."""
        projections = self.projection(features)
        return projections, self.prediction(projections)


@dataclass(frozen=True)
class SimSiam(Objective):
    """The objective of positive pairs only.

    Attributes:
        hidden_dim: width of the projection head.
        projection_dim: P.
        prediction_dim: width of the prediction head, a bottleneck.
    """

    hidden_dim: Annotated[int, Ge(1)] = 128
    projection_dim: Annotated[int, Ge(1)] = 128
    prediction_dim: Annotated[int, Ge(1)] = 32
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
        """Compute the symmetrised negative cosine similarity.

        Args:
            network: with a `SimSiamHead`.
            views: ``(N, 2, 3, H, W)``.
            generator: unused; objectives share one signature.
            share: unused; apart from BatchNorm, the whole batch's loss is the mean of the parts'.

        Returns:
            scalar in [−1, 1], mean over images.
        """
        del generator, share
        outputs = network(views.flatten(0, 1))
        predictions = outputs.predictions.unflatten(0, views.shape[:2])
        projections = outputs.projections.unflatten(0, views.shape[:2])
        return disagreement(predictions, projections)


def disagreement(predictions: Tensor, projections: Tensor) -> Tensor:
    """Compute the negative cosine similarity of predictions with the other views' projections.

    With two views this is the published symmetrised loss; with more it is the mean over all ordered
    pairs.

    Args:
        predictions: ``(…, V, P)``, V ≥ 2.
        projections: ``(…, V, P)``; without gradient.

    Returns:
        scalar, mean over images and their V·(V − 1) pairs.
    """
    count = predictions.shape[-2]
    cosines = F.normalize(predictions, dim=-1) @ F.normalize(projections.detach(), dim=-1).mT
    off_diagonal = 1 - torch.eye(count, device=cosines.device, dtype=cosines.dtype)
    return -(cosines * off_diagonal).sum((-2, -1)).mean() / (count * (count - 1))
