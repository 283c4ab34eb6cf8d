"""From a picture in any file format and colour mode to a small square of RGB bytes."""

import re
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from tttlab.data.depths import Samples, read_samples

_WHITE = (255, 255, 255, 255)
_STARTING_PROGRAMS = ("EPS", "WMF")  # Ghostscript, Windows' drawing
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


def to_square(
    picture: Image.Image | Path | BinaryIO, size: int, depth: int | None = None
) -> np.ndarray:
    """Decode, turn upright, convert to RGB, resize the shorter side to ``size``, crop the centre.

    Bicubic with antialiasing. Transparent pixels are laid on white. Grey of more than eight bits
    keeps the upper eight of the recorded bits. JPEG files much larger than needed are decoded at a
    reduced scale, never below twice ``size``.

    Args:
        picture: an image, the path of an image file, or such a file opened.
        size: side of the square, in pixels.
        depth: recorded bits per value of images with more than eight; None: what the file says.

    Returns:
        ``(size, size, 3)`` uint8.

    Raises:
        UnknownScale: nothing says which of the image's values is white.
        Exception: Pillow's various errors on a damaged, unknown or oversized file.
    """
    image = picture if isinstance(picture, Image.Image) else Image.open(picture, "r", _formats())
    with image:
        image.draft(None, (2 * size, 2 * size))
        samples = read_samples(image)  # before loading, which closes the file
        image.load()
        upright = _to_rgb(ImageOps.exif_transpose(image), samples, depth)
    side = min(upright.size)
    left, top = (upright.width - side) / 2, (upright.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(
        upright.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    )


@cache
def _formats() -> list[str]:
    """List the formats that Pillow reads by itself: a file's name does not tell which one it is."""
    Image.init()
    return [name for name in Image.ID if name not in _STARTING_PROGRAMS]


def why_unreadable(error: Exception) -> str:
    """Say in one line why an image could not be decoded.

    Memory addresses are cut out, so that the line is the same every time.
    """
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r" <[^>]* object at 0x[0-9a-f]+>", "", line)


def _to_rgb(image: Image.Image, samples: Samples, depth: int | None) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow clips values above 255 instead of scaling them
        values = np.asarray(image)
        scaled = values >> samples.depth_of(values, depth) - 8
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of unknown range")
    samples.check_colours(image, depth)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, _WHITE)
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")
