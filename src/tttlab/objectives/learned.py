"""A learned task: reconstruct, from features, a projection of the image that is learned as well.

After Sun et al. 2023 ("Learning to (Learn at Test Time)", arXiv 2310.13807), who learn the task of
a layer's inner training; here it is the task of the whole network. At every position of a stage's
map, a linear decoder A of the features z reconstructs a linear projection B of the pixels x there:

    loss = mean over positions of ½ ‖A z − B x‖²

The loss itself says nothing about A and B: both at zero would be perfect. Only meta-learned
fine-tuning trains them, by what a step on this loss does for the classifier (``finetune.mode:
meta`` with ``objective_weight: 0.0``). The step looks at the very pixels that are classified, in
training as at test time. With ``trained: false`` they stay as drawn: a control.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from tttlab.networks.network import Network, evaluating
from tttlab.networks.objective import Objective
from tttlab.networks.stages import stage_maps, widths_at
from tttlab.runtime.ranks import Share

SIDE = 64  # of the image that tells a convolutional encoder's strides, pixels


class LearnedHead(nn.Module):
    """A decoder of a stage's features and a projection of the pixels, both linear."""

    objective = "learned"

    def __init__(self, stage: int, width: int, stride: int, dim: int) -> None:
        super().__init__()
        self.stage = stage
        self.decoder = nn.Conv2d(width, dim, 1)
        self.projection = nn.Conv2d(3, dim, stride, stride)

    def branch_off(self, encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute reconstructions and targets, each ``(N, dim, H', W')``.

        Args:
            encoder: the encoder.
            images: ``(N, 3, H, W)``, standardised for the encoder.
        """
        (features,) = stage_maps(encoder, images, [self.stage])
        return self.decoder(features), self.projection(images)


@dataclass(frozen=True)
class Learned(Objective):
    """The learned reconstruction.

    Attributes:
        stage: number of the stage (residual stage, transformer block) that is decoded, from 1.
        dim: width of what is reconstructed.
        trained: whether decoder and projection are trained; False: they stay random.
    """

    stage: Annotated[int, Ge(1)] = 1
    dim: Annotated[int, Ge(1)] = 64
    trained: bool = True
    meta = True

    def head(self, encoder: nn.Module) -> LearnedHead:
        """Build decoder and projection for an encoder.

        Raises:
            UserError: the encoder does not have this stage.
        """
        (width,) = widths_at(encoder, [self.stage], "learned", "stage")
        stride = stride_of(encoder, self.stage)
        head = LearnedHead(self.stage, width, stride, self.dim).requires_grad_(self.trained)
        if self.trained:
            # The first steps move nothing: a network that is trained already is left as it is.
            nn.init.zeros_(head.decoder.weight)
        return head

    def loss(
        self,
        network: Network,
        views: Tensor,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> Tensor:
        """Compute the error of the reconstruction.

        Args:
            network: with a `LearnedHead`.
            views: ``(N, 1, 3, H, W)``.
            generator: unused; objectives share one signature.
            share: unused; the whole batch's loss is the mean of the parts'.

        Returns:
            scalar, mean over images and positions.
        """
        del generator, share
        return reconstruction_error(*network(views[:, 0], branch=True).branch)


def stride_of(encoder: nn.Module, stage: int) -> int:
    """Measure how many pixels apart the positions of a stage's map are."""
    embedding = getattr(encoder, "patch_embed", None)
    side = embedding.img_size[0] if getattr(embedding, "img_size", None) else SIDE
    weight = next(encoder.parameters())
    with evaluating(encoder), torch.no_grad():
        (features,) = stage_maps(encoder, weight.new_zeros(1, 3, side, side), [stage])
    return side // features.shape[-1]


def reconstruction_error(reconstructions: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance of ``(N, dim, H, W)``, mean over images and common positions.

    Where the sides are no multiple of the stride, one map has a row and a column more.
    """
    height, width = map(min, reconstructions.shape[-2:], targets.shape[-2:])
    common = (..., slice(height), slice(width))
    return (reconstructions[common] - targets[common]).square().sum(1).mean() / 2
