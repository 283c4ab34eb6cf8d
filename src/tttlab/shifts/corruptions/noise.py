"""Noise: Gaussian, shot, impulse and, held out, speckle. Each is drawn per pixel, whatever the image size."""

import numpy as np

from tttlab.shifts.corruptions.canvas import albument, to_uint8


def gaussian(image: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """Add normal noise of this standard deviation to every value.

    Not through albumentations: its patterns come from OpenCV's process-wide generator, which it seeds in 2**16 ways.
    """
    return to_uint8(
        image + np.float32(255 * deviation) * generator.standard_normal(image.shape, np.float32)
    )


def shot(image: np.ndarray, photon: float, generator: np.random.Generator) -> np.ndarray:
    """Count photons: a Poisson draw in linear light (gamma 2.2), where one photon is worth ``photon`` of full light."""
    return albument(image, generator, "ShotNoise", scale_range=(photon, photon))


def impulse(image: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Turn this share of the pixels black or white, half of them each."""
    return albument(
        image, generator, "SaltAndPepper", amount=(share, share), salt_vs_pepper=(0.5, 0.5)
    )


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
