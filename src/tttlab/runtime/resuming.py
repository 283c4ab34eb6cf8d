"""Half-finished work: kept outside the stage's outputs, found again by what it is made of, thrown away when nobody needs it.

DVC deletes the outputs of a stage before it runs it, and work under other settings must never be taken up. So each
piece of work has a folder named by a hash of its settings, its inputs and the code. The folder is also a lock: killing
DVC can leave its training process alive, and two of them must not write to one place.

A stage that DVC started keeps its work when it is finished, too: DVC may be killed before it has recorded the outputs, and then
runs the stage again. Once the same DVC starts another stage, it has recorded this one. Torch is imported when tensors are.
"""

import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil
from filelock import FileLock

from tttlab.errors import UserError
from tttlab.runtime.process_identity import Identity

# All that computes, decodes or draws random numbers on the way from images to predictions.
LIBRARIES = (
    "albucore",
    "albumentations",
    "lightly",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "pytorch-lightning",
    "scikit-learn",
    "scipy",
    "timm",
    "torch",
    "torchvision",
)
KEPT_DAYS, KEPT_BYTES = (
    14,
    5 * 2**30,
)  # of abandoned work, all pieces together; the newest piece may be larger
_LOCK, _ABOUT, _FINISHED = "process.json", "about.json", "finished.json"  # in a piece's folder
_DAY = 86_400  # seconds


def work_key(stage: str, settings: Any, inputs: Iterable[Path], code: Iterable[Path]) -> str:
    """Name a piece of work by everything its result depends on (SHA-256, hexadecimal).

    Args:
        stage: the stage's name.
        settings: values that JSON can hold; leave out what never changes a result (device, workers).
        inputs: files, or folders with all that is in them.
        code: folders with Python files.
    """
    parts = {
        "stage": stage,
        "settings": settings,
        "inputs": [content_hash(path) for path in inputs],
        "code": [content_hash(path, "*.py") for path in code],
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def content_hash(path: Path, pattern: str = "*") -> str:
    """Hash a file, or the names and contents of a folder's files at any depth."""
    files = (
        [path] if path.is_file() else sorted(file for file in path.rglob(pattern) if file.is_file())
    )
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            name = file.relative_to(path).as_posix()
            digest.update(f"{name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class Work:
    """A piece of work's folder, locked while the ``with`` block lasts and needless when it ends well.

    Of several processes that share the work the first is its owner; the others join it, once it has the lock.

    Attributes:
        folder: place for what must survive a kill.
        stage: what the work is, for people.
        owner: whether this process locks and deletes the folder.
        driver: the DVC that will record the result; None: nobody will, and finished work is deleted at once.
        id: what tells this work from other work that had the same folder; known to the owner, inside the block.
    """

    def __init__(
        self, folder: Path, stage: str = "", owner: bool = True, driver: Identity | None = None
    ) -> None:
        self.folder, self.stage, self.owner, self.driver = folder, stage, owner, driver
        self.id: str | None = None

    def __enter__(self) -> "Work":
        """Lock the folder.

        Raises:
            UserError: a process that is still alive has it.
        """
        if not self.owner:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.parent / "lock"):  # of two that find the lock free, one takes it
            if (owner := _living_owner(self.folder)) is not None:
                raise UserError(
                    f"this work is already running as process {owner}; wait for it to end or stop it (kill {owner})"
                )
            _write(
                self.folder / _LOCK,
                Identity.of(psutil.Process())._asdict() | {"host": socket.gethostname()},
            )
            (self.folder / _FINISHED).unlink(missing_ok=True)
            self.id = _read(self.folder / _ABOUT).get("id") or uuid.uuid4().hex
            _write(self.folder / _ABOUT, {"id": self.id, "stage": self.stage})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Unlock the folder, and throw it away after success if nobody can want it again."""
        if not self.owner:
            return
        if kind is None and self.driver is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        if kind is None:
            _write(self.folder / _FINISHED, self.driver._asdict())
        (self.folder / _LOCK).unlink(missing_ok=True)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Keep tensors and plain values under a name; a kill leaves the old state or the new one, never a half."""
        import torch

        partial = self.folder / f"{name}.partial"
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.folder / f"{name}.pt")

    def has(self, name: str) -> bool:
        """Tell whether something is kept under a name."""
        return (self.folder / f"{name}.pt").exists()

    def load(self, name: str) -> dict[str, Any] | None:
        """Read what was kept under a name, on the CPU; None when there is nothing."""
        import torch

        file = self.folder / f"{name}.pt"
        return torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None


