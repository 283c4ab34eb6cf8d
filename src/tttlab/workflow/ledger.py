"""A record of what every finished piece of a stage was made of, so that none is computed twice.

A stage that covers all runs and models keeps its folder (``persist`` in dvc.yaml) and computes only
the missing pieces, for example those of a new run, model or seed.
"""

import json
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tttlab.runtime.resuming import content_hash, work_key
from tttlab.workflow import command, places
from tttlab.workflow.leftovers import CODE

NAME = "made_of.json"
FOLDERS = {
    "pretrain": "pretrained",
    "finetune": "finetuned",
    "source_stats": "source_stats",
    "tune": "tuned",
    "distance": "distances",
    "adapt": "adapted",
    "align": "aligned",
}
T = TypeVar("T", bound=Hashable)


class Entry(NamedTuple):
    """What a piece was made of, and the files that it consists of, with their hashes."""

    key: str
    files: dict[str, str]


class Ledger:
    """The finished pieces of one stage.

    Args:
        stage: the stage's name in dvc.yaml, which lists the code that its results depend on.
        folder: in ``outputs``; None: as `FOLDERS` says.

    Attributes:
        folder: contains the pieces and the ledger.
    """

    def __init__(self, stage: str, folder: str | None = None) -> None:
        self.stage, self.folder = stage, places.OUTPUTS / (folder or FOLDERS[stage])
        self._hashes: dict[Path, str] = {}
        try:
            entries = json.loads((self.folder / NAME).read_text(encoding="utf-8")).items()
            self._entries = {piece: Entry(entry["key"], entry["files"]) for piece, entry in entries}
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            self._entries = {}  # nothing is there, or nothing that can be trusted

    def key(self, settings: Any, inputs: Iterable[Path]) -> str:
        """Hash everything that the result of a piece depends on.

        Args:
            settings: values that JSON can hold.
            inputs: files and folders that it is made from.
        """
        hashes = [self._hash(path) for path in inputs]
        return work_key(self.stage, [settings, hashes, self._code], (), ())

    @cached_property
    def _code(self) -> list[str]:
        """Hash the code that the stage runs."""
        return [content_hash(path, "*.py") for path in code_of(self.stage)]

    def holds(self, piece: str, key: str) -> bool:
        """Tell whether a piece with this key is there and its files are unchanged."""
        entry = self._entries.get(piece)
        return (entry is not None and entry.key == key) and all(
            (path := self.folder / name).is_file() and content_hash(path) == digest
            for name, digest in entry.files.items()
        )

    def missing(self, keys: Mapping[T, str]) -> dict[T, str]:
        """Leave out the pieces that are there already, and print how many they are.

        Args:
            keys: piece → its key.
        """
        missing = {piece: key for piece, key in keys.items() if not self.holds(str(piece), key)}
        if len(missing) < len(keys) and not command.RANK:
            print(f"{self.stage}: {len(keys) - len(missing)} of {len(keys)} are there already")
        return missing

    def enter(self, piece: str, key: str, files: Sequence[Path]) -> None:
        """Record a finished piece and its files, which are in the folder."""
        names = {file.relative_to(self.folder).as_posix(): content_hash(file) for file in files}
        self._entries[piece] = Entry(key, names)
        self._write()

    def keep_only(self, pieces: Collection[str]) -> None:
        """Remove all other pieces: those of old settings and those that a kill left unfinished."""
        self._entries = {name: entry for name, entry in self._entries.items() if name in pieces}
        wanted = {name for entry in self._entries.values() for name in entry.files}
        for path in sorted(self.folder.rglob("*"), reverse=True):  # files before their folder
            if path.is_file() and path.relative_to(self.folder).as_posix() not in {*wanted, NAME}:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        self._write()

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = content_hash(path)
        return self._hashes[path]

    def _write(self) -> None:
        entries = {piece: entry._asdict() for piece, entry in self._entries.items()}
        text = json.dumps(entries, indent=1, sort_keys=True) + "\n"
        with written_whole(self.folder / NAME) as partial:
            partial.write_text(text, encoding="utf-8")


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Give a path beside a file to write to; at the end it takes the file's place.

    So a file that is there is whole. And what DVC has linked to its cache is not written into.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    yield partial
    partial.replace(file)


def code_of(stage: str) -> Sequence[Path]:
    """List the code that a stage runs according to dvc.yaml.

    Without that file all code; so, too, where it is that of another project, in whose folder
    ``ttt-lab check`` was called.
    """
    from ruamel.yaml import YAML

    file = Path("dvc.yaml")
    if not file.is_file():
        return CODE
    read = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    entry = ((read or {}).get("stages") or {}).get(stage) or {}
    ours = ("src/tttlab/", "../src/tttlab/", "pipeline/")  # the second, in the pipeline for ARC
    paths = [Path(path) for path in entry.get("deps", ()) if str(path).startswith(ours)]
    found = [path for path in paths if path.exists()]
    return found if any("tttlab" in path.parts for path in found) else CODE
