"""Images decoded at every access, so that a folder larger than memory needs no decoded copy."""

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


NOWHERE = -1  # the offset of a link in a tar file to what is no file of it


class Place(NamedTuple):
    """Where an encoded image is: a whole file, or a tar member's ``length`` bytes at ``offset``."""

    path: str
    member: str = ""
    offset: int = 0
    length: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else self.path

    def open(self) -> Path | BinaryIO:
        """Return the file's path, or the tar member's bytes as a file in memory."""
        if not self.member:
            return Path(self.path)
        if self.offset == NOWHERE:
            raise FileNotFoundError("a link to what is no file of the tar file")
        with open(self.path, "rb") as file:  # a handle of its own, for threads
            file.seek(self.offset)
            return io.BytesIO(file.read(self.length))


class Lazy:
    """``(N, S, S, 3)`` uint8 computed at every access; indexing gives a NumPy array.

    Args:
        shape: ``(N, S, S, 3)``.
        look: computes the pixels ``(n, S, S, 3)`` of the images with given indices ``(n,)``.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], look: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self.shape, self._look = shape, look

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        indices = np.arange(len(self))[key]
        return self._look(indices) if indices.ndim else self._look(indices[None])[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


class InPlace:
    """``(N, S, S, 3)`` uint8 decoded at every access; indexing gives a NumPy array.

    An image that has changed since the set was made raises a `UserError`: results from it could not
    be compared with earlier ones.

    Attributes:
        places: where the images are.
        hashes: N hashes of the decoded pixels, from `pixel_hash`.
        shape: ``(N, S, S, 3)``.
        depth: recorded bits per value of images with more than eight; None: what each file says.
    """

    def __init__(
        self, places: Sequence[Place], hashes: Sequence[str], size: int, depth: int | None = None
    ) -> None:
        self.places, self.hashes = tuple(places), tuple(hashes)
        self.shape, self.depth = (len(self.places), size, size, 3), depth

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        indices = np.arange(len(self))[key]
        pixels = np.empty((indices.size, *self.shape[1:]), np.uint8)

        def fill(row: int) -> None:
            pixels[row] = self._decode(int(indices.flat[row]))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about odd metadata
            if indices.size == 1:
                fill(0)
            else:
                with ThreadPoolExecutor(THREADS) as pool:
                    list(pool.map(fill, range(indices.size)))
        return pixels if indices.ndim else pixels[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def take(self, indices: Sequence[int] | np.ndarray) -> "InPlace":
        """Choose some images, in the given order, without decoding them."""
        places = [self.places[index] for index in indices]
        hashes = [self.hashes[index] for index in indices]
        return InPlace(places, hashes, self.shape[1], self.depth)

    def _decode(self, index: int) -> np.ndarray:
        place = self.places[index]
        try:
            pixels = to_square(place.open(), self.shape[1], self.depth)
        except Exception as error:  # damaged files raise many kinds of errors
            reason = why_unreadable(error)
            raise UserError(
                f"{place}: expected the image that was there when the sets were prepared, "
                f"found none that can be read ({reason}); "
                "bring it back, or run dvc repro -f prepare"
            ) from error
        if pixel_hash(pixels) != self.hashes[index]:
            raise UserError(
                f"{place}: expected the image that was there when the sets were prepared, "
                "found another; bring it back, or run dvc repro -f prepare"
            )
        return pixels


def pixel_hash(pixels: np.ndarray) -> str:
    """Hash one image's pixels (BLAKE2b, 16 bytes, hexadecimal)."""
    return hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=16).hexdigest()


def as_images(pixels: "torch.Tensor") -> "torch.Tensor":
    """Turn pixels ``(…, H, W, 3)`` uint8 into images ``(…, 3, H, W)`` in [0, 1].

    The memory layout stays: colours innermost, with which convolutions are a quarter faster.
    """
    return pixels.movedim(-1, -3).float() / 255
