"""Shifted images as others distribute them: CIFAR-10-C, CIFAR-10.1, ImageNet-C, domains.

======================  =========================================================================
format                  below ``root``
======================  =========================================================================
``cifar10_c``           ``<corruption>.npy`` (50,000, 32, 32, 3) uint8, the 10,000 test images at
                        severity 1, then at 2, …; ``labels.npy`` (50,000,). Hendrycks and
                        Dietterich, ICLR 2019, arXiv 1903.12261
``cifar100_c``          the same, of CIFAR-100
``cifar10_1``           ``cifar10.1_<version>_data.npy`` (N, 32, 32, 3) uint8 and
                        ``…_labels.npy`` (N,), N = 2,021 for v4 and 2,000 for v6. Recht et al.
                        2018, arXiv 1806.00451
``corruption_folders``  ``<corruption>/<severity>/<class>/<image>``, as ImageNet-C is distributed
``domain_folders``      ``<domain>/<class>/<image>``, or ``<domain>/<image>`` without labels
======================  =========================================================================

Shifts that settings are tuned under are never tested on: `choose_shifts` leaves them out for every
format.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tttlab.config.images import ShiftSet
from tttlab.config.names import is_own, is_utf8, nfc
from tttlab.config.values import BENCHMARK, SEVERITIES, is_held_out
from tttlab.data.folders import list_folder
from tttlab.data.pixels import pixel_hash
from tttlab.data.sources import ImageSource, by_class
from tttlab.errors import UserError, choices

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VERSIONS = ("v4", "v6")
_BENCHMARKS = ("cifar10_c", "cifar100_c")
_FORMS = dict.fromkeys(_BENCHMARKS, "<corruption>.npy") | {
    "cifar10_1": "cifar10.1_<version>_data.npy",
    "corruption_folders": "<corruption>/<severity>/<class>/<image>",
    "domain_folders": "<domain>/<class>/<image>",
}


class Selection(NamedTuple):
    """Which shifts of a set are tested on.

    Attributes:
        tested: name → file or folder of the shifts that are tested on.
        held_out: names of shifts kept for tuning.
        others: names of shifts beyond the 15 of a benchmark.
    """

    tested: dict[str, Path]
    held_out: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


class Shifted(NamedTuple):
    """Images under one shift of a set.

    Attributes:
        name: the shift's name within the set.
        severity: 1 to 5; 0: the shift has no degrees.
        source: where the images are.
    """

    name: str
    severity: int
    source: ImageSource


def open_shift_set(name: str, spec: ShiftSet, classes: Sequence[str]) -> Iterator[Shifted]:
    """Open a set, shift after shift; a fault in one shows before the next is opened.

    Args:
        name: the set's name in params.yaml.
        spec: its format, and which shifts of it are wanted.
        classes: names of the source's classes, sorted; the numbers in ``labels.npy`` index them.

    Raises:
        UserError: files are missing, or their shapes, types, order or classes are not those of the
            format.
    """
    readers = {
        "cifar10_1": _cifar10_1,
        "corruption_folders": _corruption_folders,
        "domain_folders": _domain_folders,
    }
    return readers.get(spec.format, _cifar_c)(f"shifts.sets.{name}", spec, classes)


def choose_shifts(key: str, spec: ShiftSet) -> Selection:
    """Choose the shifts to test on: those in ``only``, else a benchmark's 15 corruptions, else all.

    Args:
        key: the set's key in params.yaml.
        spec: its format, and which shifts are wanted; ``only`` names none that is kept for tuning.

    Raises:
        UserError: there are no shifts, or not those that are wanted.
    """
    paths = _list_shifts(key, spec)
    if not paths:
        raise UserError(
            f"{key}.root: expected {_FORMS[spec.format]} in {spec.root}, found none; "
            "check root and format"
        )
    for name in spec.only or ():
        if name not in paths:
            raise UserError(f"{key}.only: {name!r} is not in {spec.root}; {choices(name, paths)}")
    if spec.only:
        return Selection({name: paths[name] for name in spec.only})
    is_benchmark = spec.format in _BENCHMARKS
    held_out = tuple(filter(is_held_out, paths))
    others = tuple(name for name in paths if is_benchmark and name not in (*BENCHMARK, *held_out))
    tested = {name: path for name, path in paths.items() if name not in held_out + others}
    if not tested:
        kind = "a shift that is not kept for tuning"
        if is_benchmark:
            kind = "one of the 15 corruptions"
        raise UserError(
            f"{key}.root: expected {kind} in {spec.root}, found only {', '.join(paths)}; add some"
        )
    return Selection(tested, held_out, others)


def left_out(key: str, spec: ShiftSet) -> list[str]:
    """Give a line for each kind of shift that is left out though params.yaml does not say so."""
    selection = choose_shifts(key, spec)
    reasons = [
        (selection.held_out, "settings are tuned under corruptions of these names"),
        (selection.others, f"beside the 15 corruptions of the benchmark; {key}.only can name them"),
    ]
    return [f"{key}: left out {', '.join(names)}: {reason}" for names, reason in reasons if names]


def _list_shifts(key: str, spec: ShiftSet) -> dict[str, Path]:
    """List the shifts of a set in sorted order: name → file or folder."""
    if spec.format == "cifar10_1":
        files = {version: spec.root / f"cifar10.1_{version}_data.npy" for version in VERSIONS}
        return {version: file for version, file in files.items() if file.is_file()}
    if spec.format not in _BENCHMARKS:
        return _folders(key, spec.root)
    files = [file for file in spec.root.glob("*.npy") if is_own(file.name)]
    return _by_name(key, {file: file.stem for file in files if file.stem != "labels"})


def _folders(key: str, root: Path) -> dict[str, Path]:
    folders = [entry for entry in root.iterdir() if entry.is_dir() and is_own(entry.name)]
    return _by_name(key, {folder: folder.name for folder in folders})


def _by_name(key: str, names: dict[Path, str]) -> dict[str, Path]:
    """Turn path → name into name in the form NFC → path, sorted."""
    paths: dict[str, Path] = {}
    for path, name in sorted(names.items()):
        if not is_utf8(name):
            raise UserError(
                f"{key}.root: expected names in UTF-8, found {name!r} in {path.parent}; rename it"
            )
        if nfc(name) in paths:
            raise UserError(
                f"{key}.root: expected every name once, "
                f"found {nfc(name)!r} twice in {path.parent}, "
                "its accents encoded in two ways; make it one"
            )
        paths[nfc(name)] = path
    return dict(sorted(paths.items()))


# --- NumPy files ---------------------------------------------------------------------------------


def _cifar_c(key: str, spec: ShiftSet, classes: Sequence[str]) -> Iterator[Shifted]:
    data_set = spec.format.removesuffix("_c")
    labels = _labels(key, spec.root / "labels.npy", classes, data_set)
    count, rest = divmod(len(labels), len(SEVERITIES))
    if rest or not (labels.reshape(len(SEVERITIES), -1) == labels[:count]).all():
        raise UserError(
            f"{key}.root: expected the same labels five times, a severity after the other, "
            f"in {spec.root / 'labels.npy'}, found another order; restore the file"
        )
    # The ids of torchvision's test set: an image has one id, clean and under every corruption.
    image_ids = tuple(f"{data_set}/test/{row:07d}" for row in range(count))
    for name, file in choose_shifts(key, spec).tested.items():
        pixels = _pixels(key, file, len(labels))
        for severity in spec.severities or SEVERITIES:
            start = (severity - 1) * count
            rows = pixels[start : start + count]
            yield Shifted(name, severity, _source(rows, image_ids, labels[:count], classes))


def _cifar10_1(key: str, spec: ShiftSet, classes: Sequence[str]) -> Iterator[Shifted]:
    for version, file in choose_shifts(key, spec).tested.items():
        labels = _labels(key, spec.root / f"cifar10.1_{version}_labels.npy", classes, "cifar10")
        pixels = _pixels(key, file, len(labels))
        # Nine of ten images are in both versions: in both they are the same image.
        image_ids = tuple(f"cifar10.1/{pixel_hash(image)}" for image in pixels)
        yield Shifted(version, 0, _source(pixels, image_ids, labels, classes))


def _source(
    pixels: np.ndarray, image_ids: tuple[str, ...], labels: np.ndarray, classes: Sequence[str]
) -> ImageSource:
    def read(row: int) -> Image.Image:
        return Image.fromarray(pixels[row])

    return ImageSource(image_ids, ("",) * len(image_ids), labels, tuple(classes), read)


def _pixels(key: str, file: Path, count: int) -> np.ndarray:
    pixels = _load(key, file)
    if pixels.dtype != np.uint8 or pixels.shape != (count, 32, 32, 3):
        raise UserError(
            f"{key}.root: expected uint8 of shape {(count, 32, 32, 3)}, "
            f"as many as there are labels, in {file}, "
            f"found {pixels.dtype} of shape {pixels.shape}; restore the file"
        )
    return pixels


def _labels(key: str, file: Path, classes: Sequence[str], data_set: str) -> np.ndarray:
    labels = _load(key, file)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            f"{key}.root: expected whole numbers of shape (N,) in {file}, "
            f"found {labels.dtype} of shape {labels.shape}; restore the file"
        )
    count = 100 if data_set == "cifar100" else 10
    if len(classes) != count or (data_set == "cifar10" and tuple(classes) != CIFAR10):
        expected = "the 100 classes of CIFAR-100"
        if count == 10:
            expected = f"the classes of CIFAR-10 ({', '.join(CIFAR10)})"
        names = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
        raise UserError(
            f"{key}: expected {expected} in data.labeled, for the labels are numbers, "
            f"found {names}; rename the class folders"
        )
    if not len(labels) or labels.min() < 0 or labels.max() >= count:
        span = f"{labels.min()} to {labels.max()}" if len(labels) else "none"
        raise UserError(
            f"{key}.root: expected labels from 0 to {count - 1} in {file}, "
            f"found {span}; restore the file"
        )
    return labels.astype(np.int64)


def _load(key: str, file: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{key}.root: expected a NumPy file, found none that can be read at {file}; restore it"
        ) from error


# --- folders -------------------------------------------------------------------------------------


def _corruption_folders(key: str, spec: ShiftSet, _: Sequence[str]) -> Iterator[Shifted]:
    for name, folder in choose_shifts(key, spec).tested.items():
        levels = _folders(key, folder)
        if not levels:
            raise UserError(
                f"{key}.root: expected folders 1 to 5 in {folder}, found none; "
                f"check root, or leave {name!r} out by {key}.only"
            )
        unknown = [level for level in levels if level not in map(str, SEVERITIES)]
        if unknown:
            raise UserError(
                f"{key}.root: expected folders 1 to 5 in {folder}, found {unknown[0]!r}; "
                "for a folder per domain set format: domain_folders"
            )
        for severity in spec.severities or map(int, levels):
            root = folder / str(severity)
            if not root.is_dir():
                raise UserError(
                    f"{key}.severities: expected a folder {root}, found none; leave {severity} out"
                )
            yield Shifted(name, severity, _images(key, root, spec))


def _domain_folders(key: str, spec: ShiftSet, _: Sequence[str]) -> Iterator[Shifted]:
    for name, folder in choose_shifts(key, spec).tested.items():
        source = _images(key, folder, spec)
        # Unlike under a corruption, files of one name in two domains are different images.
        image_ids = tuple(f"{name}/{image_id}" for image_id in source.image_ids)
        yield Shifted(name, 0, replace(source, image_ids=image_ids))


def _images(key: str, root: Path, spec: ShiftSet) -> ImageSource:
    listing = list_folder(root, apart=spec.labels != "none")
    return by_class(listing, f"{key}.root", root, spec.labels)
