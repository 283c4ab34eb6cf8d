"""Weather: snow, frost, fog and, held out, spatter.

Snow, frost and fog are drawn here, without image files. albumentations has no frost; its snow
brightens by a threshold and tints; its fog takes 10 ms for a small image and is not monotone in its
strength.
"""

import cv2
import numpy as np

from tttlab.shifts.corruptions.canvas import (
    albument,
    clouds,
    cover,
    length_scale,
    line_kernel,
    stretch,
)


def snow(image: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Draw falling flakes in a light haze.

    Flakes are the highest ``share`` of a random field, blurred along a steep line.
    """
    scale = length_scale(image)
    height, width = image.shape[:2]
    coarse = generator.standard_normal((round(height / scale), round(width / scale)), np.float32)
    field = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    flakes = np.clip(2 * (field - np.quantile(field, 1 - share)), 0, 1)
    flakes = cv2.filter2D(flakes, -1, line_kernel(2 * scale, np.pi * generator.uniform(0.25, 0.75)))
    return cover(image, np.clip(share + flakes, 0, 1), (245, 247, 250))


def frost(image: np.ndarray, opacity: float, generator: np.random.Generator) -> np.ndarray:
    """Draw ice needles in patches."""
    drawn = ice(image.shape[:2], length_scale(image), generator)
    return cover(image, np.clip(drawn * (opacity / drawn.mean()), 0, 0.9), (226, 236, 245))


def ice(shape: tuple[int, int], scale: float, generator: np.random.Generator) -> np.ndarray:
    """Draw ice (H, W), 0 to 1: ridges of fractal noise, blurred in three random directions.

    Args:
        shape: height and width.
        scale: factor of lengths.
        generator: the source of randomness.
    """
    needles = np.zeros(shape, np.float32)
    for _ in range(3):
        ridges = 1 - np.abs(2 * clouds(shape, 4 + int(np.log2(scale)), 0.9, generator) - 1)
        smeared = cv2.filter2D(ridges, -1, line_kernel(5 * scale, generator.uniform(0, np.pi)))
        np.maximum(needles, smeared, out=needles)
    return stretch(needles) * clouds(shape, 3, 0.5, generator)


def fog(image: np.ndarray, opacity: float, generator: np.random.Generator) -> np.ndarray:
    """Cover the image with light grey whose opacity varies smoothly around a mean."""
    field = clouds(image.shape[:2], 4, 0.6, generator)
    return cover(image, np.clip(opacity + 0.5 * (field - field.mean()), 0, 0.95), (220, 222, 226))


def spatter(image: np.ndarray, opacity: float, generator: np.random.Generator) -> np.ndarray:
    """Cover about two fifths of the image with brown mud."""
    sigma = 1.2 * length_scale(image)
    # Mud is where blurred white noise exceeds its mean by 0.3 of its deviation, 1 / (2√π · sigma).
    threshold = 0.5 + 0.3 / (2 * np.sqrt(np.pi) * sigma)
    return albument(
        image,
        generator,
        "Spatter",
        mode="mud",
        mean=(0.5, 0.5),
        std=(1.0, 1.0),
        gauss_sigma=(sigma, sigma),
        cutout_threshold=(threshold, threshold),
        intensity=(opacity, opacity),
        color=(110, 82, 52),
    )
