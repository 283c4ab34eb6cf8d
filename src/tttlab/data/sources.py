"""Where images come from: an embedded set, a folder, a tar file, or a named data set of torchvision or Hugging Face."""

import gzip
import importlib.util
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from tttlab.config.images import ImageSpec
from tttlab.config.names import is_own, is_utf8, nfc
from tttlab.data.folders import SUFFIXES, Found, is_image, list_folder
from tttlab.data.pixels import Place
from tttlab.errors import UserError


@dataclass(frozen=True)
class Source:
    """Images that can be read one by one, in a fixed order.

    Attributes:
        image_ids: N names, unique within the source and the same on every machine, also where accents are encoded in
            another way (as a rule in Unicode's form NFC).
        paths: N places a person can look at.
        groups: N class indices.
        classes: class names in the form NFC, sorted; images without classes are of the one class ``""``.
        read: index → an image, or the place of an encoded one; called from several threads.
        labeled: whether the groups are labels; else they only say which images belong together.
        ignored: files whose names do not end as an image's that can be read, such as ``photo.heic``.
    """

    image_ids: tuple[str, ...]
    paths: tuple[str, ...]
    groups: np.ndarray
    classes: tuple[str, ...]
    read: Callable[[int], Image.Image | Place]
    labeled: bool = True
    ignored: tuple[str, ...] = ()


def open_source(spec: ImageSpec, which: str, downloads: Path) -> Source:
    """Open the source of one image set.

    Args:
        spec: where the images are.
        which: the set's key under ``data``, for messages; ``unlabeled`` needs no classes.
        downloads: where named data sets are kept when ``root`` is null.

    Raises:
        UserError: there are no images, a class is empty, or the source cannot be opened.
    """
    kind = spec.source.partition("/")[0]
    if kind in ("sklearn", "torch", "hfds"):
        source = _digits() if kind == "sklearn" else _named(spec, which, downloads)
        return (
            source if getattr(spec, "labels", "auto") == "auto" else replace(source, labeled=False)
        )
    root = spec.root / spec.split if spec.split else spec.root
    labels = {"unlabeled": "none", "labeled": "folders"}.get(which) or spec.labels
    found = list_folder(root, apart=labels != "none") if kind == "folder" else _tar(root, which)
    return by_class(found, f"data.{which}.root", root, labels)


def by_class(found: Found, key: str, root: Path, labels: str) -> Source:
    """Take the first-level folders for classes; names that differ only in the encoding of an accent are the same class.

    Args:
        found: the images.
        key: of the root in params.yaml, for messages.
        root: the folder or file that was listed.
        labels: ``folders``: they are; ``none``: they only say which images belong together; ``auto``: they are, unless no
            image lies in any.

    Raises:
        UserError: there is no image, a name is not UTF-8, an image lies outside the class folders, or one of these is empty.
    """
    if not found.names:
        others = (
            f"; what is there, such as {found.ignored[0]}, is of another kind"
            if found.ignored
            else ""
        )
        raise UserError(
            f"{key}: expected images ({', '.join(SUFFIXES)}), found none in {root}{others}"
        )
    _check_encoding(found, key)
    normal = [nfc(name) for name in found.names]
    tops = [name.partition("/")[0] if "/" in name else "" for name in normal]
    labeled = labels == "folders" or (labels == "auto" and any(tops))
    if labeled:
        _check_classes(tops, found, key, root)
    classes = tuple(sorted(set(tops)))
    numbers = {name: index for index, name in enumerate(classes)}
    groups = np.array([numbers[top] for top in tops], dtype=np.int64)
    times = Counter(normal)
    image_ids = tuple(
        own if times[name] > 1 else name for own, name in zip(found.names, normal, strict=True)
    )
    paths = tuple(map(str, found.places))
    return Source(
        image_ids, paths, groups, classes, found.places.__getitem__, labeled, found.ignored
    )


def _check_encoding(found: Found, key: str) -> None:
    wrong = [str(place) for place in found.places if not is_utf8(str(place))]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(f"{key}: expected file names in UTF-8, found {wrong[0]!r}{more}; rename it")


def _check_classes(tops: list[str], found: Found, key: str, root: Path) -> None:
    if "" in tops:
        loose = found.names[tops.index("")]
        raise UserError(
            f"{key}: expected <class>/<image> in {root}, found {loose} outside any class folder"
        )
    empty = sorted(set(map(nfc, found.folders)) - set(tops))
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(
            f"{key}: the class {empty[0]!r} in {root} holds no image{more}; fill or remove it"
        )


def _tar(root: Path, which: str) -> Found:
    """List the images in a tar file, or in all tar files of a folder.

    A folder that wraps everything in a file is passed over. In a folder of files, an image that lies in no folder
    belongs to the class named like its file.
    """
    archives = (
        [root]
        if root.is_file()
        else sorted(file for file in root.glob("*.tar") if is_own(file.name))
    )
    if not archives:
        raise UserError(
            f"data.{which}.root: expected a tar file or a folder of them, found no .tar in {root}"
        )
    entries: dict[str, tuple[Path, tarfile.TarInfo]] = {}
    tops: set[str] = set()
    for archive in archives:
        members, folders = _members(archive, which)
        tops |= folders
        for name, member in members.items():
            top, slash, rest = name.partition("/")
            shard = f"{top}/{archive.stem}/{rest}" if slash else f"{archive.stem}/{name}"
            entries[name if root.is_file() else shard] = archive, member
    names = sorted(entries, key=lambda name: (nfc(name), name))
    places = [
        Place(str(archive), member.name, member.offset_data, member.size)
        for archive, member in map(entries.get, names)
    ]
    return Found(names, tops, places)


