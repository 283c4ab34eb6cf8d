"""LAME: neighbours in a batch should agree on their class; the network stays as it is.

Boudiaf, Mueller, Ben Ayed and Bertinetto, CVPR 2022, arXiv 2201.05718: of all assignments Z of a batch's images to classes find
one that is near the network's probabilities Q and alike for neighbours in feature space,

    min_Z  Σ_i KL(z_i ‖ q_i) − ½ Σ_ij w_ij z_iᵀ z_j ,    by iterating    z_i ← softmax(log q_i + Σ_j w_ij z_j) .

Made for streams in which one class follows another; on shuffled ones it loses accuracy, as others found too.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from tttlab.method import Method, State
from tttlab.networks import Bound
from tttlab.source_statistics import Statistics


@dataclass(frozen=True)
class LAME(Method):
    """Let neighbours agree.

    Attributes:
        num_neighbors: k of the symmetric k-nearest-neighbour affinities, by cosine similarity.
        iterations: most fixed-point iterations.
    """

    protocols = ("online",)
    trains = False
    num_neighbors: Annotated[int, Ge(1)] = 5
    iterations: Annotated[int, Ge(1)] = 100

    def predict_batch(self, net: Bound, images: Tensor, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Assign a batch: log-probabilities ``(N, K)``."""
        outputs = net(images)
        affinities = neighbor_affinities(outputs.features, self.num_neighbors)
        return assign(outputs.logits.log_softmax(-1), affinities, self.iterations), state


def neighbor_affinities(features: Tensor, count: int) -> Tensor:
    """Join every image with its nearest neighbours: ``(N, N)``, 1 for mutual ones, ½ for one-sided ones, 0 on the diagonal."""
    directions = F.normalize(features)
    similarity = directions @ directions.T
    similarity.fill_diagonal_(-torch.inf)
    count = min(count, len(features) - 1)
    nearest = torch.zeros_like(similarity).scatter_(1, similarity.topk(count).indices, 1.0)
    return (nearest + nearest.T) / 2


def assign(log_probabilities: Tensor, affinities: Tensor, iterations: int, tolerance: float = 1e-8) -> Tensor:
    """Iterate to the fixed point, or until the objective stands still: log-assignments ``(N, K)``."""
    found, before = log_probabilities, torch.inf
    for _ in range(iterations):
        assignment = found.exp()
        energy = (assignment * (found - log_probabilities)).sum() - (affinities * (assignment @ assignment.T)).sum() / 2
        if abs(before - energy) <= tolerance * abs(energy):
            break
        found, before = (log_probabilities + affinities @ assignment).log_softmax(-1), energy
    return found
