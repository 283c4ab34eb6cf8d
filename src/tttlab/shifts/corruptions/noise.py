"""Noise: Gaussian, shot, impulse and, held out, speckle; the same per pixel at any image size."""

import numpy as np

from tttlab.shifts.corruptions.canvas import albument, to_uint8


def gaussian(image: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """Add normal noise of this standard deviation to every value.

    albumentations is not used: its patterns come from OpenCV's process-wide generator, with only
    2**16 different seeds.
    """
    values = generator.standard_normal(image.shape, np.float32)
    return to_uint8(image + np.float32(255 * deviation) * values)


def shot(image: np.ndarray, photon: float, generator: np.random.Generator) -> np.ndarray:
    """Draw the number of photons from a Poisson distribution, in linear light (gamma 2.2).

    One photon is ``photon`` of the full light.
    """
    return albument(image, generator, "ShotNoise", scale_range=(photon, photon))


def impulse(image: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Turn this share of the pixels black or white, half of them each."""
    options = {"amount": (share, share), "salt_vs_pepper": (0.5, 0.5)}
    return albument(image, generator, "SaltAndPepper", **options)


def speckle(image: np.ndarray, spread: float, generator: np.random.Generator) -> np.ndarray:
    """Multiply every value by its own factor, uniform on 1 ± ``spread``."""
    factors = (1 - spread, 1 + spread)
    return albument(
        image,
        generator,
        "MultiplicativeNoise",
        multiplier=factors,
        per_channel=True,
        elementwise=True,
    )
