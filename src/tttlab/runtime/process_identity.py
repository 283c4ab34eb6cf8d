"""Which process is which: the system gives numbers anew, so that the time of its start belongs to a process."""

from pathlib import Path
from typing import NamedTuple

import psutil

CLOCK_SECONDS = (
    2.0  # the same process start, read twice, can differ by this much after the clock was set
)


class Identity(NamedTuple):
    """A process of this machine: its number, and when it began, in seconds since 1970."""

    pid: int
    created: float

    @classmethod
    def of(cls, process: psutil.Process) -> "Identity":
        """Identify a process that runs."""
        return cls(process.pid, process.create_time())

    def same(self, other: "Identity") -> bool:
        """Tell whether both are the same process."""
        return self.pid == other.pid and abs(self.created - other.created) <= CLOCK_SECONDS

    def lives(self) -> bool:
        """Tell whether the process still runs; a later one with the same number does not count."""
        try:
            process = psutil.Process(self.pid)
            return self.same(Identity.of(process)) and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, ValueError):  # ValueError: no process can have this number
            return False


def find_driver(process: psutil.Process) -> Identity | None:
    """Find the DVC that started a process: its nearest ancestor of that name; None: it was started by hand."""
    return next((Identity.of(ancestor) for ancestor in process.parents() if is_dvc(ancestor)), None)


def is_dvc(process: psutil.Process) -> bool:
    """Recognise ``dvc …``, ``python …/bin/dvc …`` and ``python -m dvc …``."""
    try:
        return any(Path(word).name in ("dvc", "dvc.exe") for word in process.cmdline()[:3])
    except psutil.Error:
        return False
