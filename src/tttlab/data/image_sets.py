"""Image sets: what is in them, which part of a source they take, how they lie on disk.

Every choice is drawn from (seed, source, image id), never from an order of work, and parts of one source that do not
overlap hold different images whatever set asks for them.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from tttlab.config.images import ImageSpec
from tttlab.data.decoding import to_square, why_unreadable
from tttlab.data.depths import UnknownScale
from tttlab.data.pixels import InPlace, Lazy, Place, pixel_hash
from tttlab.data.sources import Source
from tttlab.errors import UserError, choices
from tttlab.seeding import numpy_generator, stream_seed

PACK_BELOW = 1024  # MiB


@dataclass(frozen=True)
class ImageSet:
    """Images of one size with what is known about them.

    Attributes:
        pixels: ``(N, S, S, 3)`` uint8, in memory, on disk, or decoded at every look.
        labels: ``(N,)`` int64 indices into ``classes``; -1 where unknown.
        image_ids: N names, unique within the set.
        classes: class names; empty when no label is known.
        paths: N places to look at, possibly empty strings.
        source: where the images come from.
        skipped: images and files that were left out, each with its reason.
    """

    pixels: np.ndarray | InPlace | Lazy
    labels: np.ndarray
    image_ids: tuple[str, ...]
    classes: tuple[str, ...]
    paths: tuple[str, ...] = ()
    source: str = ""
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> list[str]:
        """What a person can find each image by: its path, else its id."""
        return [path or image_id for path, image_id in zip(self.paths or self.image_ids, self.image_ids, strict=True)]

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """N hashes of the pixels, from `pixel_hash`."""
        return tuple(map(pixel_hash, self.pixels)) if self.packed else self.pixels.hashes

    @cached_property
    def firsts(self) -> np.ndarray:
        """``(N,)`` int64: the index of the first image with the same pixels, as a rule the image itself."""
        places: dict[str, int] = {}
        return np.array([places.setdefault(pixels, index) for index, pixels in enumerate(self.hashes)], dtype=np.int64)

    @property
    def packed(self) -> bool:
        """Whether the pixels are kept, not decoded anew at every look."""
        return not isinstance(self.pixels, InPlace)

    def take(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """Choose some images, in the given order; pixels that are read in place stay where they are, others are copied."""
        indices = np.asarray(indices, dtype=np.int64)
        return self._choose(indices, np.ascontiguousarray(self.pixels[indices]) if self.packed else self.pixels.take(indices))

    def view(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """Choose some images, in the given order, without a copy: whatever their pixels are, they stay where they are."""
        indices = np.asarray(indices, dtype=np.int64)
        if not self.packed:
            return self.take(indices)
        shape = (len(indices), *self.pixels.shape[1:])
        return self._choose(indices, Lazy(shape, lambda numbers: self.pixels[indices[numbers]]))

    def _choose(self, indices: np.ndarray, pixels: np.ndarray | InPlace | Lazy) -> "ImageSet":
        return replace(
            self,
            pixels=pixels,
            labels=self.labels[indices],
            image_ids=tuple(self.image_ids[index] for index in indices),
            paths=tuple(self.paths[index] for index in indices) if self.paths else (),
        )

    def save(self, folder: Path) -> None:
        """Write ``index.parquet``, ``meta.json`` and, unless the pixels are read in place, ``pixels.npy``."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = self.paths or ("",) * len(self)
        columns = {"image_id": pa.array(self.image_ids, pa.string()), "label": pa.array(self.labels),
                   "path": pa.array(paths, pa.string())}  # fmt: skip
        meta = {"classes": self.classes, "source": self.source, "skipped": self.skipped}
        if not self.packed:
            columns |= {"file": [p.path for p in self.pixels.places], "member": [p.member for p in self.pixels.places],
                        "offset": [p.offset for p in self.pixels.places], "length": [p.length for p in self.pixels.places],
                        "hash": self.pixels.hashes}  # fmt: skip
            meta |= {"read_in_place": self.pixels.shape[1], "depth": self.pixels.depth}
        else:
            np.save(folder / "pixels.npy", self.pixels)
        pq.write_table(pa.table(columns), folder / "index.parquet")
        (folder / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "ImageSet":
        """Open what `save` wrote; the pixels stay where they are until they are used."""
        if not (folder / "meta.json").exists():
            raise UserError(f"{folder}: expected an image set, found none; run the stage prepare first")
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        index = pq.read_table(folder / "index.parquet").to_pydict()
        if size := meta.get("read_in_place"):
            places = map(Place, index["file"], index["member"], index["offset"], index["length"])
            pixels = InPlace(list(places), index["hash"], size, meta.get("depth"))
        else:
            pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        return cls(
            pixels=pixels,
            labels=np.asarray(index["label"], dtype=np.int64),
            image_ids=tuple(index["image_id"]),
            classes=tuple(meta["classes"]),
            paths=tuple(index["path"]),
            source=meta["source"],
            skipped=tuple(meta["skipped"]),
        )

    def digest(self) -> str:
        """Hash the pixels (SHA-256, hexadecimal), or, if they are read in place, their hashes."""
        if not self.packed:
            return hashlib.sha256("".join(self.pixels.hashes).encode()).hexdigest()
        found = hashlib.sha256()
        for pixels in self.pixels:
            found.update(np.ascontiguousarray(pixels))
        return found.hexdigest()


# --- choosing ----------------------------------------------------------------------------------------------------


def _ranks(names: Sequence[str], groups: np.ndarray, seed: int, *key: str) -> np.ndarray:
    """Give every image its place 0, 1, … within its group, in an order drawn from its name alone."""
    drawn = np.array([stream_seed(seed, *key, name) for name in names])
    order = np.lexsort((drawn, groups))
    starts = np.searchsorted(groups[order], groups[order])
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - starts
    return ranks


def take_part(source: Source, part: tuple[float, float], seed: int, name: str) -> np.ndarray:
    """Choose the images of a part: the same share of every class, to within one image.

    Args:
        source: the images.
        part: from and to, fractions of the source; parts that do not overlap share no image, and [0, 1] holds all.
        seed: the seed of the experiment.
        name: the source's name; the choice depends on it, not on which set is being filled.

    Returns:
        sorted indices.
    """
    ranks = _ranks(source.image_ids, source.groups, seed, "part", name)
    sizes = np.bincount(source.groups, minlength=len(source.classes))
    # A random offset per class: else many classes of one image would all fall into the same part.
    offsets = np.array([numpy_generator(seed, "offset", name, each).random() for each in source.classes])
    places = (ranks + offsets[source.groups]) / sizes[source.groups]
    return np.flatnonzero((part[0] <= places) & (places < part[1]))


def balanced_subset(names: Sequence[str], groups: np.ndarray, count: int | None, seed: int, *key: str) -> np.ndarray:
    """Choose ``count`` images (None: all), of every group the same number where it has that many, to within one.

    A smaller subset is contained in a larger one.

    Returns:
        sorted indices.
    """
    if count is None or count >= len(names):
        return np.arange(len(names))
    ranks = _ranks(names, groups, seed, *key)
    drawn = np.array([stream_seed(seed, *key, "turn", name) for name in names])
    return np.sort(np.lexsort((drawn, ranks))[:count])


def split_validation(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split labeled images into training and validation, class by class; images with the same pixels stay together.

    Args:
        images: the labeled images; those with the same pixels have the same label.
        fraction: share of every class that goes to validation, at least one image and never all.
        seed: the seed of the experiment.

    Raises:
        UserError: there are fewer than two classes, or a class has fewer than two different images.
    """
    unique, copied = np.unique(images.firsts, return_inverse=True)
    labels = images.labels[unique]
    sizes = np.bincount(labels, minlength=len(images.classes))
    if len(images.classes) < 2:
        raise UserError(f"data.labeled: expected at least two classes, found {', '.join(images.classes) or 'none'}")
    if sizes.min() < 2:
        name = images.classes[int(sizes.argmin())]
        raise UserError(
            f"data.labeled: expected at least two different images of every class (for training and for validation), found "
            f"{sizes.min()} of class {name!r}; widen data.labeled.part, raise data.labeled.limit, or add images"
        )
    ranks = _ranks([images.image_ids[index] for index in unique], labels, seed, "validation")
    counts = np.clip(np.round(sizes * fraction), 1, sizes - 1)
    held = (ranks < counts[labels])[copied]
    return images.take(np.flatnonzero(~held)), images.take(np.flatnonzero(held))


# --- gathering ---------------------------------------------------------------------------------------------------


def gather(source: Source, spec: ImageSpec, which: str, image_size: int, seed: int, **settings: Any) -> ImageSet:
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
    groups = source.groups[chosen] if source.labeled and which != "unlabeled" else np.zeros(len(chosen), dtype=np.int64)
    names = [source.image_ids[index] for index in chosen]
    chosen = chosen[balanced_subset(names, groups, spec.limit, seed, "limit")]
    if not len(chosen):
        raise UserError(f"data.{which}.part: {list(spec.part)} of {len(source.image_ids)} images is none; widen it")
    origin = " ".join(str(part) for part in (spec.source, spec.root, spec.split) if part is not None)
    images = read_images(source, chosen, f"data.{which}", image_size, origin, **settings)
    return images if which != "unlabeled" else replace(images, labels=np.full(len(images), -1, np.int64), classes=())


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
    in_place = mebibytes >= pack_below and len(chosen) and isinstance(source.read(int(chosen[0])), Place)
    decoded = _decode(source, chosen, image_size, depth, workers, key, keep=not in_place)
    good = np.array([reason is None for reason in decoded.reasons], dtype=bool)
    skipped = tuple(
        f"{source.paths[index] or source.image_ids[index]}: {reason}"
        for index, reason in zip(chosen, decoded.reasons, strict=True)
        if reason is not None
    )
    _check_readable(skipped, len(chosen), key, unreadable)
    skipped += tuple(f"{name}: its name does not end like an image's that can be read" for name in source.ignored)
    chosen = chosen[good]
    if in_place:
        pixels = InPlace([source.read(int(index)) for index in chosen], [h for h in decoded.hashes if h], image_size, depth)
    else:
        pixels = decoded.pixels if good.all() else decoded.pixels[good]
    return ImageSet(
        pixels=pixels,
        labels=source.groups[chosen] if source.labeled else np.full(len(chosen), -1, dtype=np.int64),
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


def _decode(source: Source, chosen: np.ndarray, size: int, depth: int | None, workers: int, key: str, keep: bool) -> _Decoded:
    """Decode in threads (Pillow works outside the interpreter's lock)."""
    pixels = np.zeros((len(chosen) if keep else 0, size, size, 3), dtype=np.uint8)
    hashes = [""] * len(chosen)

    def decode(place: int) -> str | None:
        try:
            found = source.read(int(chosen[place]))
            square = to_square(found.open() if isinstance(found, Place) else found, size, depth)
        except UnknownScale as error:  # readable, so never skipped
            index = int(chosen[place])
            raise UserError(f"{key}: {source.paths[index] or source.image_ids[index]}: {error}") from error
        except Exception as error:  # damaged files fail in every way there is
            return why_unreadable(error)
        if keep:
            pixels[place] = square
        else:
            hashes[place] = pixel_hash(square)
        return None

    with warnings.catch_warnings(), ThreadPoolExecutor(max(workers, 1)) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
        places = tqdm(pool.map(decode, range(len(chosen))), f"decode {key}", len(chosen), disable=None, unit="image")
        return _Decoded(pixels, hashes, list(places))


def _check_readable(skipped: Sequence[str], count: int, key: str, unreadable: str) -> None:
    if not skipped:
        return
    found = f"{len(skipped)} of {count} files cannot be read as images, the first is {skipped[0]}"
    if unreadable == "error":
        raise UserError(f"{key}: {found}; repair or remove them, or set data.unreadable: skip")
    if len(skipped) == count:
        raise UserError(f"{key}: {found}; expected at least one that can")


def check_classes(found: Sequence[str], classes: Sequence[str], key: str) -> None:
    """Refuse a class that is not among those of the labeled images.

    Args:
        found: class names of the set to check; some may be missing.
        classes: class names of the labeled images.
        key: of the set in params.yaml, for messages.
    """
    for name in found:
        if name not in classes:
            raise UserError(f"{key}: class {name!r} is not in data.labeled; {choices(name, classes)}; set labels: none if the "
                            "folders are no classes")  # fmt: skip


def align_classes(images: ImageSet, classes: Sequence[str]) -> ImageSet:
    """Renumber the labels so that they count along ``classes``, matching by name; what has no labels stays without."""
    places = np.array([*map(classes.index, images.classes), -1], dtype=np.int64)  # a label of -1 reads the last
    return replace(images, labels=places[images.labels], classes=tuple(classes))


def class_counts(images: ImageSet) -> dict[str, int]:
    """Count the images of every class by name."""
    counts = Counter(images.labels.tolist())
    return {name: counts[index] for index, name in enumerate(images.classes)}
