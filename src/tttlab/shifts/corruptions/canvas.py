"""What the corruptions share: lengths, rounding, painting, kernels, clouds, albumentations."""

import random
import sys
import threading
from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    import albumentations


def length_scale(image: np.ndarray) -> float:
    """Factor of lengths relative to an image whose shorter side is 32 pixels; at least 1.

    It is the square root of the ratio of sides, because this keeps the pixel error of blurred
    photographs similar from 32 to 224 pixels. With the ratio itself, the mildest blur of a large
    image would do as much damage as the strongest of a small one.
    """
    return float(np.sqrt(max(min(image.shape[:2]), 32) / 32))


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Round and clip to 0–255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def cover(image: np.ndarray, opacity: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Paint ``colour`` over the image (H, W, 3) with an opacity (H, W) in 0–1."""
    opacity = opacity[..., None].astype(np.float32)
    return to_uint8(image * (1 - opacity) + np.array(colour, np.float32) * opacity)


def line_kernel(length: float, angle: float) -> np.ndarray:
    """Make the blur kernel of a straight line; it sums to 1.

    Points along the line are distributed bilinearly to their four pixels, so that fractions of a
    pixel count.

    Args:
        length: in pixels, not necessarily whole.
        angle: in radians, from the x axis.
    """
    half = int(np.ceil(length / 2)) + 1
    count = 8 * half
    along = ((np.arange(count) + 0.5) / count - 0.5) * length
    points = np.stack([np.sin(angle) * along, np.cos(angle) * along]) + half
    corner = np.floor(points).astype(int)
    share = points - corner
    kernel = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - down - share[0]) * np.abs(1 - right - share[1])
            np.add.at(kernel, (corner[0] + down, corner[1] + right), weight)
    return kernel / count


def clouds(
    shape: tuple[int, int], octaves: int, roughness: float, generator: np.random.Generator
) -> np.ndarray:
    """Draw fractal noise (H, W) from 0 to 1: a sum of smooth random fields.

    Each field is twice as fine as the last. The coarsest has three random values along the shorter
    side, so that the noise looks similar at every image size.

    Args:
        shape: height and width.
        octaves: how many fields to add.
        roughness: height of a field relative to the next coarser one, in 0–1.
        generator: the source of randomness.
    """
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        cells = [-(-3 * 2**octave * side // min(shape)) for side in shape]
        coarse = generator.standard_normal(cells, np.float32) * np.float32(roughness**octave)
        total += cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return stretch(total)


def stretch(field: np.ndarray) -> np.ndarray:
    """Map the field linearly onto 0–1."""
    low, high = field.min(), field.max()
    return (field - low) / (high - low)


def import_transforms() -> None:
    """Import albumentations; processes that are forked afterwards then have it, too.

    It wants PyTorch only for a conversion to tensors. Where PyTorch is not imported yet, it has to
    do without: that import would take seconds.
    """
    hidden = {"torch": None} if "torch" not in sys.modules else {}
    sys.modules.update(hidden)  # an import of None fails
    try:
        import albumentations  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]


@lru_cache(maxsize=512)
def _transform(
    name: str, options: tuple[tuple[str, object], ...], _thread: int
) -> "albumentations.BasicTransform":
    import_transforms()
    return getattr(sys.modules["albumentations"], name)(p=1.0, **dict(options))


def albument(
    image: np.ndarray, generator: np.random.Generator, name: str, **options: object
) -> np.ndarray:
    """Apply the albumentations transform of this name.

    It is built once per thread, because it holds its random state.
    """
    transform = _transform(name, tuple(options.items()), threading.get_ident())
    transform.set_random_state(generator, random.Random(int(generator.integers(2**32))))
    return transform(image=image)["image"]
