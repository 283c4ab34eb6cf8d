"""Image sets: images with their labels and names, in memory and on disk."""

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
    """Images of one size, with labels and names.

    Attributes:
        pixels: ``(N, S, S, 3)`` uint8, in memory, on disk, or decoded at every access.
        labels: ``(N,)`` int64 indices into ``classes``; -1 where unknown.
        image_ids: N names, unique within the set.
        classes: class names; empty when no label is known.
        paths: N paths for people, possibly empty strings.
        source: where the images come from.
        skipped: a line for each image or file that was left out, with the reason.
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
        pairs = zip(self.paths or self.image_ids, self.image_ids, strict=True)
        return [path or image_id for path, image_id in pairs]

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """N hashes of the pixels, from `pixel_hash`."""
        return tuple(map(pixel_hash, self.pixels)) if self.packed else self.pixels.hashes

    @cached_property
    def firsts(self) -> np.ndarray:
        """``(N,)`` int64: index of the first image with the same pixels, often the image itself."""
        first_by_hash: dict[str, int] = {}
        firsts = [
            first_by_hash.setdefault(pixels, index) for index, pixels in enumerate(self.hashes)
        ]
        return np.array(firsts, dtype=np.int64)

    @property
    def packed(self) -> bool:
        """Whether the pixels are kept, not decoded anew at every access."""
        return not isinstance(self.pixels, InPlace)

    def take(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """Choose images, in the given order; kept pixels are copied, others are not decoded."""
        indices = np.asarray(indices, dtype=np.int64)
        if self.packed:
            return self._choose(indices, np.ascontiguousarray(self.pixels[indices]))
        return self._choose(indices, self.pixels.take(indices))

    def view(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """Choose some images, in the given order, without copying any pixels."""
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
        """Write ``index.parquet``, ``meta.json`` and, if the pixels are kept, ``pixels.npy``."""
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
                "file": [place.path for place in self.pixels.places],
                "member": [place.member for place in self.pixels.places],
                "offset": [place.offset for place in self.pixels.places],
                "length": [place.length for place in self.pixels.places],
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
        """Open what `save` wrote; pixels are read when they are used."""
        if not (folder / "meta.json").exists():
            raise UserError(
                f"{folder}: expected an image set, found none; run the stage prepare first"
            )
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        # `read_table` would import pyarrow.dataset, for 0.2 s.
        index = pq.ParquetFile(folder / "index.parquet").read().to_pydict()
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
        """Hash the pixels, or, if they are read in place, their hashes (SHA-256, hexadecimal)."""
        if not self.packed:
            return hashlib.sha256("".join(self.pixels.hashes).encode()).hexdigest()
        digest = hashlib.sha256()
        for pixels in self.pixels:
            digest.update(np.ascontiguousarray(pixels))
        return digest.hexdigest()


def check_classes(names: Sequence[str], classes: Sequence[str], key: str) -> None:
    """Refuse a class that the labeled images do not have.

    Args:
        names: class names of the set to check; some may be missing.
        classes: class names of the labeled images.
        key: the set's key in params.yaml, for messages.

    Raises:
        UserError: there is such a class.
    """
    for name in names:
        if name not in classes:
            raise UserError(
                f"{key}: class {name!r} is not in data.labeled; {choices(name, classes)}; "
                "set labels: none if the folders are no classes"
            )


def align_classes(images: ImageSet, classes: Sequence[str]) -> ImageSet:
    """Renumber the labels by the order of ``classes``, matching names; −1 (unknown) stays −1."""
    # The last entry is for images without a label: index −1 reads it.
    numbers = np.array([*map(classes.index, images.classes), -1], dtype=np.int64)
    return replace(images, labels=numbers[images.labels], classes=tuple(classes))


def class_counts(images: ImageSet) -> dict[str, int]:
    """Count the images of every class by name."""
    counts = Counter(images.labels.tolist())
    return {name: counts[index] for index, name in enumerate(images.classes)}
