"""Puts another mixer in the place of attention in every block of a plain vision transformer."""

from collections.abc import Callable, Iterable
from typing import Any

from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tttlab.config.mixers import MIXERS
from tttlab.errors import UserError, choices
from tttlab.mixers.linear_attention import LinearAttention
from tttlab.mixers.token_mixer import TokenMixer
from tttlab.mixers.ttt_conv import TTTConv
from tttlab.mixers.ttt_linear import TTTLinear
from tttlab.mixers.ttt_mlp import TTTMLP
from tttlab.seeding import global_stream, stream_seed

# The first weight of timm's attention, and that of `TokenMixer`.
KINDS = (".attn.qkv.weight", ".attn.maps.weight")
PLAIN = "a plain timm vision transformer (vit_*, deit_*)"

# (heads, width of a head, the encoder, settings) → the rule of a block.
Build = Callable[[int, int, VisionTransformer, Any], nn.Module]
RULES: dict[str, Build] = {
    "linear_attention": lambda _heads, _width, _encoder, given: LinearAttention(given.feature_map),
    "ttt_linear": lambda heads, width, _encoder, given: TTTLinear(heads, width, given),
    "ttt_mlp": lambda heads, width, _encoder, given: TTTMLP(heads, width, given),
    "ttt_conv": lambda heads, width, encoder, given: TTTConv(
        heads, width, encoder.patch_embed.grid_size, given
    ),
}


def mix(encoder: nn.Module, name: str, seed: int, **settings: Any) -> None:
    """Replace the attention of every block, in place; all other weights stay as they are.

    Args:
        encoder: a plain vision transformer.
        name: of the mixer, a key of `MIXERS`; ``attention`` changes nothing.
        seed: of the new weights; the global random state does not change.
        **settings: of the mixer, as `tttlab.config.mixers` declares them.

    Raises:
        UserError: there is no such mixer, or the encoder has no place for it.
    """
    if name not in MIXERS:
        raise UserError(f"mixer.name: unknown mixer {name!r}; {choices(name, MIXERS)}")
    given = MIXERS[name](**settings)
    if name == "attention":
        return
    check_encoder(encoder, name)
    heads, width = given.heads or encoder.blocks[0].attn.num_heads, encoder.embed_dim
    if width % heads:
        raise UserError(
            f"mixer.heads: expected a divisor of the backbone's width {width}, found {heads}"
        )
    around = encoder.num_prefix_tokens if name == "ttt_conv" else 0
    with global_stream(stream_seed(seed, "mixer")):
        for block in encoder.blocks:
            rule = RULES[name](heads, width // heads, encoder, given)
            mixer = TokenMixer(width, heads, rule, around, block.attn.proj_drop.p)
            block.attn = mixer.to(block.attn.proj.weight).train(block.training)


def check_encoder(encoder: nn.Module, name: str) -> None:
    """Refuse encoders whose attention is not timm's plain one, or that have no grid for a grid.

    Raises:
        UserError: the encoder has no place for the mixer.
    """
    if not isinstance(encoder, VisionTransformer):
        raise UserError(
            f"mixer: expected {PLAIN}, found {type(encoder).__name__}; "
            "choose such a backbone, or leave the mixer out"
        )
    for block in encoder.blocks:
        attention = getattr(block, "attn", None)
        if type(attention) is not Attention or getattr(attention, "gate", None):
            raise UserError(
                f"mixer: expected {PLAIN} with timm's Attention in every block, found "
                f"{type(attention).__name__} in a {type(block).__name__}; choose another backbone"
            )
        extras = (attention.q_norm, attention.k_norm, attention.norm)
        if attention.attn_drop.p or not all(isinstance(part, nn.Identity) for part in extras):
            raise UserError(
                f"mixer: {name} has neither attention weights to drop nor norms of queries, keys "
                "and their scale; leave qk_norm, scale_attn_norm and attn_drop_rate out of "
                "backbone_options, or choose another backbone"
            )
    if name == "ttt_conv":
        check_grid(encoder)


def check_grid(encoder: VisionTransformer) -> None:
    """Refuse transformers that drop patches, take images of any size, or read the class token.

    Raises:
        UserError: the convolution would miss its grid, or the classifier would miss the image.
    """
    if not isinstance(encoder.patch_drop, nn.Identity) or encoder.patch_embed.dynamic_img_pad:
        raise UserError(
            "mixer: ttt_conv needs the whole grid of patches; leave patch_drop_rate and "
            "dynamic_img_pad out of backbone_options, or choose ttt_linear or ttt_mlp"
        )
    if encoder.global_pool not in ("avg", "avgmax", "max"):
        raise UserError(
            "mixer: ttt_conv passes class and register tokens around, so that they never see the "
            f"image, and this classifier reads them (global_pool {encoder.global_pool!r}); "
            "set backbone_options: {global_pool: avg, fc_norm: false}"
        )


def mixer_layers(encoder: nn.Module) -> dict[str, TokenMixer]:
    """List the mixers that have taken attention's place, by name, from the first block on."""
    return {
        name: module for name, module in encoder.named_modules() if isinstance(module, TokenMixer)
    }


def needs_grid(encoder: nn.Module) -> bool:
    """Tell whether a mixer of the encoder needs all patches of an image."""
    return any(isinstance(mixer.rule, TTTConv) for mixer in mixer_layers(encoder).values())


def other_mixer(encoder: nn.Module, names: Iterable[str]) -> str | None:
    """Compare the kind of mixer that weights are for, by their names, with the encoder's.

    Returns:
        what was expected and what was found; None where both are attention, or neither.
    """
    own = next((name for name in encoder.state_dict() if name.endswith(KINDS)), None)
    found = next((name for name in names if name.endswith(KINDS)), None)
    if own is None or found is None or found.endswith(own.rpartition(".attn.")[2]):
        return None
    attention = found.endswith(KINDS[0])
    expected, other = ("another mixer", "attention") if attention else ("attention", "a mixer")
    return f"expected those of {expected}, found those of {other} ({found})"


def inner_losses(encoder: nn.Module, run: Callable[[], Any], steps: int) -> dict[str, Tensor]:
    """Compute every TTT layer's inner loss on the tokens that a forward pass brings it.

    Args:
        encoder: with TTT layers in the place of attention.
        run: makes the forward pass.
        steps: inner steps after which the last loss is taken.

    Returns:
        name of the layer → ``(steps + 1, N, H)``, after 0, 1, … steps.

    Raises:
        UserError: the encoder has no TTT layers.
    """
    layers = {
        name: mixer for name, mixer in mixer_layers(encoder).items() if hasattr(mixer.rule, "inner")
    }
    if not layers:
        raise UserError(
            "inner losses: expected an encoder with mixer ttt_linear, ttt_mlp or ttt_conv, "
            "found none of these layers"
        )
    found: dict[str, Tensor] = {}

    def keep(name: str, mixer: TokenMixer, inputs: tuple[Tensor, ...]) -> None:
        found[name] = mixer.inner_losses(inputs[0], steps)

    handles = [
        mixer.register_forward_pre_hook(lambda mixer, inputs, name=name: keep(name, mixer, inputs))
        for name, mixer in layers.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found
