"""Images as they are sent: bytes, base64, arrays and, where it is allowed, files of the server."""

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tttlab.data.decoding import to_square, why_unreadable
from tttlab.errors import UserError

# Others start programs (EPS), are no pictures (PDF, MPEG), or are read character by character, so
# that a small file takes minutes (PPM).
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
SCANS = 100  # most of a progressive JPEG, which is decoded anew for each; usual are ten
LARGEST_LIMIT = 10**9  # in its unit; nobody waits for more seconds
FILE, DATA = "file:", "data:"


@dataclass(frozen=True)
class Limits:
    """What a server does for one request, and what it refuses.

    Attributes:
        images: most images of a request.
        pixels: most pixels of a request's images together; they are counted before any is decoded.
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


@dataclass(frozen=True)
class SentImage:
    """An image as it was sent. Nothing of it is decoded, and no file is open.

    Attributes:
        content: of an image file; or the image, where it came as an array.
        size: width and height, in pixels.
    """

    content: bytes | Image.Image
    size: tuple[int, int]

    @property
    def pixels(self) -> int:
        """Give the number of pixels."""
        return self.size[0] * self.size[1]


def decode(picture: Any, size: int, depth: int | None, limits: Limits) -> np.ndarray:
    """Turn one image as it was sent into what the pipeline would make of its file.

    Args:
        picture: as `take` takes it.
        size: side of the square, in pixels.
        depth: as for `to_square`.
        limits: what is refused.

    Returns:
        ``(size, size, 3)`` uint8.

    Raises:
        UserError: it is no image, it is too large, or it cannot be read.
    """
    return squared(take(picture, limits), size, depth)


def take(picture: Any, limits: Limits) -> SentImage:
    """Take one image as it was sent, and find out how large it is.

    Args:
        picture: bytes of an image file; text: such bytes in base64, with or without a
            ``data:image/…;base64,`` in front, or ``file:<path>`` in the folder that is allowed;
            an array or nested lists ``(H, W, 3)`` or ``(H, W)`` of whole numbers from 0 to 255; or,
            which no request can hold, the path of a file.
        limits: what is refused.

    Raises:
        UserError: it is none of these, or it is too large.
    """
    if isinstance(picture, str):
        picture = _from_text(picture, limits)
    if isinstance(picture, Path):
        try:
            picture = _contents(picture, limits)
        except OSError as error:
            raise _unreadable(error) from error
    if isinstance(picture, (bytes, bytearray, memoryview)):
        content = bytes(picture)
    elif isinstance(picture, (np.ndarray, list, tuple)):
        content = _from_array(picture)
    else:
        raise UserError(
            "expected an image as bytes, base64 or an array (H, W, 3), "
            f"found {type(picture).__name__}"
        )
    try:
        # What a file tells of itself, 64 MB of text in a PNG, goes as it is closed.
        with _opened(content) as image:
            taken = SentImage(content, image.size)
            scans = content.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 0
    # Pillow's own limits; where warnings are errors, it gives the first of them.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(_too_large(limits, "far more")) from error
    except Exception as error:
        raise _unreadable(error) from error
    check_pixels([taken], limits)
    if scans > SCANS:
        raise UserError(f"expected at most {SCANS} scans of a progressive JPEG, found {scans}")
    return taken


def _opened(content: bytes | Image.Image) -> Image.Image:
    if isinstance(content, Image.Image):
        return content
    return Image.open(io.BytesIO(content), "r", FORMATS)


def squared(picture: SentImage, size: int, depth: int | None) -> np.ndarray:
    """Decode an image that `take` gave; see `decode`."""
    try:
        return to_square(_opened(picture.content), size, depth)
    except Exception as error:  # whatever Pillow raises
        raise _unreadable(error) from error


def check_pixels(pictures: Sequence[SentImage], limits: Limits) -> None:
    """Refuse images that have too many pixels together, before they are decoded.

    Raises:
        UserError: there are more pixels than allowed.
    """
    count = sum(picture.pixels for picture in pictures)
    if count > limits.pixels:
        one = len(pictures) == 1
        found = " x ".join(map(str, pictures[0].size)) if one else f"{count:,}"
        raise UserError(_too_large(limits, found, "" if one else " together"))


def _too_large(limits: Limits, found: str, together: str = "") -> str:
    return f"expected at most {limits.pixels:,} pixels{together}, found {found}; send it smaller"


def _unreadable(error: Exception) -> UserError:
    return UserError(f"expected an image, found none that can be read ({why_unreadable(error)})")


def _from_text(text: str, limits: Limits) -> bytes:
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


def _from_file(name: str, limits: Limits) -> bytes:
    """Read a file in the folder that is allowed; links that lead out of it are refused, too."""
    if limits.folder is None:
        raise UserError(
            "expected an image as bytes or base64, found the name of a file, and this server opens "
            "none; its owner allows a folder by the setting folder"
        )
    folder = Path(limits.folder).resolve()
    try:
        path = (folder / name).resolve()
        if path.is_relative_to(folder) and path.is_file():
            return _contents(path, limits)
    except (OSError, ValueError):  # a name too long, a zero byte, a file that may not be read
        pass
    raise UserError(
        f"expected a file in the folder that this server allows, found no {name[:200]!r}"
    )


def _contents(path: Path, limits: Limits) -> bytes:
    if path.stat().st_size > limits.megabytes * 10**6:
        raise UserError(f"expected a file of at most {limits.megabytes} MB, found a larger one")
    return path.read_bytes()


def _from_array(values: Any) -> Image.Image:
    if not isinstance(values, np.ndarray):
        _check_numbers(values)
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


def nesting(values: Any) -> tuple[int, Any]:
    """Give how deeply lists or arrays are nested, and the first of what they hold."""
    depth = 0
    while isinstance(values, (list, tuple, np.ndarray)) and len(values):
        depth, values = depth + 1, values[0]
    return depth, values


def _check_numbers(values: Any) -> None:
    """Refuse lists with anything but whole numbers in them.

    NumPy would make room for the longest text in every place of an array.
    """
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, (list, tuple)):
            left.extend(value)
        elif isinstance(value, bool) or not isinstance(value, (int, np.integer, np.ndarray)):
            kind = type(value).__name__
            raise UserError(f"expected whole numbers from 0 to 255, found a value of type {kind}")
