"""From a source to an image set: decoded once and packed, or read in place."""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from tttlab.config.images import ImageSpec
from tttlab.data.decoding import to_square, why_unreadable
from tttlab.data.depths import UnknownScale
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import InPlace, Place, pixel_hash
from tttlab.data.sources import ImageSource
from tttlab.data.splits import balanced_subset, take_part
from tttlab.errors import UserError
from tttlab.runtime.progress import open_bar

PACK_BELOW = 1024  # MiB


def gather(
    source: ImageSource, spec: ImageSpec, which: str, image_size: int, seed: int, **settings: Any
) -> ImageSet:
    """Collect one image set from its source.

    Args:
        source: what `tttlab.data.sources.open_source` found for the spec.
        spec: source, part and limit.
        which: ``unlabeled``, ``labeled`` or ``test``; ``unlabeled`` keeps no labels.
        image_size: side of the squares, in pixels.
        seed: the seed of the experiment.
        settings: further arguments of `read_images`.

    Raises:
        UserError: there are no images, or a file is unreadable and must not be.
    """
    indices = choose(source, spec, which, seed)
    words = (spec.source, spec.root, spec.split)
    origin = " ".join(str(word) for word in words if word is not None)
    images = read_images(source, indices, f"data.{which}", image_size, origin, **settings)
    if which == "unlabeled":
        return replace(images, labels=np.full(len(images), -1, np.int64), classes=())
    return images


def choose(source: ImageSource, spec: ImageSpec, which: str, seed: int) -> np.ndarray:
    """Choose the images of a set: sorted numbers; the arguments are those of `gather`.

    Raises:
        UserError: there are none.
    """
    indices = take_part(source, spec.part, seed, f"{spec.source}/{spec.split}")
    with_labels = source.labeled and which != "unlabeled"
    groups = source.groups[indices] if with_labels else np.zeros(len(indices), dtype=np.int64)
    names = [source.image_ids[index] for index in indices]
    indices = indices[balanced_subset(names, groups, spec.limit, seed, "limit")]
    if not len(indices):
        raise UserError(
            f"data.{which}.part: {list(spec.part)} of {len(source.image_ids)} images is none; "
            "widen it"
        )
    return indices


def read_images(
    source: ImageSource,
    indices: np.ndarray,
    key: str,
    image_size: int,
    origin: str,
    *,
    unreadable: str = "error",
    pack_below: int = PACK_BELOW,
    depth: int | None = None,
    workers: int = 1,
) -> ImageSet:
    """Decode images of a source, and keep their pixels or, of large sets of files, their places.

    Args:
        source: the images.
        indices: numbers of the images to take.
        key: the set's key in params.yaml, for messages.
        image_size: side of the squares, in pixels.
        origin: the result's ``source``.
        unreadable: ``error`` or ``skip``.
        pack_below: MiB of decoded pixels from which on image files are read in place, not copied.
        depth: recorded bits per value of images with more than eight; None: what each file says.
        workers: threads that decode; changes no pixel.

    Raises:
        UserError: a file is unreadable and must not be, all files are unreadable, or nothing says
            which of a file's values is white.
    """
    mebibytes = len(indices) * image_size * image_size * 3 / 2**20
    large = mebibytes >= pack_below and len(indices)
    in_place = large and isinstance(source.read(int(indices[0])), Place)
    decoded = _decode(source, indices, image_size, depth, workers, key, keep=not in_place)
    readable = np.array([reason is None for reason in decoded.reasons], dtype=bool)
    skipped = tuple(
        f"{source.paths[index] or source.image_ids[index]}: {reason}"
        for index, reason in zip(indices, decoded.reasons, strict=True)
        if reason is not None
    )
    _check_readable(skipped, len(indices), key, unreadable)
    skipped += tuple(
        f"{name}: its name does not end like an image's that can be read" for name in source.ignored
    )
    indices = indices[readable]
    unknown = np.full(len(indices), -1, dtype=np.int64)
    if in_place:
        places = [source.read(int(index)) for index in indices]
        hashes = [pixels_hash for pixels_hash in decoded.hashes if pixels_hash]
        pixels = InPlace(places, hashes, image_size, depth)
    else:
        pixels = decoded.pixels if readable.all() else decoded.pixels[readable]
    return ImageSet(
        pixels=pixels,
        labels=source.groups[indices] if source.labeled else unknown,
        image_ids=tuple(source.image_ids[index] for index in indices),
        classes=source.classes if source.labeled else (),
        paths=tuple(source.paths[index] for index in indices),
        source=origin,
        skipped=skipped,
    )


class _Decoded(NamedTuple):
    """What became of N images.

    Attributes:
        pixels: ``(N, S, S, 3)``; empty if they are not kept.
        hashes: hashes of the pixels that are not kept; ``""`` where there is none.
        reasons: why an image could not be read; None: it could.
    """

    pixels: np.ndarray
    hashes: list[str]
    reasons: list[str | None]


def _decode(
    source: ImageSource,
    indices: np.ndarray,
    size: int,
    depth: int | None,
    workers: int,
    key: str,
    keep: bool,
) -> _Decoded:
    """Decode in threads (Pillow works outside the interpreter's lock)."""
    count = len(indices)
    pixels = np.zeros((count if keep else 0, size, size, 3), dtype=np.uint8)
    hashes = [""] * count

    def decode(row: int) -> str | None:
        index = int(indices[row])
        try:
            picture = source.read(index)
            picture = picture.open() if isinstance(picture, Place) else picture
            square = to_square(picture, size, depth)
        except UnknownScale as error:  # readable, so never skipped
            name = source.paths[index] or source.image_ids[index]
            raise UserError(f"{key}: {name}: {error}") from error
        except Exception as error:  # damaged files raise many kinds of errors
            return why_unreadable(error)
        if keep:
            pixels[row] = square
        else:
            hashes[row] = pixel_hash(square)
        return None

    with warnings.catch_warnings(), ThreadPoolExecutor(max(workers, 1)) as pool:
        warnings.simplefilter("ignore")  # Pillow's warnings about odd metadata
        reasons = []
        with open_bar(f"decode {key}", count, "image") as bar:
            for reason in pool.map(decode, range(count)):
                reasons.append(reason)
                bar.update()
        return _Decoded(pixels, hashes, reasons)


def _check_readable(skipped: Sequence[str], count: int, key: str, unreadable: str) -> None:
    if not skipped:
        return
    fault = f"{len(skipped)} of {count} files cannot be read as images, the first is {skipped[0]}"
    if unreadable == "error":
        raise UserError(f"{key}: {fault}; repair or remove them, or set data.unreadable: skip")
    if len(skipped) == count:
        raise UserError(f"{key}: {fault}; expected at least one that can")