def _members(archive: Path, which: str) -> tuple[dict[str, tarfile.TarInfo], set[str]]:
    """Read a tar file's table: name → image, and the first-level folders, both below a folder that wraps everything."""
    try:
        with tarfile.open(archive, "r:") as file:
            members = {
                PurePosixPath(member.name).as_posix(): member for member in file.getmembers()
            }
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"data.{which}.root: expected an uncompressed tar file, found {archive} ({error})"
        ) from error
    members = {
        name: member
        for name, member in members.items()
        if all(is_own(part) for part in PurePosixPath(name).parts)
    }
    images = {
        name: member for name, member in members.items() if member.isfile() and is_image(name)
    }
    folders = {name for name, member in members.items() if member.isdir()}
    while len({name.partition("/")[0] for name in images}) == 1 and all(
        name.count("/") > 1 for name in images
    ):
        images = {name.partition("/")[2]: member for name, member in images.items()}
        folders = {name.partition("/")[2] for name in folders}
    return images, {name.partition("/")[0] for name in folders if name not in ("", ".")}


def _digits() -> Source:
    """Open the 1,797 handwritten digits (8×8, 17 grey levels) that come inside scikit-learn."""
    pixels, labels = _digits_table()
    scaled = np.round(pixels * (255 / 16)).astype(np.uint8)
    names = tuple(f"digits/{index:05d}" for index in range(len(labels)))
    classes = tuple(str(digit) for digit in range(10))
    return Source(
        names, ("",) * len(names), labels, classes, lambda index: Image.fromarray(scaled[index])
    )


def _digits_table() -> tuple[np.ndarray, np.ndarray]:
    """Read grey levels ``(1797, 8, 8)`` in 0–16 and labels; from the file itself, which spares seconds of imports."""
    spec = importlib.util.find_spec("sklearn")
    file = Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    if not file.exists():
        from sklearn.datasets import load_digits

        digits = load_digits()
        return digits.images, digits.target.astype(np.int64)
    with gzip.open(file, "rt") as text:
        table = np.loadtxt(text, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def _named(spec: ImageSpec, which: str, downloads: Path) -> Source:
    """Open ``torch/<name>`` or ``hfds/<name>`` through timm's factory, downloading it on first use."""
    from timm.data import create_dataset

    root = spec.root or downloads
    root.mkdir(parents=True, exist_ok=True)
    try:
        dataset = create_dataset(
            spec.source, root=str(root), split=spec.split, search_split=False, download=True
        )
        reader = getattr(dataset, "reader", None)
        labels, classes = _targets(dataset, reader)
    except (
        Exception
    ) as error:  # each library fails in its own way when there is no network, or no such split
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data.{which}.source: {spec.source} (split {spec.split}) is not in {root} and cannot be fetched: {reason}"
        ) from error
    if not (labeled := labels.min(initial=0) >= 0):
        if which == "labeled":
            raise UserError(
                f"data.{which}.split: {spec.source} has no labels in its split {spec.split!r}; choose another"
            )
        labels, classes = np.zeros_like(labels), [""]
    names = tuple(
        f"{spec.source.partition('/')[2]}/{spec.split}/{index:07d}" for index in range(len(labels))
    )
    # timm's ImageDataset puts another image in the place of an unreadable one; its reader does not.
    read = (
        (lambda index: reader[index][0])
        if reader is not None
        else (lambda index: dataset[index][0])
    )
    order = sorted(range(len(classes)), key=classes.__getitem__)
    groups = np.argsort(order)[labels]
    return Source(
        names, ("",) * len(names), groups, tuple(classes[index] for index in order), read, labeled
    )


def _targets(dataset: Any, reader: Any) -> tuple[np.ndarray, list[str]]:
    """Find labels (N,) and class names of a data set, whatever its library calls them."""
    if reader is not None:
        labels = np.array(list(reader.iter_targets()), dtype=np.int64)
        names = {index: name for name, index in reader.class_to_idx.items()}
    else:
        targets = getattr(dataset, "targets", None)
        labels = np.asarray(
            [dataset[index][1] for index in range(len(dataset))] if targets is None else targets
        )
        labels = (labels[:, 0] if labels.ndim == 2 else labels).astype(
            np.int64
        )  # QMNIST: the class comes first
        names = dict(enumerate(getattr(dataset, "classes", ())))
    count = max(labels.max(initial=-1) + 1, len(names))
    plain = [_plain(names.get(index, index)) for index in range(count)]
    twice = [name for name, times in Counter(plain).items() if times > 1]
    return labels, [
        f"{name} {index}" if name in twice else name for index, name in enumerate(plain)
    ]


def _plain(name: str | int | Sequence[str]) -> str:
    return nfc(str(name) if isinstance(name, str | int) else str(name[0]))
