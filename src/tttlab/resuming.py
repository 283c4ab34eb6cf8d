"""Half-finished work: kept outside the stage's outputs, found again by what it is made of, thrown away at the end.

DVC deletes the outputs of a stage before it runs it, and work under other settings must never be taken up. So each
piece of work has a folder named by a hash of its settings, its inputs and the code. The folder is also a lock: killing
DVC can leave its training process alive, and two of them must not write to one place.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from filelock import FileLock

from tttlab.errors import UserError

_LIBRARIES = ("torch", "timm", "lightly", "albumentations", "numpy", "opencv-python-headless")  # the last make corruptions
_CLOCK_SECONDS = 2.0  # the same process start, read twice, can differ by this much after the clock was set


def work_key(stage: str, settings: Any, inputs: Iterable[Path]) -> str:
    """Name a piece of work by everything its result depends on (SHA-256, hexadecimal).

    Args:
        stage: the stage's name.
        settings: values that JSON can hold; leave out what never changes a result (device, workers).
        inputs: files, or folders with all that is in them.
    """
    parts = {
        "stage": stage,
        "settings": settings,
        "inputs": [content_hash(path) for path in inputs],
        "code": content_hash(Path(__file__).parent, "*.py"),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def content_hash(path: Path, pattern: str = "*") -> str:
    """Hash a file, or the names and contents of a folder's files at any depth."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob(pattern) if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            name = file.relative_to(path).as_posix()
            digest.update(f"{name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class Work:
    """A piece of work's folder, locked while the ``with`` block lasts and deleted when it ends well.

    Of several processes that share the work the first is its owner; the others join it, once it has the lock.

    Attributes:
        folder: place for what must survive a kill.
        owner: whether this process locks and deletes the folder.
    """

    def __init__(self, folder: Path, owner: bool = True) -> None:
        self.folder, self.owner = folder, owner
        self._lock = folder / "process.json"

    def __enter__(self) -> "Work":
        """Lock the folder.

        Raises:
            UserError: a process that is still alive has it.
        """
        if not self.owner:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.parent / "lock"):  # of two that find the lock free, one takes it
            if (owner := _living_owner(self._lock)) is not None:
                raise UserError(
                    f"this work is already running as process {owner}; wait for it to end or stop it (kill {owner})"
                )
            own = {"pid": os.getpid(), "created": psutil.Process().create_time()}
            self._lock.write_text(json.dumps(own), encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Throw the folder away after success, else keep it and unlock it."""
        if not self.owner:
            return
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self._lock.unlink(missing_ok=True)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Keep tensors and plain values under a name; a kill leaves the old state or the new one, never a half."""
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
        file = self.folder / f"{name}.pt"
        return torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None


def _living_owner(lock: Path) -> int | None:
    """Find the process that holds a lock; None when it is gone, or when its number now belongs to another."""
    try:
        owner = json.loads(lock.read_text(encoding="utf-8"))
        process = psutil.Process(owner["pid"])
        same = abs(process.create_time() - owner["created"]) <= _CLOCK_SECONDS
        return owner["pid"] if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, OSError, ValueError, KeyError):
        return None
