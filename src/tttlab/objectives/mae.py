"""Masked autoencoding: hide most patches of an image and paint them from the rest.

He et al., CVPR 2022, arXiv 2111.06377; as a test-time objective Gandelsman et al., NeurIPS 2022, arXiv 2209.07522.
Needs nothing from the source domain but the decoder.
"""

from dataclasses import dataclass

import torch
from lightly.models.modules import MaskedVisionTransformerTIMM
from lightly.models.modules.masked_vision_transformer_decoder_timm import (
    MaskedVisionTransformerDecoderTIMM,
)
from lightly.models.utils import get_at_index, patchify, set_at_index
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tttlab.data.views import random_masks
from tttlab.errors import UserError
from tttlab.networks.network import Network
from tttlab.networks.objective import Objective
from tttlab.runtime.ranks import Share


class Decoder(nn.Module):
    """From the visible tokens' encodings to the pixels of all patches."""

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
        """Encode the visible patches, decode all.

        Args:
            vit: the encoder.
            images: ``(N, 3, H, W)`` as the encoder wants them.
            keep: ``(N, L_keep)`` visible patches in ``[0, L)``.

        Returns:
            ``(N, L, 3·p²)`` predicted pixels, RGB in [0, 1] like the network's input.
        """
        tokens = torch.cat(
            [torch.zeros_like(keep[:, :1]), keep + 1], dim=1
        )  # the class token is always seen
        encoded = self.embed(encode_visible(vit, images, tokens))
        hidden = self.blocks.mask_token.expand(images.shape[0], self.num_patches + 1, -1)
        decoded = self.blocks(set_at_index(hidden, tokens, encoded.to(hidden)))
        return self.predict(decoded[:, 1:])


def encode_visible(vit: VisionTransformer, images: Tensor, tokens: Tensor) -> Tensor:
    """Run the transformer on the chosen tokens ``(N, T)`` alone, through lightly; → ``(N, T, D)``."""
    masked = MaskedVisionTransformerTIMM(
        vit, mask_token=vit.cls_token, weight_initialization="skip", pos_embed_initialization="skip"
    )
    return masked.encode(images, idx_keep=tokens)


@dataclass(frozen=True)
class MAE(Objective):
    """The masked-reconstruction objective.

    Attributes:
        mask_ratio: share of patches hidden.
        decoder_dim: width of the decoder.
        decoder_depth: transformer blocks of the decoder.
        decoder_heads: attention heads of the decoder.
    """

    mask_ratio: float = 0.75
    decoder_dim: int = 64
    decoder_depth: int = 1
    decoder_heads: int = 2
    jitter = False  # the mask is augmentation enough
    betas = (0.9, 0.95)  # the second average forgets faster

    def head(self, encoder: nn.Module) -> Decoder:
        """Build the decoder for an encoder.

        Raises:
            UserError: the encoder is no plain vision transformer with one class token.
        """
        if (
            not isinstance(encoder, VisionTransformer)
            or encoder.num_prefix_tokens != 1
            or not encoder.has_class_token
        ):
            raise UserError(
                "objective mae needs a plain timm vision transformer with one class token (vit_*, deit_*), found "
                f"{type(encoder).__name__}; choose such a backbone or objective simclr"
            )
        return Decoder(encoder, self.decoder_dim, self.decoder_depth, self.decoder_heads)

    def initialise(self, encoder: VisionTransformer) -> None:
        """Draw the weights as MAE does: Xavier, and sine-cosine position embeddings, here learnable."""
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
        """Mean squared error on the hidden patches of a batch.

        Args:
            network: with a `Decoder` as head.
            views: ``(N, 1, 3, H, W)`` RGB in [0, 1].
            generator: CPU stream for the masks of the whole batch, the same on all ranks.
            share: the part of the batch that ``views`` are; None: all of it.

        Returns:
            scalar, mean over hidden patches and their pixels.
        """
        images, share = views[:, 0], share or Share(len(views))
        masks = random_masks([generator], share.whole, network.head.num_patches, self.mask_ratio)
        keep, hidden = (mask[0, share.own].to(images.device) for mask in masks)
        return masked_error(
            network(images, keep=keep).reconstruction, images, hidden, network.head.patch_size
        )


def masked_error(reconstruction: Tensor, images: Tensor, hidden: Tensor, patch_size: int) -> Tensor:
    """Mean squared error over hidden patches.

    Args:
        reconstruction: ``(N, L, 3·p²)``.
        images: ``(N, 3, H, W)``, RGB in [0, 1].
        hidden: ``(N, L_hidden)`` patch numbers.
        patch_size: p, pixels.
    """
    truth = get_at_index(patchify(images, patch_size), hidden)
    return (get_at_index(reconstruction, hidden) - truth).square().mean()
