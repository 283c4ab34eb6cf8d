"""Image sets: what is in them, which part of a source they take, how they lie on disk.

Every choice is drawn from (seed, source, image id), never from an order of work, and parts of one source that do not
overlap hold different images whatever set asks for them.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tttlab.data.pixels import InPlace, Lazy, Place, pixel_hash
from tttlab.errors import UserError, choices


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
        return [
            path or image_id
            for path, image_id in zip(self.paths or self.image_ids, self.image_ids, strict=True)
        ]

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """N hashes of the pixels, from `pixel_hash`."""
        return tuple(map(pixel_hash, self.pixels)) if self.packed else self.pixels.hashes

    @cached_property
    def firsts(self) -> np.ndarray:
        """``(N,)`` int64: the index of the first image with the same pixels, as a rule the image itself."""
        places: dict[str, int] = {}
        return np.array(
            [places.setdefault(pixels, index) for index, pixels in enumerate(self.hashes)],
            dtype=np.int64,
        )

    @property
    def packed(self) -> bool:
        """Whether the pixels are kept, not decoded anew at every look."""
        return not isinstance(self.pixels, InPlace)

    def take(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """Choose some images, in the given order; pixels that are read in place stay where they are, others are copied."""
        indices = np.asarray(indices, dtype=np.int64)
        return self._choose(
            indices,
            np.ascontiguousarray(self.pixels[indices])
            if self.packed
            else self.pixels.take(indices),
        )

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
        columns = {
            "image_id": pa.array(self.image_ids, pa.string()),
            "label": pa.array(self.labels),
            "path": pa.array(paths, pa.string()),
        }
        meta = {"classes": self.classes, "source": self.source, "skipped": self.skipped}
        if not self.packed:
            columns |= {
                "file": [p.path for p in self.pixels.places],
                "member": [p.member for p in self.pixels.places],
                "offset": [p.offset for p in self.pixels.places],
                "length": [p.length for p in self.pixels.places],
                "hash": self.pixels.hashes,
            }
            meta |= {"read_in_place": self.pixels.shape[1], "depth": self.pixels.depth}
        else:
            np.save(folder / "pixels.npy", self.pixels)
        pq.write_table(pa.table(columns), folder / "index.parquet")
        (folder / "meta.json").write_text(
            json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path) -> "ImageSet":
        """Open what `save` wrote; the pixels stay where they are until they are used."""
        if not (folder / "meta.json").exists():
            raise UserError(
                f"{folder}: expected an image set, found none; run the stage prepare first"
            )
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


def check_classes(found: Sequence[str], classes: Sequence[str], key: str) -> None:
    """Refuse a class that is not among those of the labeled images.

    Args:
        found: class names of the set to check; some may be missing.
        classes: class names of the labeled images.
        key: of the set in params.yaml, for messages.
    """
    for name in found:
        if name not in classes:
            raise UserError(
                f"{key}: class {name!r} is not in data.labeled; {choices(name, classes)}; set labels: none if the "
                "folders are no classes"
            )


def align_classes(images: ImageSet, classes: Sequence[str]) -> ImageSet:
    """Renumber the labels so that they count along ``classes``, matching by name; what has no labels stays without."""
    places = np.array(
        [*map(classes.index, images.classes), -1], dtype=np.int64
    )  # a label of -1 reads the last
    return replace(images, labels=places[images.labels], classes=tuple(classes))


def class_counts(images: ImageSet) -> dict[str, int]:
    """Count the images of every class by name."""
    counts = Counter(images.labels.tolist())
    return {name: counts[index] for index, name in enumerate(images.classes)}
