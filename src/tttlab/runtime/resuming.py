"""Half-finished work: where it is kept, how it is found again, when it is deleted.

DVC deletes the outputs of a stage before it runs it, and work under other settings must never be
resumed. So every piece of work has a folder outside the outputs, named by a hash of its settings,
its inputs and the code. The folder is also a lock: killing DVC can leave its training process
alive, and two processes must not write to one place.

A stage that DVC started keeps even its finished work: DVC may be killed before it has recorded the
outputs, and then runs the stage again. Once the same DVC starts another stage, it has recorded this
one. Torch is imported only to save and load tensors.
"""

import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil
from filelock import FileLock

from tttlab.errors import UserError
from tttlab.runtime.process_identity import Identity

# All libraries that decode images, compute or draw random numbers on the way to predictions.
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
# Limits of abandoned work; the bytes are those of all pieces together, but for the newest piece,
# which may be larger.
KEPT_DAYS, KEPT_BYTES = 14, 5 * 2**30
_LOCK, _ABOUT, _FINISHED = "process.json", "about.json", "finished.json"  # in a piece's folder
_DAY = 86_400  # seconds


def work_key(stage: str, settings: Any, inputs: Iterable[Path], code: Iterable[Path]) -> str:
    """Name a piece of work by everything its result depends on (SHA-256, hexadecimal).

    Args:
        stage: the stage's name.
        settings: values that JSON can hold, without those that change no result (device, workers).
        inputs: files, or folders with all their files.
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
    files = [path]
    if not path.is_file():
        files = sorted(file for file in path.rglob(pattern) if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            name = file.relative_to(path).as_posix()
            digest.update(f"{name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class Work:
    """A piece of work's folder, locked during the ``with`` block, unneeded once that succeeds.

    Of several processes that share the work, the first is its owner. The others join it once it has
    the lock.

    Attributes:
        folder: place for what must survive a kill.
        stage: name of the work, for messages.
        owner: whether this process locks and deletes the folder.
        driver: the DVC that will record the result; None: nobody will, and finished work is deleted
            at once.
        id: identifies this work among all that ever had this folder; set for the owner, inside the
            block.
    """

    def __init__(
        self, folder: Path, stage: str = "", owner: bool = True, driver: Identity | None = None
    ) -> None:
        self.folder, self.stage, self.owner, self.driver = folder, stage, owner, driver
        self.id: str | None = None

    def __enter__(self) -> "Work":
        """Lock the folder.

        Raises:
            UserError: another process that still runs holds it.
        """
        if not self.owner:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.parent / "lock"):  # only one process checks and takes the folder
            owner = _living_owner(self.folder)
            if owner is not None:
                raise UserError(
                    f"this work is already running as process {owner}; "
                    f"wait for it to end or stop it (kill {owner})"
                )
            identity = Identity.of(psutil.Process())._asdict()
            _write(self.folder / _LOCK, identity | {"host": socket.gethostname()})
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
        """Unlock the folder, or after success, if no DVC will record the result, delete it."""
        if not self.owner:
            return
        if kind is None and self.driver is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        if kind is None:
            _write(self.folder / _FINISHED, self.driver._asdict())
        (self.folder / _LOCK).unlink(missing_ok=True)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Save tensors and plain values under a name; a kill leaves the old state or the new."""
        import torch

        partial = self.folder / f"{name}.partial"
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.folder / f"{name}.pt")

    def has(self, name: str) -> bool:
        """Whether something is saved under a name."""
        return (self.folder / f"{name}.pt").exists()

    def load(self, name: str) -> dict[str, Any] | None:
        """Read what was saved under a name, to the CPU; None if there is nothing."""
        import torch

        file = self.folder / f"{name}.pt"
        return torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None


def forget_recorded(store: Path, driver: Identity) -> None:
    """Delete the work of finished stages that the same DVC ran.

    It has recorded them, for it runs another stage now.
    """
    with FileLock(store / "lock"):
        for file in store.glob(f"*/{_FINISHED}"):
            recorder = _identity(file)
            if recorder is not None and recorder.same(driver):
                shutil.rmtree(file.parent, ignore_errors=True)


class AbandonedWork(NamedTuple):
    """Work that no process of this machine uses.

    Attributes:
        folder: its folder.
        days: time since anything in it was written.
        size: bytes on disk.
        elsewhere: whether a process of another machine locked it; that one may still run.
    """

    folder: Path
    days: float
    size: int
    elsewhere: bool


def forget_abandoned(store: Path, wanted: Path) -> list[str]:
    """Delete work that was not used for `KEPT_DAYS`, and the oldest beyond `KEPT_BYTES` in all.

    Args:
        store: the folder that holds all work.
        wanted: the piece of work that is about to go on; it is kept and not counted.

    Returns:
        a line for each deleted piece.
    """
    store.mkdir(parents=True, exist_ok=True)
    lines, total = [], 0
    with FileLock(store / "lock"):
        folders = [
            path
            for path in store.iterdir()
            if path.is_dir() and path != wanted and not _in_use(path)
        ]
        pieces = sorted(map(_describe, folders), key=lambda piece: piece.days)
        for number, piece in enumerate(pieces):
            if piece.days > KEPT_DAYS:
                reason = f"more than {KEPT_DAYS} days ago"
            elif number and total + piece.size > KEPT_BYTES and not piece.elsewhere:
                kept = f"{KEPT_BYTES / 2**30:.0f} GiB of newer work are kept"
                reason = f"{piece.days:.0f} days ago, and {kept}"
            else:
                total += piece.size
                continue
            stage = _read(piece.folder / _ABOUT).get("stage") or "a stage"
            lines.append(
                f"threw away what {stage} left in {store.name} "
                f"({piece.size / 2**20:,.0f} MiB): last used {reason}"
            )
            shutil.rmtree(piece.folder, ignore_errors=True)
    return lines


def _describe(folder: Path) -> AbandonedWork:
    stats = [folder.stat()]
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another host has finished writing it
            stats.append(file.stat())
    days = (time.time() - max(stat.st_mtime for stat in stats)) / _DAY
    size = sum(stat.st_size for stat in stats)
    return AbandonedWork(folder, days, size, elsewhere=_host(folder) != socket.gethostname())


def _in_use(folder: Path) -> bool:
    """Whether a process of this machine works on it, or a running DVC has yet to record it."""
    driver = _identity(folder / _FINISHED)
    return _living_owner(folder) is not None or (driver is not None and driver.lives())


def _host(folder: Path) -> str:
    return _read(folder / _LOCK).get("host", socket.gethostname())


def _living_owner(folder: Path) -> int | None:
    """Find the running process of this machine that holds a folder; None: there is none."""
    owner = _identity(folder / _LOCK)
    return owner.pid if owner and _host(folder) == socket.gethostname() and owner.lives() else None


def _identity(file: Path) -> Identity | None:
    """Read which process a file names; None if it cannot be read, say if a full disk cut it off."""
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
