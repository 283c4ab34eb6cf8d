"""Views that show less than the image but the same things at the same places.

After SPA (Niu et al., ICML 2025, arXiv 2504.08010): part of the low frequencies is hidden, which
carry most of an image's power, or the image fades into white noise. Unlike crops, nothing moves.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from tttlab.seeding import torch_generator

LOW = 0.2  # side of the square of low frequencies, of the whole spectrum's; the paper's code
TILES = 16


def without_low_frequencies(
    images: Tensor, generators: Sequence[torch.Generator], share: float
) -> Tensor:
    """Hide a random part of the low frequencies of every image.

    Args:
        images: ``(B, C, H, W)``.
        generators: one CPU stream per image.
        share: of the low frequencies, zero among them, that is hidden; drawn for every channel.

    Returns:
        of the same shape; values may leave the images' range.
    """
    batch, channels, height, width = images.shape
    down, right = round(LOW * height / 2), round(LOW * width / 2)
    draws = torch.stack(
        [torch.rand(channels, 2 * down + 1, right + 1, generator=each) for each in generators]
    )
    kept = (draws >= share).to(images)
    # The spectrum of a real image at (−f, 0) is that at (f, 0).
    kept[..., down + 1 :, 0] = kept[..., :down, 0].flip(-1)
    mask = images.new_ones(batch, channels, height, width // 2 + 1)
    rows = torch.arange(-down, down + 1, device=images.device) % height
    mask[..., rows, : right + 1] = kept
    return torch.fft.irfft2(torch.fft.rfft2(images) * mask, s=(height, width))


def faded(
    images: Tensor, generators: Sequence[torch.Generator], share: float, spread: float
) -> Tensor:
    """Mix white noise into every image, about its mean colour.

    Args:
        images: ``(B, C, H, W)``.
        generators: one CPU stream per image.
        share: of the noise; 1 − ``share`` is the image's.
        spread: the noise's standard deviation.

    Returns:
        of the same shape.
    """
    noise = spread * white_noise(images, generators)
    return (1 - share) * images + share * (images.mean((-2, -1), keepdim=True) + noise)


def white_noise(images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw white noise of the images' shape ``(B, C, H, W)``, of mean 0 and variance 1.

    It is one of `TILES`, rolled: so only three numbers per image are drawn and sent to its device.
    """
    tiles = _tiles(tuple(images.shape[1:]), images.dtype, images.device)
    height, width = images.shape[-2:]
    bounds = (TILES, height, width)
    drawn = [
        [int(torch.randint(bound, (1,), generator=each)) for bound in bounds] for each in generators
    ]
    return torch.stack([tiles[tile].roll((down, right), (-2, -1)) for tile, down, right in drawn])


@cache
def _tiles(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch_generator(0, "white noise")
    return torch.randn(TILES, *shape, generator=generator).to(device, dtype)
