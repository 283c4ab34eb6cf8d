"""An encoder cut behind one of its stages: what comes out there, and a copy of all that follows.

A stage is what timm's ``feature_info`` lists: a residual stage, or a transformer block; the stem is none, and the first stage
has the number 1.
"""

import copy
from collections.abc import Sequence

import torch
from timm.models import ConvNeXt, RegNet, ResNet, VisionTransformer
from torch import Tensor, nn

from tttlab.errors import UserError

STEMS = ("act1", "bn1", "norm0", "stem")
# Families that are a chain of stages; what follows the last of them before the pooling.
CHAINS = {
    ConvNeXt: ("norm_pre",),
    RegNet: ("final_conv",),
    ResNet: (),
    VisionTransformer: ("norm",),
}


def stage_places(encoder: nn.Module) -> list[int]:
    """Find where ``feature_info`` has the stages, in order."""
    names = [stage["module"].rpartition(".")[2] for stage in encoder.feature_info]
    return [place for place, name in enumerate(names) if name not in STEMS]


def stage_widths(encoder: nn.Module) -> list[int]:
    """Give the channels of every stage's output."""
    return [encoder.feature_info[place]["num_chs"] for place in stage_places(encoder)]


def stage_maps(encoder: nn.Module, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
    """Run an encoder as far as the last of some stages.

    Args:
        encoder: any timm model that knows ``forward_intermediates``.
        images: ``(N, 3, H, W)`` as the encoder wants them.
        stages: numbers of stages, growing.

    Returns:
        for each of them ``(N, C, H', W')``, of transformers the patches' tokens without the class token.
    """
    places = stage_places(encoder)
    wanted = [places[stage - 1] for stage in stages]
    return encoder.forward_intermediates(
        images, indices=wanted, stop_early=True, intermediates_only=True
    )


def shared_part(encoder: nn.Module, images: Tensor, stage: int) -> Tensor:
    """Run one of the `CHAINS` as far as a stage.

    Args:
        encoder: the encoder.
        images: ``(N, 3, H, W)`` as the encoder wants them.
        stage: number of the stage.

    Returns:
        what the next one reads: ``(N, C, H', W')``, or all tokens ``(N, L, C)``.
    """
    if not isinstance(encoder, VisionTransformer):
        return stage_maps(encoder, images, [stage])[0]
    (found,) = encoder.forward_intermediates(
        images,
        [stage - 1],
        return_prefix_tokens=True,
        output_fmt="NLC",
        stop_early=True,
        intermediates_only=True,
    )
    return (
        found if isinstance(found, Tensor) else torch.cat(found[::-1], dim=1)
    )  # (patches, prefix), or no prefix


class Remainder(nn.Module):
    """All that follows a stage, with the pooling: a copy, weights included, of its own.

    Raises:
        UserError: the encoder is none of the `CHAINS`.
    """

    def __init__(self, encoder: nn.Module, stage: int) -> None:
        super().__init__()
        kind = next((kind for kind in CHAINS if isinstance(encoder, kind)), None)
        if kind is None:
            names = ", ".join(sorted(known.__name__ for known in CHAINS))
            raise UserError(
                f"expected an encoder that can be cut behind a stage ({names}), found {type(encoder).__name__}; "
                "choose such a backbone or another objective"
            )
        copied = copy.deepcopy(encoder)
        stages = [encoder.feature_info[place]["module"] for place in stage_places(encoder)]
        self.stages = nn.Sequential(
            *(copied.get_submodule(name) for name in [*stages[stage:], *CHAINS[kind]])
        )
        last = [*stages, *CHAINS[kind]][-1].partition(".")[0]
        for name in [*dict(copied.named_children())]:
            setattr(copied, name, nn.Identity())
            if name == last:
                break
        for name in [
            *dict(copied.named_parameters(recurse=False))
        ]:  # class token, position embedding
            copied.register_parameter(name, None)
        self.pooling = copied  # of which nothing is left but what pools

    def forward(self, activation: Tensor) -> Tensor:
        """Go on from what `shared_part` gives: features ``(N, D)``."""
        return self.pooling.forward_head(self.stages(activation), pre_logits=True)
