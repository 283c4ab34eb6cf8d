"""Blur: defocus, glass, motion, zoom and, held out, Gaussian. Strengths are lengths.

albumentations has all five, but the first four in whole pixels or whole crops, too coarse for five
severities on an image of 32 pixels. Edges are mirrored, so that no border colour bleeds in.
"""

from functools import lru_cache

import cv2
import numpy as np

from tttlab.shifts.corruptions.canvas import albument, length_scale, line_kernel, to_uint8


@lru_cache(maxsize=64)
def disc_kernel(radius: float) -> np.ndarray:
    """Make the blur kernel of a disc, with a radius in pixels that need not be whole.

    A pixel's weight is its area inside the disc, from 8×8 samples.
    """
    size = 2 * int(np.ceil(radius)) + 1
    fine = (np.arange(size * 8) + 0.5) / 8 - size / 2
    inside = fine[:, None] ** 2 + fine[None, :] ** 2 <= radius**2
    kernel = inside.reshape(size, 8, size, 8).sum(axis=(1, 3), dtype=np.float32)
    return kernel / kernel.sum()


def defocus(image: np.ndarray, radius: float, _generator: np.random.Generator) -> np.ndarray:
    """Spread every pixel over a disc."""
    return cv2.filter2D(image, -1, disc_kernel(radius * length_scale(image)))


def motion(image: np.ndarray, length: float, generator: np.random.Generator) -> np.ndarray:
    """Spread every pixel along a straight line in a random direction."""
    kernel = line_kernel(length * length_scale(image), generator.uniform(0, np.pi))
    return cv2.filter2D(image, -1, kernel)


def glass(image: np.ndarray, reach: float, generator: np.random.Generator) -> np.ndarray:
    """Look through frosted glass.

    Every pixel shows a random point at most ``reach`` away along each axis. albumentations shuffles
    with offsets biased to the upper left, and leaves a frame around the image sharp.
    """
    scale = length_scale(image)
    height, width = image.shape[:2]
    offsets = generator.random((2, height, width), np.float32) * 2 - 1
    positions = np.mgrid[:height, :width].astype(np.float32)
    rows, columns = positions + np.float32(reach * scale) * offsets
    scattered = cv2.remap(image, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return cv2.GaussianBlur(scattered, (0, 0), 0.4 * scale)


def zoom(image: np.ndarray, length: float, _generator: np.random.Generator) -> np.ndarray:
    """Average over a zoom into the image during which the nearest edge moves by ``length``."""
    height, width = image.shape[:2]
    length *= length_scale(image)
    count = int(length) + 2  # steps below one pixel, else single pictures would be visible
    total = np.zeros(image.shape, np.float32)
    for factor in np.linspace(1, 1 + 2 * length / min(height, width), count):
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), 0, factor)
        total += cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    return to_uint8(total / count)


def gaussian(image: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    """Convolve with a Gaussian of this standard deviation."""
    sigma *= length_scale(image)
    return albument(image, generator, "GaussianBlur", sigma_limit=(sigma, sigma), blur_limit=(0, 0))