def forget_recorded(store: Path, driver: Identity) -> None:
    """Throw away what stages finished that the same DVC ran before: it has recorded them, or it would not run this one."""
    with FileLock(store / "lock"):
        for mark in store.glob(f"*/{_FINISHED}"):
            found = _identity(mark)
            if found is not None and found.same(driver):
                shutil.rmtree(mark.parent, ignore_errors=True)


class Left(NamedTuple):
    """Work that nobody is known to use.

    Attributes:
        folder: where it is.
        days: since anything in it was written.
        size: bytes on disk.
        elsewhere: whether a process of another machine, of which nothing is known here, locked it.
    """

    folder: Path
    days: float
    size: int
    elsewhere: bool


def forget_abandoned(store: Path, wanted: Path) -> list[str]:
    """Throw away work that nobody went on with for `KEPT_DAYS`; of the rest, from the newest on, what exceeds `KEPT_BYTES`.

    Args:
        store: the folder that holds all work.
        wanted: the piece of work that is about to go on, which is not counted.

    Returns:
        a line for each piece that is gone.
    """
    store.mkdir(parents=True, exist_ok=True)
    lines, total = [], 0
    with FileLock(store / "lock"):
        folders = [
            path
            for path in store.iterdir()
            if path.is_dir() and path != wanted and not _in_use(path)
        ]
        for number, left in enumerate(sorted(map(_look, folders), key=lambda left: left.days)):
            if left.days > KEPT_DAYS:
                why = f"more than {KEPT_DAYS} days ago"
            elif number and total + left.size > KEPT_BYTES and not left.elsewhere:
                why = f"{left.days:.0f} days ago, and {KEPT_BYTES / 2**30:.0f} GiB of newer work are kept"
            else:
                total += left.size
                continue
            stage = _read(left.folder / _ABOUT).get("stage") or "a stage"
            lines.append(
                f"threw away what {stage} left in {store.name} ({left.size / 2**20:,.0f} MiB): last used {why}"
            )
            shutil.rmtree(left.folder, ignore_errors=True)
    return lines


def _look(folder: Path) -> Left:
    found = [file.stat() for file in (folder, *folder.rglob("*"))]
    elsewhere = _host(folder) != socket.gethostname()
    newest = max(stat.st_mtime for stat in found)
    return Left(
        folder, (time.time() - newest) / _DAY, sum(stat.st_size for stat in found), elsewhere
    )


def _in_use(folder: Path) -> bool:
    """Tell whether a process of this machine is at work on it, or finished it for a DVC that has yet to record it."""
    driver = _identity(folder / _FINISHED)
    return _living_owner(folder) is not None or (driver is not None and driver.lives())


def _host(folder: Path) -> str:
    return _read(folder / _LOCK).get("host", socket.gethostname())


def _living_owner(folder: Path) -> int | None:
    """Find the process of this machine that holds a folder; None when it is gone, or its number now belongs to another."""
    owner = _identity(folder / _LOCK)
    return owner.pid if owner and _host(folder) == socket.gethostname() and owner.lives() else None


def _identity(file: Path) -> Identity | None:
    """Read which process a file names; None when it cannot be read, such as one that a full disk cut off."""
    try:
        values = _read(file)
        return Identity(int(values["pid"]), float(values["created"]))
    except (ValueError, KeyError, TypeError):
        return None


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values), encoding="utf-8")
