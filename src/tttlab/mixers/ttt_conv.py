"""TTT-Conv: the inner model is a depth-wise 3 × 3 convolution on the grid of patches.

The inner model that ViT³ (ViTTT, LeapLabTHU, 2025) found to work well on images. With shifts s
from {−1, 0, 1}² and zeros around the grid, at every position p and for every channel,

    f(k)ₚ = Σₛ wₛ kₚ₊ₛ + b,        ∂L/∂wₛ = Σₚ ∂L/∂f(k)ₚ · kₚ₊ₛ.

The gradient is a convolution too: of the keys, with the gradient by the output as its kernel.

The layer needs the whole grid, so that no token may be dropped; a step of a few tokens takes the
loss at their positions alone. Class and register tokens have no place in the grid.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.config.mixers import InnerTraining
from tttlab.errors import UserError
from tttlab.mixers.descent import Initial, Weights, centre, descend, gradient_by_output

SIDE = 3  # of the kernel


class TTTConv(nn.Module):
    """A depth-wise convolution, trained on the tokens of one image and then asked.

    Args:
        heads: H; the channels of a head have one normalisation and one length of the step.
        width: d, of a head.
        grid: rows and columns of the patches; L is their product.
        inner: how it is trained.
    """

    def __init__(
        self,
        heads: int,
        width: int,
        grid: tuple[int, int],
        inner: InnerTraining,
    ) -> None:
        super().__init__()
        self.inner, self.grid = inner, grid
        shapes = {"weight": (heads, width, SIDE, SIDE)}
        if inner.inner_bias:
            shapes["bias"] = (heads, 1, width)
        self.initial = Initial(inner.learned_init, **shapes)

    def forward(self, keys: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        """Train on keys and targets, then ask queries; all and the result ``(N, H, L, d)``.

        Raises:
            UserError: the tokens are not those of the whole grid.
        """
        return self.model(descend(self, keys, targets), queries)

    def model(self, weights: Weights, tokens: Tensor) -> Tensor:
        """Compute f: ``(N, H, L, d)`` → ``(N, H, L, d)``."""
        outputs = convolve(self._in_grid(tokens), weights["weight"]).flatten(-2).mT
        return outputs + weights["bias"] if "bias" in weights else outputs

    def gradients(self, weights: Weights, keys: Tensor, targets: Tensor, batch: slice) -> Weights:
        """Differentiate the loss, summed over the tokens of a batch."""
        norm, outputs = self.inner.inner_norm, self.model(weights, keys)[..., batch, :]
        if norm:
            outputs = centre(outputs)
        by_output = gradient_by_output(outputs, targets[..., batch, :], norm)
        length = keys.shape[-2]
        if batch != slice(0, length):
            by_output = F.pad(by_output, (0, 0, batch.start, length - batch.stop))
        found = {"weight": convolve(self._in_grid(keys), self._in_grid(by_output))}
        if "bias" in weights:
            found["bias"] = by_output.sum(-2, keepdim=True)
        return found

    def _in_grid(self, tokens: Tensor) -> Tensor:
        """Lay tokens ``(N, H, L, d)`` out as ``(N, H, d, rows, columns)``."""
        rows, columns = self.grid
        if tokens.shape[-2] != rows * columns:
            raise UserError(
                f"mixer ttt_conv needs the whole grid of {rows} × {columns} patches, found "
                f"{tokens.shape[-2]} of them; where tokens are dropped choose ttt_linear or ttt_mlp"
            )
        return tokens.mT.unflatten(-1, self.grid)


def convolve(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolve every channel with a kernel of its own, one row and column of zeros around it.

    Args:
        images: ``(N, H, d, rows, columns)``.
        kernels: ``(N, H, d, height, width)``, or without N: the same for all images.

    Returns:
        ``(N, H, d, rows + 3 − height, columns + 3 − width)``.
    """
    kernels = kernels.expand(*images.shape[:3], *kernels.shape[-2:]).flatten(0, 2).unsqueeze(1)
    channels = images.flatten(0, 2).unsqueeze(0)
    outputs = torch.conv2d(channels, kernels, padding=1, groups=len(kernels))
    return outputs.squeeze(0).unflatten(0, images.shape[:3])
