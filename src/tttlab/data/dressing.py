"""Dressing source images as a test image: its strangeness, estimated and laid over them.

What a corruption does to an image shows, in part, in its spectrum and its colours: noise adds
power, blur and lost contrast take power away, fog adds large waves, a cast moves the mean colour.
Every image has a spectrum of its own, so only what is strange *beyond the natural variation of
source images* is taken for the corruption. It is then done to source images, whose classes are
known.

Relatives: Fourier domain adaptation (Yang and Soatto, CVPR 2020, arXiv 2004.05498) swaps the low
frequencies of source images with those of a whole target set; here one image is enough, and what it
has in common with source images stays out.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tttlab.runtime.precision import at_least_single, without_autocast

RINGS = 12
# Power that rounding to 256 tones leaves in every frequency: the variance of its error.
POWER_FLOOR = 1 / (12 * 255**2)


class Appearance(NamedTuple):
    """What is compared of an image, in three opponent colours.

    Attributes:
        log_power: ``(..., 3, R)``, log of the mean power in each ring of spatial frequencies.
        mean: ``(..., 3)``.
    """

    log_power: Tensor
    mean: Tensor


def opponent_colours(like: Tensor) -> Tensor:
    """Give the orthonormal matrix to lightness, red − green and red + green − 2 · blue."""
    rows = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    return F.normalize(rows.double()).to(like)


def recoloured(matrix: Tensor, images: Tensor) -> Tensor:
    """Change the colours of ``images (..., 3, H, W)`` by a matrix ``(3, 3)``."""
    return torch.einsum("dc,...chw->...dhw", matrix, images)


def rings(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Divide spatial frequencies into rings around zero, which is in none of them.

    The rings are the wider, the higher their frequencies. Small images have fewer than `RINGS`.

    Returns:
        of every frequency of `torch.fft.rfft2`, each ``(H, W // 2 + 1)``: the ring's number, at
        zero −1, and how many frequencies of the full spectrum it stands for, 1 or 2.
    """
    vertical = torch.fft.fftfreq(height, dtype=torch.double)
    horizontal = torch.fft.rfftfreq(width, dtype=torch.double)
    radius = torch.hypot(vertical[:, None], horizontal)
    lowest, highest = 0.5 / max(height, width), 0.5**0.5
    edges = lowest + (highest - lowest) * (torch.arange(1, RINGS).double() / RINGS) ** 1.5
    number = torch.bucketize(radius, edges)
    number = torch.unique(number[radius > 0], return_inverse=True)[1]
    numbers = torch.full(radius.shape, -1)
    numbers[radius > 0] = number
    times = torch.full_like(radius, 2)
    times[:, 0] = 1
    if width % 2 == 0:
        times[:, -1] = 1
    return numbers, times


def appearance(images: Tensor) -> Appearance:
    """Measure ``images (..., 3, H, W)``, in single precision at least."""
    images = at_least_single(images)
    numbers, times = rings(*images.shape[-2:])
    member = F.one_hot(numbers.clamp_min(0)) * ((numbers >= 0) * times)[..., None]
    member = (member / member.sum((0, 1))).to(images)
    with without_autocast(images.device.type):
        images = recoloured(opponent_colours(images), images)
        power = torch.fft.rfft2(images, norm="ortho").abs().square()
        mean_power = torch.einsum("...hw,hwr->...r", power, member)
    return Appearance((mean_power + POWER_FLOOR).log(), images.mean((-2, -1)))


def strangeness(image: Appearance, center: Appearance, scale: Appearance, tolerance: float):
    """Estimate how an image differs from source images, beyond their natural variation.

    Every difference is shrunken by James and Stein's positive-part factor max(0, 1 - t / z²), z in
    units of natural variation; z² of a ring is the mean over it and its neighbours. So most images
    of the source domain have no difference at all.

    Args:
        image: of one image.
        center: mean over source images.
        scale: standard deviation over source images.
        tolerance: t.

    Returns:
        the differences, an `Appearance`.
    """
    differences = []
    for name, measured in image._asdict().items():
        difference = measured - getattr(center, name)
        squares = (difference / getattr(scale, name)).square()
        if name == "log_power":
            squares = F.avg_pool1d(squares, 3, stride=1, padding=1, count_include_pad=False)
        differences.append((1 - tolerance / squares.clamp_min(1e-12)).clamp_min(0) * difference)
    return Appearance(*differences)


def dressed(images: Tensor, noise: Tensor, difference: Appearance, center: Appearance) -> Tensor:
    """Lay a difference over source images.

    A ring that lost power is filtered. Into one that gained it comes noise, of as much power as the
    mean source image then has more. Colours are moved.

    Args:
        images: ``(n, 3, H, W)``.
        noise: white, of mean 0 and variance 1, of the same shape.
        difference: from `strangeness`.
        center: mean over source images.

    Returns:
        of the same shape; values may lie outside the images' range.
    """
    precise = at_least_single(images)
    colours = opponent_colours(precise)
    height, width = images.shape[-2:]
    numbers = rings(height, width)[0].to(images.device)
    at_zero = numbers < 0

    def over_frequencies(values: Tensor, zero: float) -> Tensor:
        return torch.where(at_zero, zero, values[..., numbers.clamp_min(0)])

    change = difference.log_power
    filters = over_frequencies((change.clamp_max(0) / 2).exp(), 1.0)
    added = center.log_power.exp() * change.clamp_min(0).expm1()
    with without_autocast(images.device.type):
        spectrum = torch.fft.rfft2(recoloured(colours, precise), norm="ortho") * filters
        waves = torch.fft.rfft2(at_least_single(noise), norm="ortho")
        spectrum = spectrum + waves * over_frequencies(added.sqrt(), 0.0)
        changed = torch.fft.irfft2(spectrum, s=(height, width), norm="ortho")
        return recoloured(colours.T, changed + difference.mean[..., None, None]).to(images)
