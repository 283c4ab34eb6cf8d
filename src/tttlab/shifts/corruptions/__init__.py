"""Nineteen synthetic corruptions: (image, name, severity, generator) → image.

The names are those of CIFAR-10-C. Of the strength ``own``, transforms and strengths are our own:
accuracies on them must not be compared with published CIFAR-10-C numbers. Of the strength
``cifar10_c`` they are those of CIFAR-10-C, written anew. docs/corruptions.md shows how much damage
every severity does, how our own strengths were found, and how near the others come.

Reference: Hendrycks and Dietterich, ICLR 2019, arXiv:1903.12261.
"""

from collections.abc import Sequence

import numpy as np

from tttlab.config.values import CIFAR_SIDE, SEVERITIES
from tttlab.errors import UserError, choices
from tttlab.seeding import numpy_generator
from tttlab.shifts.corruptions import blur, digital, noise, weather
from tttlab.shifts.corruptions.cifar10_c import table
from tttlab.shifts.corruptions.corruption import Corruption

# Every line's comment says what the strengths are. A length is in pixels of an image of side 32 and
# grows with larger images, see `canvas.length_scale`.
TABLE = {
    # standard deviation, of the range 0–1
    "gaussian_noise": Corruption(noise.gaussian, (0.03, 0.05, 0.07, 0.095, 0.13)),
    # light of one photon, of the linear range 0–1
    "shot_noise": Corruption(noise.shot, (0.004, 0.009, 0.017, 0.03, 0.055)),
    # share of the pixels that are hit
    "impulse_noise": Corruption(noise.impulse, (0.006, 0.017, 0.033, 0.055, 0.085)),
    # radius of the disc, a length
    "defocus_blur": Corruption(blur.defocus, (0.75, 0.95, 1.15, 1.4, 1.65)),
    # largest displacement of a pixel along an axis, a length
    "glass_blur": Corruption(blur.glass, (0.4, 0.6, 0.85, 1.15, 1.5)),
    # movement of the camera, a length
    "motion_blur": Corruption(blur.motion, (1.4, 2.0, 2.6, 3.2, 4.0)),
    # movement of the nearest edge, a length
    "zoom_blur": Corruption(blur.zoom, (0.95, 1.9, 2.9, 4.0, 5.3)),
    # share of the picture where flakes begin
    "snow": Corruption(weather.snow, (0.02, 0.04, 0.06, 0.08, 0.105)),
    # mean opacity of the ice
    "frost": Corruption(weather.frost, (0.14, 0.21, 0.28, 0.35, 0.42)),
    # mean opacity of the fog
    "fog": Corruption(weather.fog, (0.2, 0.32, 0.42, 0.51, 0.6)),
    # amount added, of the range 0–1
    "brightness": Corruption(digital.brightness, (0.06, 0.11, 0.16, 0.22, 0.29)),
    # share of the contrast that is left
    "contrast": Corruption(digital.contrast, (0.75, 0.55, 0.42, 0.34, 0.27)),
    # root mean square of the shift along an axis, a length
    "elastic_transform": Corruption(digital.elastic, (0.4, 0.65, 0.9, 1.1, 1.35)),
    # side of a block, a length
    "pixelate": Corruption(digital.pixelate, (1.1, 1.23, 1.39, 1.6, 2.0)),
    # JPEG quality
    "jpeg_compression": Corruption(digital.jpeg, (80, 62, 45, 30, 18)),
    # factors are uniform on 1 ± this
    "speckle_noise": Corruption(noise.speckle, (0.08, 0.18, 0.27, 0.37, 0.5)),
    # standard deviation, a length
    "gaussian_blur": Corruption(blur.gaussian, (0.5, 0.65, 0.78, 0.9, 1.05)),
    # opacity of the mud
    "spatter": Corruption(weather.spatter, (0.35, 0.5, 0.65, 0.8, 0.95)),
    # share by which the saturation rises
    "saturate": Corruption(digital.saturate, (0.4, 0.8, 1.2, 1.7, 2.4)),
}


TABLES = {"own": TABLE, "cifar10_c": table.TABLE}


def corrupt(
    image: np.ndarray,
    name: str,
    severity: int,
    generator: np.random.Generator,
    strength: str = "own",
) -> np.ndarray:
    """Corrupt one image; the input stays as it is.

    Args:
        image: RGB, uint8, shape (H, W, 3), both sides at least 16; 32 of the strength cifar10_c.
        name: one of ``CORRUPTIONS`` or ``HELD_OUT``.
        severity: 1 (mild) to 5 (strong).
        generator: the only source of randomness, so that the same state gives the same picture.
        strength: ``own`` or ``cifar10_c``.

    Returns:
        The corrupted image, uint8, shape (H, W, 3).

    Raises:
        UserError: for an unknown name, severity or strength, or an image of another kind.
    """
    _check_shift(name, severity, strength)
    is_rgb = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    if not is_rgb or min(image.shape[:2]) < 16:
        raise UserError(
            "an image to corrupt: expected RGB, uint8, shape (H, W, 3) "
            "with both sides at least 16, "
            f"found {image.dtype} of shape {image.shape}; convert or enlarge it first"
        )
    _check_size(image.shape[:2], strength)
    corruption = TABLES[strength][name]
    chosen = corruption.strengths[int(severity) - 1]
    return corruption.apply(np.ascontiguousarray(image), chosen, generator)


def corrupt_all(
    pixels: np.ndarray,
    image_ids: Sequence[str],
    name: str,
    severity: int,
    seed: int,
    strength: str = "own",
) -> np.ndarray:
    """Corrupt a set of images, each from its own stream of (seed, image id, name, severity).

    The result depends neither on an image's position in the set nor on the other images.

    Args:
        pixels: RGB, uint8, shape (N, H, W, 3).
        image_ids: N identifiers, in the order of ``pixels``.
        name: one of ``CORRUPTIONS`` or ``HELD_OUT``.
        severity: 1 to 5.
        seed: the experiment's seed.
        strength: ``own`` or ``cifar10_c``.

    Returns:
        The corrupted images, uint8, shape (N, H, W, 3).

    Raises:
        UserError: as ``corrupt`` does.
    """
    _check_shift(name, severity, strength)
    _check_size(pixels.shape[1:3], strength)
    corrupted = np.empty(pixels.shape, np.uint8)
    for index, (image, image_id) in enumerate(zip(pixels, image_ids, strict=True)):
        # Plain int and str: a key of NumPy scalars would open another stream.
        key = (int(seed), "corruption", str(image_id), str(name), int(severity))
        generator = numpy_generator(*key)
        corrupted[index] = corrupt(image, name, severity, generator, strength)
    return corrupted


def _check_shift(name: str, severity: int, strength: str) -> None:
    if strength not in TABLES:
        raise UserError(
            f"strength of corruptions: expected a known one, found {strength!r}; "
            f"{choices(str(strength), TABLES)}"
        )
    if name not in TABLE:
        raise UserError(
            f"corruption: expected a known name, found {name!r}; {choices(str(name), TABLE)}"
        )
    if severity not in SEVERITIES:
        raise UserError(
            f"severity of {name}: expected 1, 2, 3, 4 or 5, found {severity!r}; choose one of these"
        )


def _check_size(shape: tuple[int, ...], strength: str) -> None:
    side = CIFAR_SIDE
    if strength == "cifar10_c" and tuple(shape) != (side, side):
        raise UserError(
            f"an image to corrupt: expected {side} × {side} pixels, for which the strengths of "
            f"CIFAR-10-C are defined, found {' × '.join(map(str, shape))}; "
            "resize it, or take the strength own"
        )
