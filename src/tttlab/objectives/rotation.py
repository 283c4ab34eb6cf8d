"""Rotation: predict by which multiple of 90° an image was turned.

Gidaris, Singh and Komodakis, ICLR 2018, arXiv 1803.07728; as a test-time objective Sun et al., ICML
2020, arXiv 1909.13231, with a Y-shaped network: classification and rotation share the encoder's
first stages, and each has its own later stages. It needs only the rotation branch from the source
domain. It does not work for images without an upright position (textures, cells, aerial views).
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.errors import UserError
from tttlab.networks.network import Network, feature_width
from tttlab.networks.objective import Objective
from tttlab.networks.stages import Remainder, find_stage_indices, shared_part
from tttlab.runtime.ranks import Share

TURNS = 4  # 0°, 90°, 180° and 270°, counter-clockwise


class RotationHead(nn.Module):
    """The rotation branch: a copy of the stages that are not shared, and a linear classifier."""

    objective = "rotation"

    def __init__(self, encoder: nn.Module, shared: int) -> None:
        super().__init__()
        self.shared = shared
        self.branch = Remainder(encoder, shared)
        self.classifier = nn.Linear(feature_width(encoder), TURNS)

    def branch_off(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """Compute the rotation logits ``(N, 4)``.

        Args:
            encoder: the encoder.
            images: ``(N, 3, H, W)``, standardised for the encoder.
        """
        return self.classifier(self.branch(shared_part(encoder, images, self.shared)))


@dataclass(frozen=True)
class Rotation(Objective):
    """The rotation objective.

    Attributes:
        shared_stages: number of first stages (residual stages, transformer blocks) that both tasks
            share; None: half of all, rounded up, two of a ResNet's four.
    """

    shared_stages: Annotated[int, Ge(1)] | None = None

    def head(self, encoder: nn.Module) -> RotationHead:
        """Build the branch for an encoder; its stages start as copies of the encoder's.

        Raises:
            UserError: the encoder cannot be cut, or does not have so many stages.
        """
        count = len(find_stage_indices(encoder))
        shared = math.ceil(count / 2) if self.shared_stages is None else self.shared_stages
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
        """Compute the cross-entropy over all four turns of every image.

        Args:
            network: with a `RotationHead`.
            views: ``(N, 1, 3, S, S)``.
            generator: unused; objectives share one signature.
            share: unused; the whole batch's loss is the mean of the parts' losses.

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
    """Turn each of ``images (…, 3, S, S)`` counter-clockwise by 90° · its label, 0 to 3."""
    rotated = images
    for turns in range(1, TURNS):
        selected = (labels == turns)[..., None, None, None]
        rotated = torch.where(selected, torch.rot90(images, turns, (-2, -1)), rotated)
    return rotated
