"""Blur of CIFAR-10-C: defocus, glass, motion, zoom and, held out, Gaussian.

Reference: Hendrycks and Dietterich, ICLR 2019, arXiv:1903.12261.
"""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from tttlab.shifts.corruptions.cifar10_c.filters import smear, smooth, write, zoom


class Disc(NamedTuple):
    """Strength of `defocus`: the disc's radius and the deviation of what softens it, in pixels."""

    radius: float
    softness: float


class Glass(NamedTuple):
    """Strength of `glass`: deviation of the blur, in pixels, and how often pixels are shuffled."""

    sigma: float
    times: int


class Motion(NamedTuple):
    """Strength of `motion`: as `tttlab.shifts.corruptions.cifar10_c.filters.smear` takes it."""

    radius: int
    sigma: float


@lru_cache(maxsize=16)
def disc_kernel(disc: Disc) -> np.ndarray:
    """Make the kernel of a soft disc; it sums to 1.

    The pixels whose centres are in the disc weigh the same; 3 × 3 weights of a Gaussian soften it.
    """
    across = np.arange(5) - 2  # the largest disc, of radius 1.5, softened: 5 pixels
    # In single precision, in which the weights do not add up to less than 1: white stays white.
    hard = (across**2 + across[:, None] ** 2 <= disc.radius**2).astype(np.float32)
    near = np.exp(-(np.arange(-1, 2) ** 2) / (2 * disc.softness**2))
    return cv2.sepFilter2D(
        hard / hard.sum(), -1, near / near.sum(), near / near.sum(), borderType=cv2.BORDER_CONSTANT
    )


def defocus(image: np.ndarray, disc: Disc, _generator: np.random.Generator) -> np.ndarray:
    """Convolve with a soft disc; edges are mirrored."""
    return write(cv2.filter2D(image / 255, -1, disc_kernel(disc)))


def glass(image: np.ndarray, strength: Glass, generator: np.random.Generator) -> np.ndarray:
    """Blur, shuffle pixels, and blur again.

    Every pixel takes the value of itself, of its left or its upper neighbour, or of the one between
    these two, as likely, but for the two uppermost rows and leftmost columns. In the published
    generator pixels are meant to change places, from the last to the first; but the value that is
    moved is overwritten before it is read, which leaves just this, and a drift of half a pixel.
    """
    shuffled = write(smooth(image / 255, strength.sigma))
    places = np.mgrid[2 : len(image), 2 : image.shape[1]]
    for _ in range(strength.times):
        rows, columns = places - generator.integers(0, 2, places.shape)
        shuffled[2:, 2:] = shuffled[rows, columns]
    return write(smooth(shuffled / 255, strength.sigma))


def motion(image: np.ndarray, way: Motion, generator: np.random.Generator) -> np.ndarray:
    """Smear to the right, at most 45 degrees up or down."""
    return smear(image, *way, angle=generator.uniform(-45, 45))


def zoomed(image: np.ndarray, count: int, _generator: np.random.Generator) -> np.ndarray:
    """Average the image and ``count`` magnifications of it, by 1, 1.01, 1.02 and so on."""
    # In single precision, in which a sum of equal values is that of the published files.
    total = np.zeros(image.shape, np.float32)
    for step in range(count):
        # A little more: the published files round half a pixel up.
        factor = 1 + (0.01 + 1e-12) * step
        total += zoom(image / np.float32(255), factor).astype(np.float32)
    return write((image / np.float32(255) + total) / np.float32(count + 1))


def gaussian(image: np.ndarray, sigma: float, _generator: np.random.Generator) -> np.ndarray:
    """Convolve with a Gaussian of this standard deviation, in pixels."""
    return write(smooth(image / 255, sigma))
