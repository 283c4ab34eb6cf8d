"""An encoder cut after one of its stages: the activation there, and a copy of the layers after it.

Stages are the entries of timm's ``feature_info`` except the stem: residual stages or transformer
blocks. They are numbered from 1.
"""

import copy
from collections.abc import Sequence

import torch
from timm.models import ConvNeXt, RegNet, ResNet, VisionTransformer
from torch import Tensor, nn

from tttlab.errors import UserError

STEMS = ("act1", "bn1", "norm0", "stem")
# Encoders that are a chain of stages → the layers between the last stage and the pooling.
CHAINS = {
    ConvNeXt: ("norm_pre",),
    RegNet: ("final_conv",),
    ResNet: (),
    VisionTransformer: ("norm",),
}


def find_stage_indices(encoder: nn.Module) -> list[int]:
    """Return the indices of the stages in ``feature_info``, in order."""
    names = [stage["module"].rpartition(".")[2] for stage in encoder.feature_info]
    return [index for index, name in enumerate(names) if name not in STEMS]


def stage_widths(encoder: nn.Module) -> list[int]:
    """Return the number of channels of every stage's output."""
    return [encoder.feature_info[index]["num_chs"] for index in find_stage_indices(encoder)]


def widths_at(encoder: nn.Module, stages: Sequence[int], objective: str, key: str) -> list[int]:
    """Return the number of channels at some stages, for an objective's head.

    Args:
        encoder: the encoder.
        stages: numbers of the stages, ascending.
        objective: its name, for messages.
        key: of its setting that holds the stages, for messages.

    Raises:
        UserError: the encoder cannot stop at a stage, or does not have these.
    """
    if not hasattr(encoder, "forward_intermediates"):
        raise UserError(
            f"objective {objective} needs a backbone with stages "
            "that timm can stop at (forward_intermediates), "
            f"found {type(encoder).__name__}; choose another backbone or objective"
        )
    widths = stage_widths(encoder)
    if not 1 <= stages[0] <= stages[-1] <= len(widths):
        raise UserError(
            f"objective.{key}: expected numbers from 1 to {len(widths)}, the stages of this "
            f"{type(encoder).__name__}, found {list(stages)}"
        )
    return [widths[stage - 1] for stage in stages]


def stage_maps(encoder: nn.Module, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
    """Return the outputs of some stages; the encoder stops after the last of them.

    Args:
        encoder: any timm model that has ``forward_intermediates``.
        images: ``(N, 3, H, W)``, standardised for the encoder.
        stages: numbers of the stages, ascending.

    Returns:
        ``(N, C, H', W')`` for each stage; for transformers the patch tokens without class token.
    """
    stage_indices = find_stage_indices(encoder)
    indices = [stage_indices[stage - 1] for stage in stages]
    return encoder.forward_intermediates(
        images, indices=indices, stop_early=True, intermediates_only=True
    )


def shared_part(encoder: nn.Module, images: Tensor, stage: int) -> Tensor:
    """Run one of the `CHAINS` up to and including a stage.

    Args:
        encoder: the encoder.
        images: ``(N, 3, H, W)``, standardised for the encoder.
        stage: number of the stage.

    Returns:
        the input of the next stage: ``(N, C, H', W')``, or all tokens ``(N, L, C)``.
    """
    if not isinstance(encoder, VisionTransformer):
        return stage_maps(encoder, images, [stage])[0]
    (tokens,) = encoder.forward_intermediates(
        images,
        [stage - 1],
        return_prefix_tokens=True,
        output_fmt="NLC",
        stop_early=True,
        intermediates_only=True,
    )
    if isinstance(tokens, Tensor):
        return tokens
    patches, prefix = tokens
    return torch.cat([prefix, patches], dim=1)


class Remainder(nn.Module):
    """A separate copy of all layers after a stage, weights and pooling included.

    Raises:
        UserError: the encoder is none of the `CHAINS`.
    """

    def __init__(self, encoder: nn.Module, stage: int) -> None:
        super().__init__()
        family = next((family for family in CHAINS if isinstance(encoder, family)), None)
        if family is None:
            names = ", ".join(sorted(family.__name__ for family in CHAINS))
            raise UserError(
                f"expected an encoder that can be cut behind a stage ({names}), "
                f"found {type(encoder).__name__}; choose such a backbone or another objective"
            )
        copied = copy.deepcopy(encoder)
        stages = [encoder.feature_info[index]["module"] for index in find_stage_indices(encoder)]
        remaining = [*stages[stage:], *CHAINS[family]]
        self.stages = nn.Sequential(*(copied.get_submodule(name) for name in remaining))
        last = [*stages, *CHAINS[family]][-1].partition(".")[0]
        for name in list(dict(copied.named_children())):
            setattr(copied, name, nn.Identity())
            if name == last:
                break
        # Class token and position embedding.
        for name in list(dict(copied.named_parameters(recurse=False))):
            copied.register_parameter(name, None)
        self.pooling = copied  # only the layers after the chain are left

    def forward(self, activation: Tensor) -> Tensor:
        """Turn the output of `shared_part` into features ``(N, D)``."""
        return self.pooling.forward_head(self.stages(activation), pre_logits=True)
