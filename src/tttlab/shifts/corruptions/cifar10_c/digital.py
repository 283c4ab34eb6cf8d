"""Processing of CIFAR-10-C: brightness, contrast, elastic, pixelate, JPEG; held out, saturate.

Reference: Hendrycks and Dietterich, ICLR 2019, arXiv:1903.12261.
"""

import io
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from tttlab.config.values import CIFAR_SIDE
from tttlab.shifts.corruptions.cifar10_c.filters import smooth, write


class Saturation(NamedTuple):
    """Strength of `saturate`: the saturation is multiplied, then ``added`` to."""

    factor: float
    added: float


class Elastic(NamedTuple):
    """Strength of `elastic`, in pixels.

    Attributes:
        push: of the field that moves pixels, before it is smoothed: uniform on ± this.
        sigma: standard deviation of the Gaussian that smooths it.
        corners: how far three corners of a square move along each axis: uniform on ± this.
    """

    push: float
    sigma: float
    corners: float


def brightness(image: np.ndarray, amount: float, _generator: np.random.Generator) -> np.ndarray:
    """Raise the value of HSV by ``amount``, up to 1; hue and saturation stay."""
    colours = image / 255
    value = colours.max(axis=2, keepdims=True)
    brighter = np.minimum(value + amount, 1)
    # Of a constant hue and saturation: the distances to the largest channel grow as it does.
    return write(brighter - (value - colours) * (brighter / np.where(value > 0, value, 1)))


def saturate(
    image: np.ndarray, saturation: Saturation, _generator: np.random.Generator
) -> np.ndarray:
    """Multiply the saturation of HSV and add to it; hue and value stay. Grey counts as red."""
    colours = image / 255
    value = colours.max(axis=2, keepdims=True)
    away = (value - colours) / np.where(value > 0, value, 1)  # the largest is the saturation
    old = away.max(axis=2, keepdims=True)
    new = np.clip(old * saturation.factor + saturation.added, 0, 1)
    red = np.array([0.0, 1.0, 1.0])
    return write(value - value * new * np.where(old > 0, away / np.where(old > 0, old, 1), red))


def contrast(image: np.ndarray, factor: float, _generator: np.random.Generator) -> np.ndarray:
    """Pull every channel towards its mean until ``factor`` of the distance is left."""
    colours = image / 255
    mean = colours.mean(axis=(0, 1))
    return write((colours - mean) * factor + mean)


def elastic(image: np.ndarray, strength: Elastic, generator: np.random.Generator) -> np.ndarray:
    """Move the image by a random affine map, then every pixel by a smooth random field."""
    from scipy.ndimage import map_coordinates

    middle, half = CIFAR_SIDE // 2, CIFAR_SIDE // 3
    low, high = middle - half, middle + half
    corners = np.array([[high, high], [high, low], [low, low]], np.float32)
    moves = generator.uniform(-strength.corners, strength.corners, corners.shape)
    affine = cv2.getAffineTransform(corners, corners + moves.astype(np.float32))
    colours = image / np.float32(255)
    colours = cv2.warpAffine(
        colours, affine, (CIFAR_SIDE, CIFAR_SIDE), borderMode=cv2.BORDER_REFLECT_101
    )
    if strength.push:
        noise = generator.uniform(-1, 1, (2, CIFAR_SIDE, CIFAR_SIDE))
        right, down = (smooth(axis, strength.sigma, edge="reflect", reach=3) for axis in noise)
        places = np.mgrid[:CIFAR_SIDE, :CIFAR_SIDE] + strength.push * np.stack([down, right])
        moved = [
            map_coordinates(colours[..., channel], places, order=1, mode="reflect")
            for channel in range(3)
        ]
        colours = np.stack(moved, axis=2)
    return write(colours)


def pixelate(image: np.ndarray, side: int, _generator: np.random.Generator) -> np.ndarray:
    """Shrink to ``side`` pixels by averaging, and enlarge again by repeating them."""
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
    return np.array(small.resize(image.shape[1::-1], Image.Resampling.BOX))


def jpeg(image: np.ndarray, quality: int, _generator: np.random.Generator) -> np.ndarray:
    """Compress as JPEG by Pillow, and decode."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))
