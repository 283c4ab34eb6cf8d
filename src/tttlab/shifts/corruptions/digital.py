"""Processing: brightness, contrast, elastic, pixelate, JPEG and, held out, saturate."""

import cv2
import numpy as np

from tttlab.shifts.corruptions.canvas import albument, length_scale, to_uint8


def brightness(image: np.ndarray, amount: float, generator: np.random.Generator) -> np.ndarray:
    """Add ``amount`` of the full range to every value."""
    limits = {"brightness_limit": (amount, amount), "contrast_limit": (0, 0)}
    return albument(image, generator, "RandomBrightnessContrast", **limits)


def contrast(image: np.ndarray, factor: float, _generator: np.random.Generator) -> np.ndarray:
    """Pull every value towards the image's mean grey until ``factor`` of the distance is left."""
    from albumentations.augmentations.pixel.functional import adjust_contrast_torchvision

    return adjust_contrast_torchvision(image, factor)


def saturate(image: np.ndarray, amount: float, _generator: np.random.Generator) -> np.ndarray:
    """Multiply the saturation by 1 + ``amount``, then add a tenth of ``amount``.

    The addition tints grey red. albumentations leaves grey as it is, so grey images would stay.
    """
    hsv = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = np.minimum(hsv[..., 1] * (1 + amount) + 0.1 * amount, 1)
    return to_uint8(255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def elastic(image: np.ndarray, shift: float, generator: np.random.Generator) -> np.ndarray:
    """Shift pixels by a smooth random field, with root mean square ``shift`` along each axis."""
    scale = length_scale(image)
    sigma = 4 * scale
    # Uniform noise on ±1 has deviation 1/√3; the blur leaves 1 / (2√π · sigma) of it.
    alpha = shift * scale * np.sqrt(3) * 2 * np.sqrt(np.pi) * sigma
    field = {"alpha": float(alpha), "sigma": sigma, "noise_distribution": "uniform"}
    return albument(
        image, generator, "ElasticTransform", **field, border_mode=cv2.BORDER_REFLECT_101
    )


def pixelate(image: np.ndarray, block: float, _generator: np.random.Generator) -> np.ndarray:
    """Average the image over blocks and show each block as one colour.

    albumentations enlarges with OpenCV's plain nearest neighbour, which is off by up to half a
    block: the picture is then shifted as well, and coarser blocks can do less damage.
    """
    height, width = image.shape[:2]
    side = block * length_scale(image)
    blocks = (round(width / side), round(height / side))
    small = cv2.resize(image, blocks, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def jpeg(image: np.ndarray, quality: int, generator: np.random.Generator) -> np.ndarray:
    """Compress as JPEG and decode."""
    # albumentations passes the channels to OpenCV as they are, which takes the first one for blue.
    blue_first = np.ascontiguousarray(image[..., ::-1])
    settings = {"compression_type": "jpeg", "quality_range": (quality, quality)}
    compressed = albument(blue_first, generator, "ImageCompression", **settings)
    return np.ascontiguousarray(compressed[..., ::-1])
