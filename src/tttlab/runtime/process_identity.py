"""Which process is which: by number and start time, for the system reuses numbers."""

from pathlib import Path
from typing import NamedTuple

import psutil

# If the clock is set, two readings of the same start time can differ by this much.
CLOCK_SECONDS = 2.0


class Identity(NamedTuple):
    """A process of this machine: its number and its start time, in seconds since 1970."""

    pid: int
    created: float

    @classmethod
    def of(cls, process: psutil.Process) -> "Identity":
        """Identify a running process."""
        return cls(process.pid, process.create_time())

    def same(self, other: "Identity") -> bool:
        """Whether both are the same process."""
        return self.pid == other.pid and abs(self.created - other.created) <= CLOCK_SECONDS

    def lives(self) -> bool:
        """Whether the process still runs; a later one with the same number does not count."""
        try:
            process = psutil.Process(self.pid)
            return self.same(Identity.of(process)) and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, ValueError):  # ValueError: no process can have this number
            return False


def find_driver(process: psutil.Process) -> Identity | None:
    """Find the DVC that started a process, its nearest such ancestor; None: there is none."""
    return next((Identity.of(ancestor) for ancestor in process.parents() if is_dvc(ancestor)), None)


def is_dvc(process: psutil.Process) -> bool:
    """Recognise ``dvc …``, ``python …/bin/dvc …`` and ``python -m dvc …``."""
    try:
        return any(Path(word).name in ("dvc", "dvc.exe") for word in process.cmdline()[:3])
    except psutil.Error:
        return False
