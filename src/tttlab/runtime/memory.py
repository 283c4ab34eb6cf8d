"""How much memory this process may still take, and how much a piece of work takes of it."""

import re
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be taken on a GPU, or on the machine within a container's limits."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min([available_bytes(), *granted()])


def available_bytes(report: Path = Path("/proc/meminfo")) -> int:
    """Bytes that the machine can still give without swapping.

    Args:
        report: where Linux says so; elsewhere psutil asks the system.
    """
    try:
        text = report.read_text(encoding="utf-8")
    except OSError:  # not Linux
        import psutil

        return psutil.virtual_memory().available
    return int(re.search(r"^MemAvailable: +(\d+) kB$", text, re.MULTILINE)[1]) * 1024


def granted(
    mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """Yield the bytes that are left of the limits of Linux's control groups.

    These are this process's group and those around it, set by a container or a batch system.
    Inactive file pages count as free: the kernel gives them back before it kills a process.

    Args:
        mount: where control groups are found.
        own: the file that names this process's groups.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers:  # version 2, alone or beside version 1
            folders = [mount, mount / "unified"]
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            folders = [mount / "memory"]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        # In a container the group is often at the root, and the path is the one on the host.
        for depth in range(len(parts) + 1):
            for folder in folders:
                free = _free_in_group(folder.joinpath(*parts[:depth]), *names)
                if free is not None:
                    yield free


def _free_in_group(group: Path, limit: str, used: str, inactive: str) -> int | None:
    """Bytes left in one control group; None: it has no limit or cannot be read.

    ``limit`` and ``used`` are names of files, ``inactive`` is a name in ``memory.stat``.
    """
    try:
        limit_bytes = int((group / limit).read_text(encoding="utf-8"))  # fails for "max": no limit
        lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        statistics = dict(line.split() for line in lines)
        used_bytes = int((group / used).read_text(encoding="utf-8"))
        return max(limit_bytes - used_bytes + int(statistics.get(inactive, 0)), 0)
    except (OSError, ValueError):
        return None


class OverLimit(MemoryError):
    """More bytes than a `Tally` allows."""


class Tally(TorchDispatchMode):
    """Context that counts the bytes of tensors made inside it, and stops beyond a limit.

    Unlike the process's memory, the count depends neither on earlier work nor on the allocator.
    Every operation takes some 15 µs longer.

    Args:
        limit: most bytes at once; None: any number.

    Attributes:
        peak: most bytes at once so far. The tensors that an operation reads and makes count twice,
            for libraries such as oneDNN copy them into a layout of their own.
    """

    def __init__(self, limit: float | None = None) -> None:
        super().__init__()
        self.limit, self.peak = limit, 0
        self._alive = 0
        self._storages: dict[int, weakref.ref] = {}  # counted and alive, by address

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count the new memory of its result."""
        result = func(*args, **(kwargs or {}))
        outputs = [
            tensor
            for tensor in _tensors((result,))
            if tensor.untyped_storage().data_ptr() not in self._storages
        ]
        if outputs:  # often there are none, for the result is a view
            inputs = list(_tensors(args))
            input_addresses = {tensor.untyped_storage().data_ptr() for tensor in inputs}
            new_bytes = sum(
                self._count(tensor.untyped_storage(), input_addresses) for tensor in outputs
            )
            copied_bytes = 0
            if new_bytes and inputs:
                copied_bytes = new_bytes + sum(
                    min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in inputs
                )
            self.peak = max(self.peak, self._alive + copied_bytes)
            if self.limit is not None and self.peak > self.limit:
                raise OverLimit(f"{self.peak} bytes of tensors, where {self.limit:.0f} are allowed")
        return result

    def _count(self, storage: torch.UntypedStorage, input_addresses: set[int]) -> int:
        """Count a storage until it is freed; → its bytes, 0 if an input has it or it is counted."""
        address = storage.data_ptr()
        size = 0 if address in input_addresses else storage.nbytes()

        def forget(_storage: weakref.ref) -> None:
            del self._storages[address]
            self._alive -= size

        if address and address not in self._storages:
            self._storages[address] = weakref.ref(storage, forget)
            self._alive += size
            return size
        return 0


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Find the tensors among an operation's arguments or results."""
    for value in values:
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
