"""Weather of CIFAR-10-C: snow, frost, fog and, held out, spatter.

Reference: Hendrycks and Dietterich, ICLR 2019, arXiv:1903.12261. Its frost is photographs of ice;
ours is drawn.
"""

from typing import NamedTuple

import cv2
import numpy as np

from tttlab.config.values import CIFAR_SIDE
from tttlab.shifts.corruptions.canvas import stretch
from tttlab.shifts.corruptions.cifar10_c.filters import smear, smooth, write, zoom
from tttlab.shifts.corruptions.weather import ice

GREY = (0.299, 0.587, 0.114)  # of red, green and blue
WATER = (175 / 255, 238 / 255, 238 / 255)
MUD = (63 / 255, 42 / 255, 20 / 255)
# Of ice: its mean colour, and the standard deviation of its brightness. Those of 32 pixels of the
# five photographs, two of which show the same, so that images keep as much as under the original.
PALE, TEAL, BLUE, DARK = (
    ((0.78, 0.80, 0.83), 0.07),
    ((0.31, 0.58, 0.65), 0.06),
    ((0.56, 0.62, 0.67), 0.10),
    ((0.41, 0.45, 0.50), 0.13),
)
ICES = (TEAL, PALE, PALE, BLUE, DARK)


class Snow(NamedTuple):
    """Strength of `snow`.

    Attributes:
        mean: of the normal noise that flakes are made of.
        deviation: its standard deviation.
        zoom: how often it is magnified.
        threshold: what is lower is no flake.
        radius: of the smear, in pixels.
        sigma: of the smear, in pixels.
        kept: share of the image that is not whitened.
    """

    mean: float
    deviation: float
    zoom: float
    threshold: float
    radius: int
    sigma: float
    kept: float


class Frost(NamedTuple):
    """Strength of `frost`: weights of the image and of the ice."""

    image: float
    ice: float


class Fog(NamedTuple):
    """Strength of `fog`: of its brightest point, and how much calmer each finer scale is."""

    amount: float
    decay: float


class Spatter(NamedTuple):
    """Strength of `water` and `mud`.

    Attributes:
        mean: of the normal noise that drops are made of.
        deviation: its standard deviation.
        sigma: of the Gaussian that smooths it, in pixels.
        threshold: what is lower is dry.
        last: of water its brightness, of mud the deviation of what softens its edges, in pixels.
        muddy: whether it is mud.
    """

    mean: float
    deviation: float
    sigma: float
    threshold: float
    last: float
    muddy: bool


def snow(image: np.ndarray, strength: Snow, generator: np.random.Generator) -> np.ndarray:
    """Whiten the image, and add smeared flakes and the same flakes turned by 180 degrees."""
    flakes = generator.normal(strength.mean, strength.deviation, (CIFAR_SIDE, CIFAR_SIDE))
    flakes = zoom(flakes, strength.zoom)
    flakes = write(np.where(flakes < strength.threshold, 0, flakes))
    angle = generator.uniform(-135, -45)
    flakes = smear(flakes, strength.radius, strength.sigma, angle)[..., None] / 255
    colours = image / 255
    whitened = np.maximum(colours, 1.5 * (colours @ GREY)[..., None] + 0.5)
    ground = strength.kept * colours + (1 - strength.kept) * whitened
    return write(ground + flakes + flakes[::-1, ::-1])


def frost(image: np.ndarray, strength: Frost, generator: np.random.Generator) -> np.ndarray:
    """Add ice to the image, by the published weights."""
    return write(strength.image / 255 * image + strength.ice * frozen_glass(generator))


def frozen_glass(generator: np.random.Generator) -> np.ndarray:
    """Draw ice (32, 32, 3) of the range 0–1, of one of five kinds."""
    colour, contrast = ICES[generator.integers(len(ICES))]
    needles = ice((CIFAR_SIDE, CIFAR_SIDE), 1, generator)
    pattern = (needles - needles.mean()) / needles.std()
    # The photographs were shrunk to a fifth: half of what they vary by is from pixel to pixel.
    pattern = (pattern + generator.standard_normal((CIFAR_SIDE, CIFAR_SIDE))) / np.sqrt(2)
    shade = generator.normal(0, 0.045)  # from place to place in a photograph
    return np.clip(np.array(colour) + shade + contrast * pattern[..., None], 0, 1)


def plasma(decay: float, generator: np.random.Generator) -> np.ndarray:
    """Draw a plasma fractal (32, 32) from 0 to 1 by the diamond-square algorithm.

    Edges are joined. The height grid is refined five times: new points are the mean of their four
    neighbours plus noise, first in the middle of squares, then between these and the old points;
    the noise is uniform, and its range decays by the square of ``decay``.

    Reference: Fournier, Fussell and Carpenter, CACM 25(6), 1982.
    """
    heights, noise = np.zeros((1, 1)), 1.0
    while len(heights) < CIFAR_SIDE:
        side = len(heights)
        middles, top, left = noise * generator.uniform(-1, 1, (3, side, side))
        down, right = np.roll(heights, -1, 0), np.roll(heights, -1, 1)
        middles += (heights + down + right + np.roll(down, -1, 1)) / 4
        top += (heights + right + middles + np.roll(middles, 1, 0)) / 4
        left += (heights + down + middles + np.roll(middles, 1, 1)) / 4
        finer = np.stack([np.stack([heights, top], 2), np.stack([left, middles], 2)], 1)
        heights, noise = finer.reshape(2 * side, 2 * side), noise / decay**2
    return stretch(heights)


def fog(image: np.ndarray, strength: Fog, generator: np.random.Generator) -> np.ndarray:
    """Add a plasma fractal, and darken so that the brightest value could stay what it was."""
    colours = image / 255
    brightest = colours.max()
    veiled = colours + strength.amount * plasma(strength.decay, generator)[..., None]
    return write(veiled * brightest / (brightest + strength.amount))


def spatter(image: np.ndarray, strength: Spatter, generator: np.random.Generator) -> np.ndarray:
    """Spatter with water or mud; now and then no drop falls."""
    drops = generator.normal(strength.mean, strength.deviation, (CIFAR_SIDE, CIFAR_SIDE))
    drops = smooth(drops, strength.sigma)
    drops[drops < strength.threshold] = 0
    if not strength.muddy:
        return write(image / np.float32(255) + water(drops, strength.last)[..., None] * WATER)
    mud = smooth((drops > strength.threshold).astype(float), strength.last)[..., None]
    mud[mud < 0.8] = 0
    return write(image / 255 * (1 - mud) + mud * MUD)


def water(drops: np.ndarray, brightness: float) -> np.ndarray:
    """Light drops (32, 32) as if from a side; the brightest point has this brightness."""
    levels = (drops * 255).astype(np.uint8)
    outlines = cv2.Canny(levels, 50, 150)
    depth = cv2.distanceTransform(255 - outlines, cv2.DIST_L2, 5)
    depth = cv2.blur(np.minimum(depth, 20), (3, 3)).astype(np.uint8)
    relief = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)
    lit = cv2.filter2D(cv2.equalizeHist(depth), cv2.CV_8U, relief)
    light = levels * cv2.blur(lit, (3, 3)).astype(np.float32)
    return brightness / max(light.max(), 1) * light
