"""Rotation: say by which multiple of 90° an image was turned.

Gidaris, Singh and Komodakis, ICLR 2018, arXiv 1803.07728; as a test-time objective, in a network of the form of a Y, Sun et
al., ICML 2020, arXiv 1909.13231: classifier and rotation have the encoder's first stages in common, and behind them each
has its own. Needs nothing from the source domain but that second branch. Of all objectives it is the one that images
without an upright position (textures, cells, views from above) cannot be trained with.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.errors import UserError
from tttlab.networks.network import Network, feature_width
from tttlab.networks.objective import Objective
from tttlab.networks.stages import Remainder, shared_part, stage_places
from tttlab.runtime.ranks import Share

TURNS = 4  # by 0°, 90°, 180° and 270°, against the clock


class RotationHead(nn.Module):
    """The second branch: the stages that are not shared, pooled, and a linear classifier of the turns."""

    objective = "rotation"

    def __init__(self, encoder: nn.Module, shared: int) -> None:
        super().__init__()
        self.shared = shared
        self.branch = Remainder(encoder, shared)
        self.classifier = nn.Linear(feature_width(encoder), TURNS)

    def branch_off(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """Classify the turns of ``images (N, 3, H, W)``, as the encoder wants them: logits ``(N, 4)``."""
        return self.classifier(self.branch(shared_part(encoder, images, self.shared)))


@dataclass(frozen=True)
class Rotation(Objective):
    """The rotation objective.

    Attributes:
        shared_stages: first stages (residual stages, transformer blocks) in common; None: half of them, rounded up, which are
            two of a ResNet's four.
    """

    shared_stages: int | None = None

    def head(self, encoder: nn.Module) -> RotationHead:
        """Build the branch for an encoder; its stages start as copies of the encoder's, fresh where these are.

        Raises:
            UserError: the encoder cannot be cut, or has fewer stages.
        """
        count = len(stage_places(encoder))
        shared = -(-count // 2) if self.shared_stages is None else self.shared_stages
        if not 1 <= shared <= count:
            raise UserError(
                f"objective.shared_stages: expected null or 1 to {count}, the stages of this "
                f"{type(encoder).__name__}, found {shared}"
            )
        return RotationHead(encoder, shared)

    def loss(
        self,
        network: Network,
        views: Tensor,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> Tensor:
        """Cross-entropy over all four turns of every image.

        Args:
            network: with a `RotationHead`.
            views: ``(N, 1, 3, S, S)``.
            generator: unused; objectives share one signature.
            share: unused: the whole batch's loss is the mean of the parts'.

        Returns:
            scalar, mean over images and turns.
        """
        del generator, share
        labels = torch.arange(TURNS, device=views.device).expand(len(views), -1)
        turned = torch.stack(
            [torch.rot90(views[:, 0], turns, (-2, -1)) for turns in range(TURNS)], dim=1
        )
        return F.cross_entropy(network(turned.flatten(0, 1), branch=True).branch, labels.flatten())


def rotate(images: Tensor, labels: Tensor) -> Tensor:
    """Turn every one of ``images (…, 3, S, S)`` by 90° · ``labels (…)``, in 0 to 3, against the clock."""
    turned = images
    for turns in range(1, TURNS):
        turned = torch.where(
            (labels == turns)[..., None, None, None], torch.rot90(images, turns, (-2, -1)), turned
        )
    return turned
