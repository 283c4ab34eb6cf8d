"""Images in tar files, listed as the folders that unpacking them gives: links are followed."""

import tarfile
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from tttlab.config.names import is_own, nfc
from tttlab.data.folders import Listing, list_tree
from tttlab.data.pixels import NOWHERE, Place
from tttlab.errors import UserError

_HOPS = 40  # links in a row, as many as Linux follows


def list_archives(root: Path, which: str, apart: bool) -> Listing:
    """List the images in a tar file, or in all tar files of a folder.

    A folder that wraps everything in a tar file is left out of the names. Of several tar files, an
    image that lies in no folder belongs to the class named like its tar file.

    Args:
        root: the file or the folder.
        which: the set's key under ``data``, for messages.
        apart: as for `tttlab.data.folders.list_folder`.

    Raises:
        UserError: there is no tar file, or one cannot be read.
    """
    archives, ignored = [root], []
    if not root.is_file():
        found = sorted(file for file in root.glob("*") if is_own(file.name))
        archives = [file for file in found if file.suffix == ".tar"]
        ignored = [file.name for file in found if file.suffix != ".tar"]
    if not archives:
        raise UserError(
            f"data.{which}.root: expected a tar file or a folder of them, found no .tar in {root}"
        )
    entries: dict[str, Place] = {}
    folders: set[str] = set()

    def shard(archive: Path, name: str) -> str:
        folder, slash, rest = name.partition("/")
        if root.is_file():
            return name
        return f"{folder}/{archive.stem}/{rest}" if slash else f"{archive.stem}/{name}"

    for archive in archives:
        listing = _unwrapped(Archive(archive, which), apart)
        folders |= listing.folders
        ignored += [shard(archive, name) for name in listing.ignored]
        for name, place in zip(listing.names, listing.places, strict=True):
            entries[shard(archive, name)] = place
    names = sorted(entries, key=lambda name: (nfc(name), name))
    return Listing(names, folders, [entries[name] for name in names], tuple(sorted(ignored)))


def _unwrapped(archive: "Archive", apart: bool) -> Listing:
    """List a tar file below the folder that wraps everything, if there is one."""
    root = PurePosixPath()
    listing = whole = list_tree(archive, root, apart, {archive.identity(root)})
    names = whole.names
    while _one_folder_wraps(names):
        root /= names[0].partition("/")[0]
        names = [name.partition("/")[2] for name in names]
    if root.parts:
        above = {archive.identity(folder) for folder in (root, *root.parents)}
        listing = list_tree(archive, root, apart, above)
        beside = tuple(name for name in whole.ignored if not name.startswith(f"{root}/"))
        listing = listing._replace(ignored=(*beside, *listing.ignored))
    return listing


def _one_folder_wraps(names: Collection[str]) -> bool:
    """Whether one folder holds folders with all the images, and so is no class itself."""
    folders = {name.partition("/")[0] for name in names}
    return len(folders) == 1 and all(name.count("/") > 1 for name in names)


class Archive:
    """The table of contents of a tar file as a tree of folders, for `list_tree`.

    Args:
        file: the tar file.
        which: the set's key under ``data``, for messages.

    Raises:
        UserError: it cannot be read.
    """

    def __init__(self, file: Path, which: str) -> None:
        try:
            with tarfile.open(file, "r:") as opened:
                table = opened.getmembers()
        except (tarfile.TarError, OSError) as error:
            raise UserError(
                f"data.{which}.root: expected an uncompressed tar file, found {file} ({error})"
            ) from error
        self._file = str(file)
        self._members: dict[str, tarfile.TarInfo] = {}
        self._children: dict[str, set[str]] = defaultdict(set)  # of every folder, by its path
        self._children[""] = set()
        self._real: dict[PurePosixPath, str] = {PurePosixPath(): ""}
        for member in table:
            path = _path(member.name)
            if not path or ".." in path.split("/"):  # unpacking would put it elsewhere
                continue
            self._members[path] = member
            if member.isdir():
                self._children[path] |= set()
            while path:
                folder, _, name = path.rpartition("/")
                known = name in self._children[folder]
                self._children[folder].add(name)
                path = "" if known else folder

    def identity(self, folder: PurePosixPath) -> str:
        """Give a folder's own path, the same by whatever links it was reached."""
        if folder not in self._real:
            self._real[folder] = self._resolve(folder.as_posix()) or ""
        return self._real[folder]

    def entries(
        self, folder: PurePosixPath
    ) -> tuple[list[str], list[PurePosixPath], list[PurePosixPath]]:
        """List a folder in sorted order: the files, the folders, and the links to folders."""
        real = self.identity(folder)
        files, folders, links = [], [], []
        for name in sorted(filter(is_own, self._children[real])):
            path = f"{real}/{name}" if real else name
            member = self._member(path)
            if path in self._children and not (member and member.issym()):
                folders.append(folder / name)
            elif member and member.issym() and self._resolve(path) in self._children:
                links.append(folder / name)
            else:
                files.append(name)
        return files, folders, links

    def place(self, file: PurePosixPath) -> Place:
        """Say where a file's bytes are; those of a link are its target's."""
        folder = self.identity(file.parent)
        path = f"{folder}/{file.name}" if folder else file.name
        shown = self._members[path].name if path == file.as_posix() else file.as_posix()
        member = self._member(path)
        if member and member.issym():
            target = self._resolve(path)
            member = None if target is None else self._member(target)
        if member is None or not member.isfile():
            return Place(self._file, shown, NOWHERE)
        return Place(self._file, shown, member.offset_data, member.size)

    def _member(self, path: str) -> tarfile.TarInfo | None:
        """Find what stands at a path; a hard link is the member that it names."""
        member = self._members.get(path)
        for _ in range(_HOPS):
            if member is None or not member.islnk():
                return member
            member = self._members.get(_path(member.linkname))
        return None

    def _resolve(self, path: str) -> str | None:
        """Follow all links on a path; None: it leads nowhere, in a circle or out of the archive."""
        left, real, hops = path.split("/")[::-1], [], 0
        while left:
            part = left.pop()
            if part == "..":
                if not real:
                    return None
                real.pop()
            elif part not in ("", "."):
                here = "/".join((*real, part))
                member = self._member(here)
                if member and member.issym():
                    hops += 1
                    if hops > _HOPS or member.linkname.startswith("/"):
                        return None
                    left += member.linkname.split("/")[::-1]
                elif member is None and here not in self._children:
                    return None
                else:
                    real.append(part)
        return "/".join(real)


def _path(name: str) -> str:
    """Give the path of a member's name, which may begin with ``./`` or ``/``."""
    path = PurePosixPath(name.lstrip("/")).as_posix()
    return "" if path == "." else path
