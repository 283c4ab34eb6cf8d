"""Images as they are sent: bytes, base64, arrays and, where it is allowed, files of the server."""

import base64
import binascii
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tttlab.data.decoding import to_square, why_unreadable
from tttlab.errors import UserError

# Others start programs (EPS), or are no pictures (PDF, MPEG).
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
FILE, DATA = "file:", "data:"


@dataclass(frozen=True)
class Limits:
    """What a server does for one request, and what it refuses.

    Attributes:
        images: most images of a request.
        pixels: most pixels of an image; it is refused before it is decoded.
        megabytes: most megabytes (10⁶ bytes) of a request.
        steps: most steps.
        seconds: longest time that a request waits for its answer.
        waiting: most images that wait; a request that would exceed it is refused.
        folder: where files named by a request may lie; None: it may name none.
    """

    images: int = 64
    pixels: int = 40_000_000
    megabytes: int = 16
    steps: int = 50
    seconds: float = 60.0
    waiting: int = 1024
    folder: str | None = None


def decode(picture: Any, size: int, depth: int | None, limits: Limits) -> np.ndarray:
    """Turn one image as it was sent into what the pipeline would make of its file.

    Args:
        picture: bytes of an image file; text: such bytes in base64, with or without a
            ``data:image/…;base64,`` in front, or ``file:<path>`` in the folder that is allowed; an
            array or nested lists ``(H, W, 3)`` or ``(H, W)`` of whole numbers from 0 to 255.
        size: side of the square, in pixels.
        depth: as for `to_square`.
        limits: what is refused.

    Returns:
        ``(size, size, 3)`` uint8.

    Raises:
        UserError: it is none of these, it is too large, or it cannot be read.
    """
    if isinstance(picture, str):
        picture = _from_text(picture, limits)
    if isinstance(picture, (bytes, bytearray, memoryview)):
        picture = io.BytesIO(picture)
    elif isinstance(picture, (np.ndarray, list, tuple)):
        picture = _from_array(picture)
    elif not isinstance(picture, Path):
        raise UserError(
            "expected an image as bytes, base64 or an array (H, W, 3), "
            f"found {type(picture).__name__}"
        )
    try:
        with warnings.catch_warnings():
            # Of 90 million pixels; our own limit is told in a better sentence.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = _open(picture)
            _check_size(image, limits)
            return to_square(image, size, depth)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(_too_large(limits, "far more")) from error
    except Exception as error:  # whatever Pillow raises
        raise UserError(
            f"expected an image, found none that can be read ({why_unreadable(error)})"
        ) from error


def _open(picture: Image.Image | Path | io.BytesIO) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.open(picture, formats=FORMATS)


def _check_size(image: Image.Image, limits: Limits) -> None:
    if image.width * image.height > limits.pixels:
        image.close()
        raise UserError(_too_large(limits, f"{image.width} x {image.height}"))


def _too_large(limits: Limits, found: str) -> str:
    return f"expected an image of at most {limits.pixels:,} pixels, found {found}; send it smaller"


def _from_text(text: str, limits: Limits) -> bytes | Path:
    if text.startswith(FILE):
        return _from_file(text.removeprefix(FILE), limits)
    if text.startswith(DATA):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(
            f"expected an image in base64, found text that is none ({error}); "
            f"a file of the server is written {FILE}<path>"
        ) from error


def _from_file(name: str, limits: Limits) -> Path:
    """Find a file in the folder that is allowed; links that lead out of it are refused, too."""
    if limits.folder is None:
        raise UserError(
            "expected an image as bytes or base64, found the name of a file, and this server opens "
            "none; its owner allows a folder by the setting folder"
        )
    folder = Path(limits.folder).resolve()
    try:
        path = (folder / name).resolve()
        if path.is_relative_to(folder) and path.is_file():
            return path
    except (OSError, ValueError):  # a name too long, a zero byte
        pass
    raise UserError(
        f"expected a file in the folder that this server allows, found no {name[:200]!r}"
    )


def _from_array(values: Any) -> Image.Image:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise UserError("expected an array (H, W, 3), found lists of different lengths") from error
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if not shaped or not array.size:
        raise UserError(f"expected an array (H, W, 3) or (H, W), found one of shape {array.shape}")
    whole = array.dtype.kind in "iu"
    if not whole or array.min() < 0 or array.max() > 255:
        found = f"{array.dtype}" + (f" from {array.min()} to {array.max()}" if whole else "")
        raise UserError(f"expected whole numbers from 0 to 255, found {found}")
    return Image.fromarray(array.astype(np.uint8))
