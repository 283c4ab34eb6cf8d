"""ClusT3: linear heads sort the places of early feature maps into clusters, surely and evenly.

Vargas Hakim et al., ICCV 2023, arXiv 2310.12345: the information that a place's features X give on its cluster Z is to be
large, that is, H(Z|X) − H(Z) small. Needs nothing from the source domain but the heads. The paper adds the heads' losses
up, here is their mean, which lies in [−log K, 0] for any number of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tttlab.errors import UserError
from tttlab.networks.network import Network
from tttlab.networks.objective import Objective
from tttlab.networks.stages import stage_maps, stage_widths
from tttlab.objectives.simclr import gather
from tttlab.runtime.ranks import Share


class ClusterHeads(nn.Module):
    """At the output of some stages M linear classifiers of K clusters each, the same at all places of the map."""

    objective = "clust3"

    def __init__(
        self, stages: Sequence[int], widths: Sequence[int], heads: int, clusters: int
    ) -> None:
        super().__init__()
        self.stages, self.shape = tuple(stages), (heads, clusters)
        self.layers = nn.ModuleList(nn.Linear(width, heads * clusters) for width in widths)

    def branch_off(self, encoder: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        """Sort the places of ``images (N, 3, H, W)``, as the encoder wants them: per stage logits ``(N, L, M, K)``."""
        maps = stage_maps(encoder, images, self.stages)
        places = (activation.flatten(2).transpose(1, 2) for activation in maps)
        return tuple(
            layer(own).unflatten(-1, self.shape)
            for layer, own in zip(self.layers, places, strict=True)
        )


@dataclass(frozen=True)
class ClusT3(Objective):
    """The clustering objective.

    Attributes:
        stages: numbers of the stages (residual stages, transformer blocks) that have heads, the first being 1.
        heads: M, classifiers at each of them.
        clusters: K.
    """

    stages: Sequence[int] = (1, 2)
    heads: int = 5
    clusters: int = 10

    def head(self, encoder: nn.Module) -> ClusterHeads:
        """Build the heads for an encoder.

        Raises:
            UserError: the encoder has fewer stages, or none.
        """
        if not hasattr(encoder, "forward_intermediates"):
            raise UserError(
                f"objective clust3 needs a backbone with stages that timm can stop at (forward_intermediates), "
                f"found {type(encoder).__name__}; choose another backbone or objective"
            )
        stages, widths = sorted(self.stages), stage_widths(encoder)
        if not 1 <= stages[0] <= stages[-1] <= len(widths):
            raise UserError(
                f"objective.stages: expected numbers from 1 to {len(widths)}, the stages of this "
                f"{type(encoder).__name__}, found {list(self.stages)}"
            )
        return ClusterHeads(
            stages, [widths[stage - 1] for stage in stages], self.heads, self.clusters
        )

    def loss(
        self,
        network: Network,
        views: Tensor,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> Tensor:
        """Lost information over the places of all images of a batch.

        Args:
            network: with `ClusterHeads`.
            views: ``(N, 1, 3, H, W)``.
            generator: unused; objectives share one signature.
            share: the part of the batch that ``views`` are; None: all of it.

        Returns:
            scalar, of the whole batch, on every rank.
        """
        del generator
        return lost_information(network(views[:, 0], branch=True).branch, share)


def lost_information(assignments: Sequence[Tensor], share: Share | None = None) -> Tensor:
    """Mean entropy of the places' clusters less the entropy of their mean: H(Z|X) − H(Z), in nats.

    0 where all places are alike; −log K where each is sure of its cluster and all K clusters are as frequent.

    Args:
        assignments: per stage logits ``(N, L, M, K)``.
        share: the part of a batch that these N images are; None: all of it.

    Returns:
        scalar, mean over stages and their M heads.
    """
    terms = []
    for logits in assignments:
        own = logits.log_softmax(-1)
        entropies = -(own.exp() * own).sum(-1).mean(1)  # (N, M)
        marginals = own.logsumexp(1) - math.log(own.shape[1])  # logarithms, (N, M, K)
        if share and share.ranks > 1:
            entropies, marginals = gather(entropies, share), gather(marginals, share)
        marginal = marginals.logsumexp(0) - math.log(len(marginals))
        terms.append((entropies.mean(0) + (marginal.exp() * marginal).sum(-1)).mean())
    return torch.stack(terms).mean()
