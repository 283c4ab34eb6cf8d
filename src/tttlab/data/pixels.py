"""Images decoded whenever they are looked at: a folder larger than memory is read where it lies, without a copy."""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from tttlab.data.decoding import to_square, why_unreadable
from tttlab.errors import UserError

if TYPE_CHECKING:
    import torch

THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes outside the interpreter's lock


class Place(NamedTuple):
    """Where the bytes of an encoded image are: a whole file, or the ``length`` bytes of a tar's member from ``offset`` on."""

    path: str
    member: str = ""
    offset: int = 0
    length: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else self.path

    def open(self) -> Path | BinaryIO:
        """Give the file's path, or its part in memory."""
        if not self.member:
            return Path(self.path)
        with open(self.path, "rb") as file:  # its own handle: threads read side by side
            file.seek(self.offset)
            return io.BytesIO(file.read(self.length))


class Lazy:
    """``(N, S, S, 3)`` uint8 that are made at every look; an index gives them as a NumPy array.

    Args:
        shape: ``(N, S, S, 3)``.
        look: makes the pixels ``(n, S, S, 3)`` of the images with some numbers ``(n,)``.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], look: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self.shape, self._look = shape, look

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.arange(len(self))[key]
        return self._look(wanted) if wanted.ndim else self._look(wanted[None])[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


class InPlace:
    """``(N, S, S, 3)`` uint8 that are decoded anew at every look; an index copies them out, as a NumPy array.

    An image that is no longer what it was when the set was made stops the work, since nothing computed from it could be
    set beside what was computed before.

    Attributes:
        places: where the images are.
        hashes: N hashes of the decoded pixels, from `pixel_hash`.
        shape: ``(N, S, S, 3)``.
        depth: bits that were recorded of a pixel, of images with more than eight; None: what each file says.
    """

    def __init__(
        self, places: Sequence[Place], hashes: Sequence[str], size: int, depth: int | None = None
    ) -> None:
        self.places, self.hashes = tuple(places), tuple(hashes)
        self.shape, self.depth = (len(self.places), size, size, 3), depth

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.arange(len(self))[key]
        pixels = np.empty((wanted.size, *self.shape[1:]), np.uint8)

        def fill(place: int) -> None:
            pixels[place] = self._decode(int(wanted.flat[place]))

        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow's remarks on odd metadata, told when the sets were prepared
            if wanted.size == 1:
                fill(0)
            else:
                with ThreadPoolExecutor(THREADS) as pool:
                    list(pool.map(fill, range(wanted.size)))
        return pixels if wanted.ndim else pixels[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def take(self, indices: Sequence[int] | np.ndarray) -> "InPlace":
        """Choose some images, in the given order, without looking at them."""
        places, hashes = (
            [known[index] for index in indices] for known in (self.places, self.hashes)
        )
        return InPlace(places, hashes, self.shape[1], self.depth)

    def _decode(self, index: int) -> np.ndarray:
        place = self.places[index]
        try:
            pixels = to_square(place.open(), self.shape[1], self.depth)
        except Exception as error:  # damaged files fail in every way there is
            reason = why_unreadable(error)
            raise UserError(
                f"{place}: expected the image that was there when the sets were prepared, found none that can "
                f"be read ({reason}); bring it back, or run dvc repro -f prepare"
            ) from error
        if pixel_hash(pixels) != self.hashes[index]:
            raise UserError(
                f"{place}: expected the image that was there when the sets were prepared, found another; "
                "bring it back, or run dvc repro -f prepare"
            )
        return pixels


def pixel_hash(pixels: np.ndarray) -> str:
    """Hash one image's pixels (BLAKE2b, 16 bytes, hexadecimal)."""
    return hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=16).hexdigest()


def as_images(pixels: "torch.Tensor") -> "torch.Tensor":
    """Turn pixels ``(…, H, W, 3)`` uint8 into images ``(…, 3, H, W)`` in [0, 1].

    The memory keeps its order, colours innermost, in which convolutions are a quarter faster.
    """
    return pixels.movedim(-1, -3).float() / 255
