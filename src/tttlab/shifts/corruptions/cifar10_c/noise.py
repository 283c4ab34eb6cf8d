"""Noise of CIFAR-10-C: Gaussian, shot, impulse and, held out, speckle; every value on its own.

Reference: Hendrycks and Dietterich, ICLR 2019, arXiv:1903.12261.
"""

import numpy as np

from tttlab.shifts.corruptions.cifar10_c.filters import write


def gaussian(image: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """Add normal noise of this standard deviation, of the range 0–1."""
    return write(image / 255 + deviation * generator.standard_normal(image.shape))


def shot(image: np.ndarray, photons: float, generator: np.random.Generator) -> np.ndarray:
    """Draw every value from a Poisson distribution; white is this many photons."""
    return write(generator.poisson(image / 255 * photons) / photons)


def impulse(image: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Turn this share of the values into 0 or 255, as likely; channels on their own."""
    hit = generator.random(image.shape) < share
    white = generator.random(image.shape) < 0.5
    return np.where(hit, np.uint8(255) * white, image)


def speckle(image: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """Multiply every value by its own factor, normal around 1 with this standard deviation."""
    return write(image / 255 * (1 + deviation * generator.standard_normal(image.shape)))
