"""What several corruptions of CIFAR-10-C share: smoothing, smearing, zooming, writing.

SciPy is imported where it is used: it takes half a second, and the names cost nothing.
"""

from functools import lru_cache

import numpy as np

from tttlab.config.values import CIFAR_SIDE


def write(values: np.ndarray) -> np.ndarray:
    """Turn values, 0–1, into uint8; fractions are cut off, as in the published files."""
    return (np.clip(values, 0, 1) * 255).astype(np.uint8)


def smooth(values: np.ndarray, sigma: float, edge: str = "nearest", reach: float = 4) -> np.ndarray:
    """Convolve (H, W) or (H, W, C) with a Gaussian along height and width.

    Args:
        values: of the range 0–1, usually.
        sigma: its standard deviation, in pixels.
        edge: how SciPy goes on beyond the edges.
        reach: where the Gaussian is cut off, in standard deviations.
    """
    from scipy.ndimage import gaussian_filter

    sigmas = (sigma, sigma, 0)[: values.ndim]
    return gaussian_filter(values, sigmas, mode=edge, truncate=reach)


def smear(values: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """Smear (H, W) or (H, W, C) to one side, by half a Gaussian along a straight line.

    This is how ImageMagick blurs by motion: 2 · radius + 1 points along the line, each at the
    nearest pixel; beyond an edge its pixels go on. It counts in 16 bits, and cuts off what eight
    do not hold.

    Args:
        values: uint8, to be smeared.
        radius: in pixels; the line is twice as long.
        sigma: standard deviation of the Gaussian whose one half the weights are, in pixels.
        angle: of the line, in degrees, from the x axis towards the y axis.
    """
    along = np.arange(2 * radius + 1)
    weights = np.exp(-(along**2) / (2 * sigma**2))
    way = np.deg2rad(angle)
    # A half goes down, so that equal distances are decided as in ImageMagick.
    right, down = np.ceil(np.outer([np.cos(way), np.sin(way)], along) - 0.5).astype(int)
    height, width = values.shape[:2]
    rows = np.clip(np.arange(height) + down[:, None], 0, height - 1)
    columns = np.clip(np.arange(width) + right[:, None], 0, width - 1)
    points = values[rows[:, :, None], columns[:, None, :]]
    smeared = np.tensordot(weights / weights.sum(), points, 1)
    return (np.rint(smeared * 257) // 257).astype(np.uint8)


@lru_cache(maxsize=64)
def zoom_matrix(factor: float) -> np.ndarray:
    """Make the matrix (32, 32) that magnifies the middle of 32 pixels by linear interpolation.

    The middle is the fewest whole pixels that fill the image. Their outermost centres become the
    outermost centres of the enlarged picture, from which 32 pixels are kept.
    """
    kept = int(np.ceil(CIFAR_SIDE / factor))
    first = (CIFAR_SIDE - kept) // 2
    enlarged = round(kept * factor)
    shown = np.arange(CIFAR_SIDE) + (enlarged - CIFAR_SIDE) // 2
    positions = first + shown * ((kept - 1) / (enlarged - 1))
    return np.maximum(1 - np.abs(positions[:, None] - np.arange(CIFAR_SIDE)), 0)


def zoom(values: np.ndarray, factor: float) -> np.ndarray:
    """Magnify the middle of (32, 32) or (32, 32, C)."""
    matrix = zoom_matrix(factor)
    rows = np.tensordot(matrix, values, 1)
    return np.tensordot(matrix, rows, (1, 1)).swapaxes(0, 1)
