"""A vision transformer from a canvas to a canvas, after VARC (Hu et al. 2025, arXiv 2511.14761)."""

from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers import Mlp, RotaryEmbeddingCat
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.arc.canvas import SYMBOLS, Canvas, Tokens


@dataclass(frozen=True)
class Architecture:
    """Size of the transformer.

    Attributes:
        width: of a token.
        depth: blocks.
        heads: attention heads of a block.
        mlp: width of the hidden layer.
        dropout: share of activations dropped in offline training.
        norm: ``pre`` or ``post``: before each part of a block, or after its sum.
    """

    width: int
    depth: int
    heads: int
    mlp: int
    dropout: float = 0.0
    norm: Literal["pre", "post"] = "pre"


class Block(nn.Module):
    """A transformer block whose attention rotates queries and keys by their place.

    timm's `AttentionRope` cuts the task token off and puts it back, for queries and keys apart,
    and turns pairs of channels by several operations, which takes as long as the matrix products
    of a small network. Here a token's own rotation may be none, and a pair of channels is a complex
    number.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width, drop = architecture.width, architecture.dropout
        self.heads, self.post = architecture.heads, architecture.norm == "post"
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = Mlp(width, architecture.mlp, drop=drop)
        self.dropout = nn.Dropout(drop)

    def forward(self, x: Tensor, rotation: Tensor, attended: Tensor) -> Tensor:
        """Transform tokens.

        Args:
            x: ``(N, L, D)``.
            rotation: complex numbers of length 1, ``(N, 1, L, D/heads/2)``.
            attended: which tokens are looked at, ``(N, 1, 1, L)``.
        """
        if self.post:
            x = self.norm1(x + self.attend(x, rotation, attended))
            return self.norm2(x + self.mlp(x))
        x = x + self.attend(self.norm1(x), rotation, attended)
        return x + self.mlp(self.norm2(x))

    def attend(self, x: Tensor, rotation: Tensor, attended: Tensor) -> Tensor:
        """Mix tokens by attention."""
        heads = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        turned, value = heads.split((2 * self.heads, self.heads), dim=1)
        # Complex numbers have no half precision.
        pairs = turned.unflatten(-1, (-1, 2)).to(rotation.real.dtype)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rotation)
        query, key = turned.flatten(-2).to(value.dtype).chunk(2, dim=1)
        drop = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attended, drop)
        return self.dropout(self.proj(mixed.transpose(1, 2).flatten(2)))


class CanvasTransformer(nn.Module):
    """Predicts a symbol for every pixel of every token.

    Attributes:
        auxiliary: the auxiliary tasks' tokens.
    """

    def __init__(self, canvas: Canvas, architecture: Architecture, auxiliary_tasks: int) -> None:
        super().__init__()
        width, pixels = architecture.width, canvas.patch**2
        self.canvas, self.architecture = canvas, architecture
        self.symbols = nn.Embedding(SYMBOLS, width)
        self.patch = nn.Linear(width * pixels, width) if pixels > 1 else nn.Identity()
        self.positions = nn.Embedding(canvas.tokens, width)
        self.auxiliary = nn.Embedding(auxiliary_tasks, width)
        self.dropout = nn.Dropout(architecture.dropout)
        self.blocks = nn.ModuleList(Block(architecture) for _ in range(architecture.depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, SYMBOLS * pixels)
        self.register_buffer("rotations", rotations(canvas, architecture), persistent=False)
        for embedding in (self.symbols, self.positions, self.auxiliary):
            nn.init.trunc_normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tokens) -> Tensor:
        """Compute logits ``(N, L, p², symbols)``."""
        x = self.patch(self.symbols(tokens.symbols).flatten(-2)) + self.positions(tokens.positions)
        x = torch.cat([self.auxiliary(tokens.auxiliary).unsqueeze(1), x], dim=1)
        x = self.dropout(x)
        rotation = self.rotations[F.pad(tokens.positions + 1, (1, 0))].unsqueeze(1)
        rotation = torch.view_as_complex(rotation)
        attended = F.pad(tokens.visible, (1, 0), value=True)[:, None, None, :]
        for block in self.blocks:
            x = block(x, rotation, attended)
        return self.head(self.norm(x[:, 1:])).unflatten(-1, (-1, SYMBOLS))


def rotations(canvas: Canvas, architecture: Architecture) -> Tensor:
    """Compute cosines and sines ``(1 + patches, D/heads/2, 2)``; the first row turns nothing."""
    number, width = canvas.side // canvas.patch, architecture.width // architecture.heads
    rotary = RotaryEmbeddingCat(
        width, in_pixels=False, feat_shape=[number, number], rotate_half=True
    )
    sines, cosines = rotary.get_embed([number, number]).unflatten(-1, (4, -1))[:, ::2].unbind(1)
    table = torch.stack([cosines, sines], -1)
    none = torch.tensor([1.0, 0.0]).expand(1, width // 2, 2)
    return torch.cat([none, table])
