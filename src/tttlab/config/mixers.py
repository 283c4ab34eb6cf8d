"""What mixes the tokens of a transformer's block: one declaration for params.yaml and for the code.

Nothing here imports torch or pydantic, as in `tttlab.config.inner_loop`;
`tttlab.config.mixer_settings` checks.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

Count = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """timm's own attention: there is nothing to set."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What all other mixers have in common.

    Attributes:
        heads: number of heads, a divisor of the backbone's width; None: as many as the backbone's
            attention has.
    """

    heads: Count | None = None


@dataclass(frozen=True, kw_only=True)
class LinearAttention(Heads):
    """Attention without softmax; see `tttlab.mixers.linear_attention`.

    Attributes:
        feature_map: of keys and queries: ``elu``: elu + 1, and the weights of a query sum to 1 |
            ``identity``: none, and the sum over tokens is divided by their number.
    """

    feature_map: Literal["elu", "identity"] = "elu"


@dataclass(frozen=True, kw_only=True)
class InnerTraining(Heads):
    """How a TTT layer trains its inner model on the tokens of one image.

    Attributes:
        inner_lr: learning rate.
        inner_steps: gradient steps.
        inner_batch: tokens of a step, taken in the order in which they come, from the first again
            after the last; None: all of them in every step.
        learned_init: start from weights that the outer training learns; False: from zero.
        inner_norm: normalise what the inner model makes of a token before it is compared with its
            target.
        inner_bias: give the inner model biases.
        scale_gradient: divide each head's gradient g by ‖g‖ + 1, so that no step is longer than
            ``inner_lr``.
    """

    inner_lr: Annotated[float, Gt(0)] = 1.0
    inner_steps: Count = 1
    inner_batch: Count | None = None
    learned_init: bool = True
    inner_norm: bool = True
    inner_bias: bool = True
    scale_gradient: bool = True


# Name in params.yaml → its settings.
MIXERS: dict[str, type] = {
    "attention": Attention,
    "linear_attention": LinearAttention,
    "ttt_linear": InnerTraining,
    "ttt_mlp": InnerTraining,
    "ttt_conv": InnerTraining,
}
