"""Images in a folder: links are followed but never in a circle; system files are ignored."""

import os
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import NamedTuple, Protocol, TypeVar

from tttlab.config.names import is_own, nfc
from tttlab.data.pixels import Place
from tttlab.errors import UserError

P = TypeVar("P", bound=PurePath)
SUFFIXES = (
    ".bmp",
    ".gif",
    ".jfif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)


class Listing(NamedTuple):
    """What lies below a root.

    Attributes:
        names: image files by their paths below the root, in the order of `nfc`.
        folders: first-level folders, even empty ones.
        places: where each image is.
        ignored: other files.
    """

    names: list[str]
    folders: set[str]
    places: list[Place]
    ignored: tuple[str, ...] = ()


def is_image(name: str) -> bool:
    """Tell by its suffix whether a file is an image."""
    return name.lower().endswith(SUFFIXES)


def list_folder(root: Path, apart: bool) -> Listing:
    """List the image files below a folder, except hidden and system files.

    A link to a folder is followed, unless it leads back up. A folder that can be reached in several
    ways is listed once, where it lies rather than behind a link.

    Args:
        root: the folder.
        apart: its first-level folders are classes; a folder reached from several of them is listed
            in each.

    Raises:
        UserError: a folder cannot be listed.
    """
    tree = _Folders()
    above = {tree.identity(folder) for folder in (root.resolve(), *root.resolve().parents)}
    return list_tree(tree, root, apart, above)


class Tree(Protocol[P]):
    """Folders on a disk, or in an archive."""

    def entries(self, folder: P) -> tuple[list[str], list[P], list[P]]:
        """List a folder in sorted order: the files' names, the folders, the links to folders."""

    def identity(self, folder: P) -> Hashable:
        """Give what is the same for a folder by whatever path it was reached."""

    def place(self, file: P) -> Place:
        """Say where a file's bytes are."""


def list_tree(tree: Tree[P], root: P, apart: bool, above: set[Hashable]) -> Listing:
    """List the image files below a folder of a tree; see `list_folder`.

    Args:
        tree: the tree.
        root: the folder.
        apart: as for `list_folder`.
        above: the identities of the root and its parents.
    """
    loose, folders, links = tree.entries(root)
    tops = [*folders, *links]
    names, ignored = [], []
    for name in (*loose, *_below(tree, root, tops, above, apart)):
        if is_image(name):
            names.append(name)
        else:
            ignored.append(name.encode(errors="backslashreplace").decode())
    names.sort(key=lambda name: (nfc(name), name))
    places = [tree.place(root / name) for name in names]
    return Listing(names, {top.name for top in tops}, places, tuple(sorted(ignored)))


def _below(
    tree: Tree[P], root: P, tops: Sequence[P], above: set[Hashable], apart: bool
) -> Iterator[str]:
    """Yield the names below the root of all files in the first-level folders ``tops``.

    ``above`` are the identities of the root and its parents. A folder that is reached twice is
    listed once, or with ``apart`` once from each of ``tops``.
    """
    for starts in [[top] for top in tops] if apart else [tops]:
        for folder, files in _walk(tree, starts, set(above)):
            path = folder.relative_to(root).as_posix()
            yield from (f"{path}/{file}" for file in files)


def _walk(tree: Tree[P], starts: Iterable[P], seen: set[Hashable]) -> Iterator[tuple[P, list[str]]]:
    """Yield every folder from ``starts`` on that is not in ``seen``, once, with its files.

    Folders behind links come last.
    """
    waiting = deque(starts)
    while waiting:
        folder = waiting.popleft()
        if (identity := tree.identity(folder)) not in seen:
            seen.add(identity)
            files, folders, links = tree.entries(folder)
            waiting.extendleft(reversed(folders))
            waiting.extend(links)
            yield folder, files


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turn the system's refusal to read a folder into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: expected a folder that can be read, found none ({error.strerror}); "
            "allow it, or move the folder away"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


class _Folders:
    """Folders on a disk."""

    def entries(self, folder: Path) -> tuple[list[str], list[Path], list[Path]]:
        """List a folder in sorted order: the names of files, the folders, the links to folders."""
        files, folders, links = [], [], []
        with _reading(folder), os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if is_own(entry.name) and not _is_folder(entry):
                    files.append(entry.name)
                elif is_own(entry.name):
                    (links if entry.is_symlink() else folders).append(folder / entry.name)
        return files, folders, links

    def identity(self, folder: Path) -> tuple[int, int]:
        """Find a folder's device and inode numbers, the same by whatever path it was reached."""
        with _reading(folder):
            status = folder.stat()
        return status.st_dev, status.st_ino

    def place(self, file: Path) -> Place:
        """Say where a file is."""
        return Place(str(file))
