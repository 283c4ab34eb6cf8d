"""Where images come from: scikit-learn's digits, a folder, tar files, or a named data set.

Named data sets are those of torchvision and Hugging Face.
"""

import gzip
import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tttlab.config.images import ImageSpec
from tttlab.config.names import is_utf8, nfc
from tttlab.data.archives import list_archives
from tttlab.data.folders import SUFFIXES, Listing, list_folder
from tttlab.data.pixels import Place
from tttlab.errors import UserError


@dataclass(frozen=True)
class ImageSource:
    """Images that can be read one by one, in a fixed order.

    Attributes:
        image_ids: N names, unique within the source and the same on every machine; usually in
            Unicode's form NFC, for file systems encode accents differently.
        paths: N paths for people, possibly empty strings.
        groups: N class indices.
        classes: class names in the form NFC, sorted; images without classes have the class ``""``.
        read: index → an image, or the place of an encoded one; called from several threads.
        labeled: whether the groups are labels; else they only say which images belong together.
        ignored: files without the suffix of a readable image, such as ``photo.heic``.
    """

    image_ids: tuple[str, ...]
    paths: tuple[str, ...]
    groups: np.ndarray
    classes: tuple[str, ...]
    read: Callable[[int], Image.Image | Place]
    labeled: bool = True
    ignored: tuple[str, ...] = ()


def open_source(spec: ImageSpec, which: str, downloads: Path) -> ImageSource:
    """Open the source of one image set.

    Args:
        spec: where the images are.
        which: the set's key under ``data``, for messages; ``unlabeled`` needs no classes.
        downloads: where named data sets are kept if ``root`` is null.

    Raises:
        UserError: there are no images, a class is empty, or the source cannot be opened.
    """
    kind = spec.source.partition("/")[0]
    if kind in ("sklearn", "torch", "hfds"):
        source = _digits() if kind == "sklearn" else _named(spec, which, downloads)
        wants_labels = getattr(spec, "labels", "auto") == "auto"
        return source if wants_labels else replace(source, labeled=False)
    root = spec.root / spec.split if spec.split else spec.root
    labels = {"unlabeled": "none", "labeled": "folders"}.get(which) or spec.labels
    apart = labels != "none"
    listing = list_folder(root, apart) if kind == "folder" else list_archives(root, which, apart)
    return by_class(listing, f"data.{which}.root", root, labels)


def by_class(listing: Listing, key: str, root: Path, labels: str) -> ImageSource:
    """Take the first-level folders for classes.

    Names that differ only in the encoding of an accent are the same class.

    Args:
        listing: the images.
        key: the root's key in params.yaml, for messages.
        root: the folder or file that was listed.
        labels: ``folders``: first-level folders are classes; ``none``: they only say which images
            belong together; ``auto``: they are classes, unless no image lies in any.

    Raises:
        UserError: there is no image, a name is not UTF-8, an image lies outside the class folders,
            or a class folder is empty.
    """
    if not listing.names:
        others = ""
        if listing.ignored:
            others = f"; what is there, such as {listing.ignored[0]}, is of another kind"
        raise UserError(
            f"{key}: expected images ({', '.join(SUFFIXES)}), found none in {root}{others}"
        )
    _check_encoding(listing, key)
    normal = [nfc(name) for name in listing.names]
    folders = [name.partition("/")[0] if "/" in name else "" for name in normal]
    labeled = labels == "folders" or (labels == "auto" and any(folders))
    if labeled:
        _check_classes(folders, listing, key, root)
    classes = tuple(sorted(set(folders)))
    numbers = {name: index for index, name in enumerate(classes)}
    groups = np.array([numbers[folder] for folder in folders], dtype=np.int64)
    times = Counter(normal)
    # Where two names have the same normal form, both images keep the names they have on disk.
    image_ids = tuple(
        on_disk if times[name] > 1 else name
        for on_disk, name in zip(listing.names, normal, strict=True)
    )
    paths = tuple(map(str, listing.places))
    return ImageSource(
        image_ids, paths, groups, classes, listing.places.__getitem__, labeled, listing.ignored
    )


def _check_encoding(listing: Listing, key: str) -> None:
    wrong = [str(place) for place in listing.places if not is_utf8(str(place))]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(f"{key}: expected file names in UTF-8, found {wrong[0]!r}{more}; rename it")


