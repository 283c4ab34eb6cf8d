"""LAME: neighbours in a batch should agree on their class; the network stays as it is.

Boudiaf, Mueller, Ben Ayed and Bertinetto, CVPR 2022, arXiv 2201.05718: of all assignments Z of a
batch's images to classes, find one that is near the network's probabilities Q and alike for
neighbours in feature space,

    min_Z  Σ_i KL(z_i ‖ q_i) − ½ Σ_ij w_ij z_iᵀ z_j

    by iterating  z_i ← softmax(log q_i + Σ_j w_ij z_j) .

Made for streams in which one class follows another; on shuffled streams it loses accuracy, as
others found too.

As in the authors' code, w_ij is 1 where j is one of the k nearest neighbours of i, and w is not
made symmetric (their ``LAME_FORCE_SYMMETRY: False``). The iteration then still has a fixed point,
but not at the minimum. ``symmetric: true`` puts it there: (w_ij + w_ji)/2 replaces w_ij.

What differs: the authors' configuration also offers a Gaussian of the distance, its default, and
the inner product for w; ours has the nearest neighbours alone.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from tttlab.adaptation.method import Method, State
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


@dataclass(frozen=True)
class LAME(Method):
    """Let neighbours agree.

    Attributes:
        num_neighbors: k, by cosine similarity.
        iterations: largest number of fixed-point iterations.
        symmetric: whether w is made symmetric.
    """

    protocols = ("online",)
    features = True
    trains = False
    num_neighbors: Annotated[int, Ge(1)] = 5
    iterations: Annotated[int, Ge(1)] = 100
    symmetric: bool = False

    def predict_batch(
        self, net: Bound, images: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Assign a batch: log-probabilities ``(N, K)``."""
        outputs = net(images)
        affinities = neighbor_affinities(outputs.features, self.num_neighbors, self.symmetric)
        return assign(outputs.logits.log_softmax(-1), affinities, self.iterations), state


def neighbor_affinities(features: Tensor, count: int, symmetric: bool = False) -> Tensor:
    """Join every image with its nearest neighbours.

    Args:
        features: ``(N, D)``.
        count: k.
        symmetric: average with the transpose: 1 for mutual neighbours, ½ for one-sided ones.

    Returns:
        w ``(N, N)``: in each row 1 for the neighbours, else 0.
    """
    directions = F.normalize(features)
    similarity = directions @ directions.T
    similarity.fill_diagonal_(-torch.inf)
    count = min(count, len(features) - 1)
    affinities = torch.zeros_like(similarity).scatter_(1, similarity.topk(count).indices, 1.0)
    return (affinities + affinities.T) / 2 if symmetric else affinities


def assign(
    log_probabilities: Tensor, affinities: Tensor, iterations: int, tolerance: float = 1e-8
) -> Tensor:
    """Iterate until the energy Σ_i KL(z_i ‖ q_i) − Σ_ij w_ij z_iᵀ z_j no longer changes.

    Args:
        log_probabilities: log Q ``(N, K)``.
        affinities: w ``(N, N)``.
        iterations: largest number of them.
        tolerance: relative change of the energy at which the iteration ends.

    Returns:
        log Z ``(N, K)``.
    """
    log_z, previous_energy = log_probabilities, torch.inf
    for _ in range(iterations):
        pairwise = affinities @ log_z.exp()
        log_z = (log_probabilities + pairwise).log_softmax(-1)
        energy = (log_z.exp() * (log_z - log_probabilities - pairwise)).sum()
        if abs(previous_energy - energy) <= tolerance * abs(energy):
            break
        previous_energy = energy
    return log_z
