"""Masked autoencoding: hide most patches of an image and reconstruct them from the rest.

He et al., CVPR 2022, arXiv 2111.06377; as a test-time objective Gandelsman et al., NeurIPS 2022,
arXiv 2209.07522. It needs only the decoder from the source domain.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tttlab.data.views import random_masks
from tttlab.errors import UserError, pipeline_extra
from tttlab.mixers.mixing import needs_grid
from tttlab.networks.network import Network
from tttlab.networks.objective import Objective
from tttlab.runtime.ranks import Share

with pipeline_extra():
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from lightly.models.modules.masked_vision_transformer_decoder_timm import (
        MaskedVisionTransformerDecoderTIMM,
    )
    from lightly.models.utils import get_at_index, patchify, set_at_index


class Decoder(nn.Module):
    """Transformer decoder: encodings of the visible tokens → pixels of all patches."""

    objective = "mae"

    def __init__(self, vit: VisionTransformer, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch_size = vit.patch_embed.patch_size[0]
        self.num_patches = vit.patch_embed.num_patches
        self.embed = nn.Linear(vit.embed_dim, dim)
        self.blocks = MaskedVisionTransformerDecoderTIMM(
            num_patches=self.num_patches,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            num_prefix_tokens=1,
        )
        self.predict = nn.Linear(dim, 3 * self.patch_size**2)
        for layer in (self.embed, self.predict):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def reconstruct(self, vit: VisionTransformer, images: Tensor, keep: Tensor) -> Tensor:
        """Encode the visible patches and decode all patches.

        Args:
            vit: the encoder.
            images: ``(N, 3, H, W)``, standardised for the encoder.
            keep: ``(N, L_keep)`` indices of the visible patches, in ``[0, L)``.

        Returns:
            ``(N, L, 3·p²)`` predicted pixels, RGB in [0, 1] like the network's input.
        """
        # Token 0 is the class token, which is always visible.
        tokens = torch.cat([torch.zeros_like(keep[:, :1]), keep + 1], dim=1)
        encoded = self.embed(encode_visible(vit, images, tokens))
        hidden = self.blocks.mask_token.expand(images.shape[0], self.num_patches + 1, -1)
        decoded = self.blocks(set_at_index(hidden, tokens, encoded.to(hidden)))
        return self.predict(decoded[:, 1:])


def encode_visible(vit: VisionTransformer, images: Tensor, tokens: Tensor) -> Tensor:
    """Encode only the tokens with indices ``(N, T)``, by lightly; returns ``(N, T, D)``."""
    masked = MaskedVisionTransformerTIMM(
        vit, mask_token=vit.cls_token, weight_initialization="skip", pos_embed_initialization="skip"
    )
    return masked.encode(images, idx_keep=tokens)


@dataclass(frozen=True)
class MAE(Objective):
    """The masked-reconstruction objective.

    Attributes:
        mask_ratio: share of patches that are hidden.
        decoder_dim: width of the decoder.
        decoder_depth: transformer blocks of the decoder.
        decoder_heads: attention heads of the decoder.
    """

    mask_ratio: Annotated[float, Gt(0), Lt(1)] = 0.75
    decoder_dim: Annotated[int, Ge(1)] = 64
    decoder_depth: Annotated[int, Ge(1)] = 1
    decoder_heads: Annotated[int, Ge(1)] = 2
    patches = True
    multiples = (("decoder_dim", "decoder_heads"),)
    jitter = False  # masking is enough augmentation
    betas = (0.9, 0.95)

    def head(self, encoder: nn.Module) -> Decoder:
        """Build the decoder for an encoder.

        Raises:
            UserError: the encoder is not a plain vision transformer with one class token, or needs
                all tokens.
        """
        plain = (
            isinstance(encoder, VisionTransformer)
            and encoder.num_prefix_tokens == 1
            and encoder.has_class_token
        )
        if not plain:
            raise UserError(
                "objective mae needs a plain timm vision transformer with one class token "
                f"(vit_*, deit_*), found {type(encoder).__name__}; "
                "choose such a backbone or objective simclr"
            )
        if needs_grid(encoder):
            raise UserError(
                "objective mae drops tokens, and mixer ttt_conv needs the whole grid of patches; "
                "choose mixer ttt_linear or ttt_mlp, or another objective"
            )
        return Decoder(encoder, self.decoder_dim, self.decoder_depth, self.decoder_heads)

    def initialise(self, encoder: VisionTransformer) -> None:
        """Draw MAE's Xavier weights and sine-cosine position embeddings, which stay learnable."""
        MaskedVisionTransformerTIMM(
            encoder, weight_initialization="", pos_embed_initialization="sincos"
        )
        encoder.pos_embed.requires_grad_(True)

    def loss(
        self,
        network: Network,
        views: Tensor,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> Tensor:
        """Compute the mean squared error on the hidden patches of a batch.

        Args:
            network: with a `Decoder` as head.
            views: ``(N, 1, 3, H, W)``, RGB in [0, 1].
            generator: CPU stream for the masks of the whole batch, the same on all ranks.
            share: which part of the batch ``views`` holds; None: all of it.

        Returns:
            scalar, mean over hidden patches and their pixels.
        """
        images, share = views[:, 0], share or Share(len(views))
        masks = random_masks([generator], share.whole, network.head.num_patches, self.mask_ratio)
        keep, hidden = (mask[0, share.own].to(images.device) for mask in masks)
        reconstruction = network(images, keep=keep).reconstruction
        return masked_error(reconstruction, images, hidden, network.head.patch_size)


def masked_error(reconstruction: Tensor, images: Tensor, hidden: Tensor, patch_size: int) -> Tensor:
    """Compute the mean squared error over hidden patches.

    Args:
        reconstruction: ``(N, L, 3·p²)``.
        images: ``(N, 3, H, W)``, RGB in [0, 1].
        hidden: ``(N, L_hidden)`` patch indices.
        patch_size: p, pixels.
    """
    targets = get_at_index(patchify(images, patch_size), hidden)
    return (get_at_index(reconstruction, hidden) - targets).square().mean()