def _check_classes(folders: list[str], listing: Listing, key: str, root: Path) -> None:
    """Refuse images outside the class folders, and empty class folders.

    ``folders`` has every image's first-level folder, ``""`` where it lies in none.
    """
    if "" in folders:
        loose = listing.names[folders.index("")]
        raise UserError(
            f"{key}: expected <class>/<image> in {root}, found {loose} outside any class folder"
        )
    empty = sorted(set(map(nfc, listing.folders)) - set(folders))
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(
            f"{key}: the class {empty[0]!r} in {root} holds no image{more}; fill or remove it"
        )


def _digits() -> ImageSource:
    """Open the 1,797 handwritten digits (8×8, 17 grey levels) that come with scikit-learn."""
    pixels, labels = _digits_table()
    scaled = np.round(pixels * (255 / 16)).astype(np.uint8)
    names = tuple(f"digits/{index:05d}" for index in range(len(labels)))
    classes = tuple(str(digit) for digit in range(10))
    paths = ("",) * len(names)
    return ImageSource(names, paths, labels, classes, lambda index: Image.fromarray(scaled[index]))


def _digits_table() -> tuple[np.ndarray, np.ndarray]:
    """Read grey levels ``(1797, 8, 8)`` in 0–16 and labels.

    They are read from the file, if it is found: importing scikit-learn takes seconds.
    """
    spec = importlib.util.find_spec("sklearn")
    file = Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    if not file.exists():
        from sklearn.datasets import load_digits

        digits = load_digits()
        return digits.images, digits.target.astype(np.int64)
    with gzip.open(file, "rt") as text:
        table = np.loadtxt(text, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def _named(spec: ImageSpec, which: str, downloads: Path) -> ImageSource:
    """Open ``torch/<name>`` or ``hfds/<name>`` through timm, downloading it on first use."""
    from timm.data import create_dataset

    root = spec.root or downloads
    root.mkdir(parents=True, exist_ok=True)
    try:
        dataset = create_dataset(
            spec.source, root=str(root), split=spec.split, search_split=False, download=True
        )
        reader = getattr(dataset, "reader", None)
        labels, classes = _targets(dataset, reader)
    # Every library raises other errors without a network, or for an unknown split.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data.{which}.source: {spec.source} (split {spec.split}) is not in {root} "
            f"and cannot be fetched: {reason}"
        ) from error
    labeled = labels.min(initial=0) >= 0
    if not labeled:
        if which == "labeled":
            raise UserError(
                f"data.{which}.split: {spec.source} has no labels in its split {spec.split!r}; "
                "choose another"
            )
        labels, classes = np.zeros_like(labels), [""]
    name = spec.source.partition("/")[2]
    names = tuple(f"{name}/{spec.split}/{index:07d}" for index in range(len(labels)))
    # timm's ImageDataset puts another image in the place of an unreadable one; its reader does not.
    images = dataset if reader is None else reader
    order = sorted(range(len(classes)), key=classes.__getitem__)
    groups = np.argsort(order)[labels]
    sorted_classes = tuple(classes[index] for index in order)
    paths = ("",) * len(names)
    return ImageSource(
        names, paths, groups, sorted_classes, lambda index: images[index][0], labeled
    )


def _targets(dataset: Any, reader: Any) -> tuple[np.ndarray, list[str]]:
    """Find labels (N,) and class names of a data set, whatever its library calls them."""
    if reader is not None:
        labels = np.array(list(reader.iter_targets()), dtype=np.int64)
        names = {index: name for name, index in reader.class_to_idx.items()}
    else:
        targets = getattr(dataset, "targets", None)
        if targets is None:
            targets = [dataset[index][1] for index in range(len(dataset))]
        labels = np.asarray(targets)
        if labels.ndim == 2:  # QMNIST: the class is the first column
            labels = labels[:, 0]
        labels = labels.astype(np.int64)
        names = dict(enumerate(getattr(dataset, "classes", ())))
    count = max(labels.max(initial=-1) + 1, len(names))
    classes = [_class_name(names.get(index, index)) for index in range(count)]
    repeated = [name for name, times in Counter(classes).items() if times > 1]
    unique = [f"{name} {index}" if name in repeated else name for index, name in enumerate(classes)]
    return labels, unique


def _class_name(name: str | int | Sequence[str]) -> str:
    """Turn a number, a name or several synonyms into one name."""
    return nfc(str(name) if isinstance(name, str | int) else str(name[0]))
