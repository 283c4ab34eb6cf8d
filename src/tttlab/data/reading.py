"""From a source to an image set: decoded once and packed, or read where the images lie."""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from tttlab.config.images import ImageSpec
from tttlab.data.decoding import to_square, why_unreadable
from tttlab.data.depths import UnknownScale
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import InPlace, Place, pixel_hash
from tttlab.data.sources import Source
from tttlab.data.splits import balanced_subset, take_part
from tttlab.errors import UserError

PACK_BELOW = 1024  # MiB


def gather(
    source: Source, spec: ImageSpec, which: str, image_size: int, seed: int, **settings: Any
) -> ImageSet:
    """Collect one image set from its source.

    Args:
        source: what `tttlab.data.sources.open_source` found for the spec.
        spec: source, part and limit.
        which: ``unlabeled``, ``labeled`` or ``test``; the first keeps no labels.
        image_size: side of the squares, in pixels.
        seed: the seed of the experiment.
        settings: further arguments of `read_images`.

    Raises:
        UserError: there are no images, or a file is unreadable and must not be.
    """
    chosen = take_part(source, spec.part, seed, f"{spec.source}/{spec.split}")
    groups = (
        source.groups[chosen]
        if source.labeled and which != "unlabeled"
        else np.zeros(len(chosen), dtype=np.int64)
    )
    names = [source.image_ids[index] for index in chosen]
    chosen = chosen[balanced_subset(names, groups, spec.limit, seed, "limit")]
    if not len(chosen):
        raise UserError(
            f"data.{which}.part: {list(spec.part)} of {len(source.image_ids)} images is none; widen it"
        )
    origin = " ".join(
        str(part) for part in (spec.source, spec.root, spec.split) if part is not None
    )
    images = read_images(source, chosen, f"data.{which}", image_size, origin, **settings)
    return (
        images
        if which != "unlabeled"
        else replace(images, labels=np.full(len(images), -1, np.int64), classes=())
    )


def read_images(
    source: Source,
    chosen: np.ndarray,
    key: str,
    image_size: int,
    origin: str,
    *,
    unreadable: str = "error",
    pack_below: int = PACK_BELOW,
    depth: int | None = None,
    workers: int = 1,
) -> ImageSet:
    """Decode some images of a source, and keep their pixels or, of many image files, only where they are.

    Args:
        source: the images.
        chosen: indices of those to take.
        key: of the set in params.yaml, for messages.
        image_size: side of the squares, in pixels.
        origin: what the result says of its source.
        unreadable: ``error`` or ``skip``.
        pack_below: MiB of decoded pixels from which on image files are read in place, without a copy.
        depth: bits that were recorded of a pixel, of images with more than eight; None: what each file says.
        workers: threads that decode; changes no pixel.

    Raises:
        UserError: a file is unreadable and must not be, or all are, or nothing says which of its values is white.
    """
    mebibytes = len(chosen) * image_size * image_size * 3 / 2**20
    in_place = (
        mebibytes >= pack_below and len(chosen) and isinstance(source.read(int(chosen[0])), Place)
    )
    decoded = _decode(source, chosen, image_size, depth, workers, key, keep=not in_place)
    good = np.array([reason is None for reason in decoded.reasons], dtype=bool)
    skipped = tuple(
        f"{source.paths[index] or source.image_ids[index]}: {reason}"
        for index, reason in zip(chosen, decoded.reasons, strict=True)
        if reason is not None
    )
    _check_readable(skipped, len(chosen), key, unreadable)
    skipped += tuple(
        f"{name}: its name does not end like an image's that can be read" for name in source.ignored
    )
    chosen = chosen[good]
    if in_place:
        pixels = InPlace(
            [source.read(int(index)) for index in chosen],
            [h for h in decoded.hashes if h],
            image_size,
            depth,
        )
    else:
        pixels = decoded.pixels if good.all() else decoded.pixels[good]
    return ImageSet(
        pixels=pixels,
        labels=source.groups[chosen]
        if source.labeled
        else np.full(len(chosen), -1, dtype=np.int64),
        image_ids=tuple(source.image_ids[index] for index in chosen),
        classes=source.classes if source.labeled else (),
        paths=tuple(source.paths[index] for index in chosen),
        source=origin,
        skipped=skipped,
    )


class _Decoded(NamedTuple):
    """``pixels (N, S, S, 3)``, or none and N hashes of them; and N reasons why an image could not be read."""

    pixels: np.ndarray
    hashes: list[str]
    reasons: list[str | None]


def _decode(
    source: Source,
    chosen: np.ndarray,
    size: int,
    depth: int | None,
    workers: int,
    key: str,
    keep: bool,
) -> _Decoded:
    """Decode in threads (Pillow works outside the interpreter's lock)."""
    pixels = np.zeros((len(chosen) if keep else 0, size, size, 3), dtype=np.uint8)
    hashes = [""] * len(chosen)

    def decode(place: int) -> str | None:
        try:
            found = source.read(int(chosen[place]))
            square = to_square(found.open() if isinstance(found, Place) else found, size, depth)
        except UnknownScale as error:  # readable, so never skipped
            index = int(chosen[place])
            raise UserError(
                f"{key}: {source.paths[index] or source.image_ids[index]}: {error}"
            ) from error
        except Exception as error:  # damaged files fail in every way there is
            return why_unreadable(error)
        if keep:
            pixels[place] = square
        else:
            hashes[place] = pixel_hash(square)
        return None

    with warnings.catch_warnings(), ThreadPoolExecutor(max(workers, 1)) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
        places = tqdm(
            pool.map(decode, range(len(chosen))),
            f"decode {key}",
            len(chosen),
            disable=None,
            unit="image",
        )
        return _Decoded(pixels, hashes, list(places))


def _check_readable(skipped: Sequence[str], count: int, key: str, unreadable: str) -> None:
    if not skipped:
        return
    found = f"{len(skipped)} of {count} files cannot be read as images, the first is {skipped[0]}"
    if unreadable == "error":
        raise UserError(f"{key}: {found}; repair or remove them, or set data.unreadable: skip")
    if len(skipped) == count:
        raise UserError(f"{key}: {found}; expected at least one that can")
