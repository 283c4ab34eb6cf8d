"""Random perturbations of training images that are none of the corruptions tested on.

An image goes through a random filter, a random mixture of its colours, random tone curves and
coloured noise, each of a random strength. The first three are primitives of PRIME (Modas et al.,
ECCV 2022, arXiv 2112.13547), the filter after random convolutions (Xu et al., ICLR 2021, arXiv
2007.13003). The families are as general as that, so that training on them can teach robustness, but
not one of the tested corruptions: noise is never white, filters have random signs, and tone curves
bend.
"""

import cv2
import numpy as np

LARGEST_FILTER = 1.0  # norm of the deviation from the identity
LARGEST_MIXTURE = 0.4  # deviation of the matrix of colours from the identity
LARGEST_CURVE = 0.1  # of the whole range of tones
LARGEST_NOISE = 0.15  # standard deviation, of the whole range
WAVES = 5  # of a tone curve
TONES = np.linspace(0, 1, 256)  # between which a tone curve is straight
COLOURS = (0.5, 2.0)  # exponents β of the noise's power 1/f^β; white noise has 0


def perturb(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Perturb an image by all four.

    Args:
        pixels: ``(H, W, 3)`` uint8.
        generator: the image's own stream.

    Returns:
        an image of the same shape and type.
    """
    strengths = generator.random(4)
    image = pixels.astype(np.float64) / 255
    image = filtered(image, strengths[0] * LARGEST_FILTER, generator)
    image = mixed(image, strengths[1] * LARGEST_MIXTURE, generator)
    image = curved(np.clip(image, 0, 1), strengths[2] * LARGEST_CURVE, generator)
    image = image + strengths[3] * LARGEST_NOISE * coloured_noise(image.shape, generator)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def filtered(image: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Add a random 3 × 3 filter's response, of all channels alike.

    The filter's weights sum to 0, so that even areas stay as they are; its norm is ``strength``.

    Args:
        image: ``(H, W, 3)``.
        strength: norm of the filter.
        generator: for its nine weights.
    """
    weights = generator.standard_normal((3, 3))
    weights -= weights.mean()
    weights *= strength / np.linalg.norm(weights)
    return image + cv2.filter2D(image, -1, weights, borderType=cv2.BORDER_REFLECT_101)


def mixed(image: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Mix the colours by a random matrix near the identity that keeps greys.

    Args:
        image: ``(H, W, 3)``.
        strength: standard deviation of the matrix's entries about the identity.
        generator: for its nine entries.
    """
    matrix = generator.standard_normal((3, 3))
    matrix -= matrix.mean(0)  # every column of what is added sums to 0
    return image + strength * image @ matrix


def curved(image: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Bend the tones of every channel by random sine waves that keep black and white.

    Args:
        image: ``(H, W, 3)`` in [0, 1].
        strength: standard deviation of the first wave's amplitude; that of wave k is a k-th of it.
        generator: for `WAVES` amplitudes of each channel.
    """
    waves = np.arange(1, WAVES + 1)
    amplitudes = strength * generator.standard_normal((3, WAVES)) / waves
    bends = amplitudes @ np.sin(np.pi * np.outer(waves, TONES))
    return image + np.stack(
        [np.interp(image[..., channel], TONES, bend) for channel, bend in enumerate(bends)], axis=-1
    )


def coloured_noise(shape: tuple[int, int, int], generator: np.random.Generator) -> np.ndarray:
    """Draw noise whose power falls with the spatial frequency f as 1/f^β, β in `COLOURS`.

    Args:
        shape: of the image, ``(H, W, C)``.
        generator: for β and the noise.

    Returns:
        noise of mean 0 and standard deviation 1 in every channel, which are independent.
    """
    height, width, channels = shape
    beta = generator.uniform(*COLOURS)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no constant part
    spectrum = np.fft.rfft2(generator.standard_normal((channels, height, width)))
    noise = np.fft.irfft2(spectrum * frequency ** (-beta / 2), s=(height, width))
    return (noise / noise.std((1, 2), keepdims=True)).transpose(1, 2, 0)
