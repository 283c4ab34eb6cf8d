"""Image sets: what is in them, which part of a source they take, how they lie on disk.

Every choice is drawn from (seed, source, image id), never from an order of work, and parts of one source that do not
overlap hold different images whatever set asks for them.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from tttlab.decoding import to_square
from tttlab.errors import UserError, choices
from tttlab.params import ImageSpec
from tttlab.seeding import numpy_generator, stream_seed
from tttlab.sources import Source, open_source


@dataclass(frozen=True)
class ImageSet:
    """Images of one size with what is known about them.

    Attributes:
        pixels: ``(N, S, S, 3)`` uint8.
        labels: ``(N,)`` int64 indices into ``classes``; -1 where unknown.
        image_ids: N names, unique within the set.
        classes: class names; empty when no label is known.
        paths: N places to look at, possibly empty strings.
        source: where the images come from.
        skipped: unreadable files that were left out, each with its reason.
    """

    pixels: np.ndarray
    labels: np.ndarray
    image_ids: tuple[str, ...]
    classes: tuple[str, ...]
    paths: tuple[str, ...] = ()
    source: str = ""
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """Copy out some images, in the given order."""
        indices = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            pixels=np.ascontiguousarray(self.pixels[indices]),
            labels=self.labels[indices],
            image_ids=tuple(self.image_ids[index] for index in indices),
            paths=tuple(self.paths[index] for index in indices) if self.paths else (),
        )

    def save(self, folder: Path) -> None:
        """Write ``pixels.npy``, ``index.parquet`` and ``meta.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "pixels.npy", self.pixels)
        paths = self.paths or ("",) * len(self)
        columns = [pa.array(self.image_ids, pa.string()), pa.array(self.labels), pa.array(paths, pa.string())]
        pq.write_table(pa.table(columns, ["image_id", "label", "path"]), folder / "index.parquet")
        meta = {"classes": self.classes, "source": self.source, "skipped": self.skipped}
        (folder / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "ImageSet":
        """Open what `save` wrote; the pixels stay on disk until they are used."""
        if not (folder / "meta.json").exists():
            raise UserError(f"{folder}: expected an image set, found none; run the stage prepare first")
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        index = pq.read_table(folder / "index.parquet").to_pydict()
        return cls(
            pixels=np.load(folder / "pixels.npy", mmap_mode="r"),
            labels=np.asarray(index["label"], dtype=np.int64),
            image_ids=tuple(index["image_id"]),
            classes=tuple(meta["classes"]),
            paths=tuple(index["path"]),
            source=meta["source"],
            skipped=tuple(meta["skipped"]),
        )

    def digest(self) -> str:
        """Hash the pixels (SHA-256, hexadecimal)."""
        return hashlib.sha256(np.ascontiguousarray(self.pixels)).hexdigest()


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
    """Split labeled images into training and validation, class by class.

    Args:
        images: the labeled images.
        fraction: share of every class that goes to validation, at least one image and never all.
        seed: the seed of the experiment.

    Raises:
        UserError: there are fewer than two classes, or a class has fewer than two images.
    """
    sizes = np.bincount(images.labels, minlength=len(images.classes))
    if len(images.classes) < 2:
        raise UserError(f"data.labeled: expected at least two classes, found {', '.join(images.classes) or 'none'}")
    if sizes.min() < 2:
        name = images.classes[int(sizes.argmin())]
        raise UserError(
            f"data.labeled: expected at least two images of every class (one for training, one for validation), found "
            f"{sizes.min()} of class {name!r}; widen data.labeled.part, raise data.labeled.limit, or add images"
        )
    ranks = _ranks(images.image_ids, images.labels, seed, "validation")
    counts = np.clip(np.round(sizes * fraction), 1, sizes - 1)
    held = ranks < counts[images.labels]
    return images.take(np.flatnonzero(~held)), images.take(np.flatnonzero(held))


# --- gathering ---------------------------------------------------------------------------------------------------


def gather(
    spec: ImageSpec,
    which: str,
    image_size: int,
    seed: int,
    *,
    downloads: Path,
    unreadable: str = "error",
    workers: int = 1,
) -> ImageSet:
    """Collect one image set from its source.

    Args:
        spec: source, part and limit.
        which: ``unlabeled``, ``labeled`` or ``test``; the first keeps no labels.
        image_size: side of the squares, in pixels.
        seed: the seed of the experiment.
        downloads: where named data sets are kept when ``root`` is null.
        unreadable: ``error`` or ``skip``.
        workers: threads that decode; changes no pixel.

    Raises:
        UserError: there are no images, a class is empty, or a file is unreadable and must not be.
    """
    source = open_source(spec, which, downloads)
    labeled = which != "unlabeled"
    chosen = take_part(source, spec.part, seed, f"{spec.source}/{spec.split}")
    groups = source.groups[chosen] if labeled else np.zeros(len(chosen), dtype=np.int64)
    names = [source.image_ids[index] for index in chosen]
    chosen = chosen[balanced_subset(names, groups, spec.limit, seed, "limit")]
    if not len(chosen):
        raise UserError(f"data.{which}.part: {list(spec.part)} of {len(source.image_ids)} images is none; widen it")
    pixels, reasons = _decode(source, chosen, image_size, workers, which)
    good = np.array([reason is None for reason in reasons])
    skipped = tuple(
        f"{source.paths[index] or source.image_ids[index]}: {reason}"
        for index, reason in zip(chosen, reasons, strict=True)
        if reason is not None
    )
    _check_readable(skipped, len(chosen), which, unreadable)
    chosen, pixels = chosen[good], pixels if good.all() else pixels[good]
    return ImageSet(
        pixels=pixels,
        labels=source.groups[chosen] if labeled else np.full(len(chosen), -1, dtype=np.int64),
        image_ids=tuple(source.image_ids[index] for index in chosen),
        classes=source.classes if labeled else (),
        paths=tuple(source.paths[index] for index in chosen),
        source=" ".join(str(part) for part in (spec.source, spec.root, spec.split) if part is not None),
        skipped=skipped,
    )


def _decode(source: Source, chosen: np.ndarray, size: int, workers: int, which: str) -> tuple[np.ndarray, list[str | None]]:
    """Decode in threads (Pillow works outside the interpreter's lock): pixels, and why a file could not be read."""
    pixels = np.zeros((len(chosen), size, size, 3), dtype=np.uint8)

    def decode(place: int) -> str | None:
        try:
            pixels[place] = to_square(source.read(int(chosen[place])), size)
        except Exception as error:  # damaged files fail in every way there is
            return (str(error).splitlines() or [type(error).__name__])[0]
        return None

    with warnings.catch_warnings(), ThreadPoolExecutor(max(workers, 1)) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
        places = tqdm(pool.map(decode, range(len(chosen))), f"decode {which}", len(chosen), disable=None, unit="image")
        return pixels, list(places)


def _check_readable(skipped: Sequence[str], count: int, which: str, unreadable: str) -> None:
    if not skipped:
        return
    found = f"{len(skipped)} of {count} files cannot be read as images, the first is {skipped[0]}"
    if unreadable == "error":
        raise UserError(f"data.{which}: {found}; repair or remove them, or set data.unreadable: skip")
    if len(skipped) == count:
        raise UserError(f"data.{which}: {found}; expected at least one that can")


def align_classes(images: ImageSet, classes: Sequence[str], which: str) -> ImageSet:
    """Renumber the labels so that they count along ``classes``, matching by name; classes may be missing from the set.

    Raises:
        UserError: the set has a class that is not among ``classes``.
    """
    for name in images.classes:
        if name not in classes:
            raise UserError(f"data.{which}: class {name!r} is not in data.labeled; {choices(name, classes)}")
    places = np.array([classes.index(name) for name in images.classes], dtype=np.int64)
    return replace(images, labels=places[images.labels], classes=tuple(classes))


def check_duplicates(sets: Mapping[str, ImageSet]) -> None:
    """Refuse the same pixels in two sets: what was trained on must not be tested on.

    Raises:
        UserError: two images of different sets are identical.
    """
    owners: dict[bytes, tuple[str, str]] = {}
    pairs: list[tuple[str, str, str, str]] = []
    for which, images in sets.items():
        names = [path or name for path, name in zip(images.paths, images.image_ids, strict=True)]
        for name, pixels in zip(names, images.pixels, strict=True):
            key = hashlib.blake2b(pixels, digest_size=16).digest()
            owner, other = owners.setdefault(key, (which, name))
            if owner != which:
                pairs.append((owner, other, which, name))
    if pairs:
        owner, other, which, name = pairs[0]
        raise UserError(
            f"data.{which}: {name} has the same pixels as {other} of data.{owner} ({len(pairs)} such images in all); "
            "remove one of each or set data.duplicates: allow"
        )


def class_counts(images: ImageSet) -> dict[str, int]:
    """Count the images of every class by name."""
    counts = Counter(images.labels.tolist())
    return {name: counts[index] for index, name in enumerate(images.classes)}
