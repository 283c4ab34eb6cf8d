"""ClusT3: linear heads assign the positions of early feature maps to clusters.

Vargas Hakim et al., ICCV 2023, arXiv 2310.12345. The objective maximises the mutual information of
a position's features X and its cluster Z: it minimises H(Z|X) − H(Z), so that assignments are
confident and clusters equally frequent. It needs only the heads from the source domain. The paper
sums the heads' losses; here they are averaged, so that the loss lies in [−log K, 0].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Len
from torch import Tensor, nn

from tttlab.errors import pipeline_extra
from tttlab.networks.network import Network
from tttlab.networks.objective import Objective
from tttlab.networks.stages import stage_maps, widths_at
from tttlab.runtime.ranks import Share

with pipeline_extra():
    from tttlab.config.values import DISTINCT
    from tttlab.objectives.simclr import gather


class ClusterHeads(nn.Module):
    """M linear classifiers of K clusters at each of some stages, shared by all positions."""

    objective = "clust3"

    def __init__(
        self, stages: Sequence[int], widths: Sequence[int], heads: int, clusters: int
    ) -> None:
        super().__init__()
        self.stages, self.shape = tuple(stages), (heads, clusters)
        self.layers = nn.ModuleList(nn.Linear(width, heads * clusters) for width in widths)

    def branch_off(self, encoder: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the cluster logits ``(N, L, M, K)`` of every stage.

        Args:
            encoder: the encoder.
            images: ``(N, 3, H, W)``, standardised for the encoder.
        """
        maps = stage_maps(encoder, images, self.stages)
        logits = []
        for layer, activation in zip(self.layers, maps, strict=True):
            positions = activation.flatten(2).transpose(1, 2)
            logits.append(layer(positions).unflatten(-1, self.shape))
        return tuple(logits)


@dataclass(frozen=True)
class ClusT3(Objective):
    """The clustering objective.

    Attributes:
        stages: numbers of the stages (residual stages, transformer blocks) with heads, from 1.
        heads: M, classifiers at each stage.
        clusters: K.
    """

    stages: Annotated[tuple[Annotated[int, Ge(1)], ...], Len(1), DISTINCT] = (1, 2)
    heads: Annotated[int, Ge(1)] = 5
    clusters: Annotated[int, Ge(2)] = 10

    def head(self, encoder: nn.Module) -> ClusterHeads:
        """Build the heads for an encoder.

        Raises:
            UserError: the encoder does not have these stages.
        """
        stages = sorted(self.stages)
        stage_channels = widths_at(encoder, stages, "clust3", "stages")
        return ClusterHeads(stages, stage_channels, self.heads, self.clusters)

    def loss(
        self,
        network: Network,
        views: Tensor,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> Tensor:
        """Compute `lost_information` over all positions of a batch.

        Args:
            network: with `ClusterHeads`.
            views: ``(N, 1, 3, H, W)``.
            generator: unused; objectives share one signature.
            share: which part of the batch ``views`` holds; None: all of it.

        Returns:
            scalar, of the whole batch, the same on every rank.
        """
        del generator
        return lost_information(network(views[:, 0], branch=True).branch, share)


def lost_information(assignments: Sequence[Tensor], share: Share | None = None) -> Tensor:
    """H(Z|X) − H(Z) in nats: mean entropy of the assignments minus the entropy of their mean.

    It is 0 if all positions have the same assignment, and −log K if each is confident and all K
    clusters are equally frequent.

    Args:
        assignments: logits ``(N, L, M, K)`` of every stage.
        share: which part of a batch the N images are; None: all of it.

    Returns:
        scalar, mean over stages and their M heads.
    """
    losses = []
    for logits in assignments:
        log_p = logits.log_softmax(-1)
        entropies = -(log_p.exp() * log_p).sum(-1).mean(1)  # (N, M)
        log_means = log_p.logsumexp(1) - math.log(log_p.shape[1])  # (N, M, K)
        if share and share.ranks > 1:
            entropies, log_means = gather(entropies, share), gather(log_means, share)
        log_marginal = log_means.logsumexp(0) - math.log(len(log_means))
        losses.append((entropies.mean(0) + (log_marginal.exp() * log_marginal).sum(-1)).mean())
    return torch.stack(losses).mean()
