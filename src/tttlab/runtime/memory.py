"""How much memory this process may still take, and how much a piece of work takes of it."""

import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be taken: a GPU's, or the machine's within what a container or a batch system grants."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min([psutil.virtual_memory().available, *granted()])


def granted(
    mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """Tell what Linux's control groups, this process's and those around it, leave of their limits, in bytes.

    Pages of files that nobody has looked at for a while count as free: the kernel gives them back before it kills.

    Args:
        mount: where control groups are found.
        own: the file that names this process's.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers:  # version 2, alone or beside version 1
            folders, names = (
                [mount, mount / "unified"],
                ("memory.max", "memory.current", "inactive_file"),
            )
        elif "memory" in controllers.split(","):
            folders, names = (
                [mount / "memory"],
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        parts = [part for part in path.split("/") if part]
        # A container often sees its own group as the root, under a path that only the machine around it knows.
        for depth in range(len(parts) + 1):
            for folder in folders:
                if (room := _room(folder.joinpath(*parts[:depth]), *names)) is not None:
                    yield room


def _room(group: Path, limit: str, used: str, inactive: str) -> int | None:
    """Bytes that one control group leaves; None: it has no limit, or is not to be seen."""
    try:
        most = int((group / limit).read_text(encoding="utf-8"))  # "max" is no number
        statistics = dict(
            line.split()
            for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        )
        return max(
            most
            - int((group / used).read_text(encoding="utf-8"))
            + int(statistics.get(inactive, 0)),
            0,
        )
    except (OSError, ValueError):
        return None


class OverLimit(MemoryError):
    """More bytes than a `Tally` allows."""


class Tally(TorchDispatchMode):
    """Context that counts the bytes of the tensors made inside it, and stops the work when it takes too many at once.

    What tensors take does not depend on what the process held before, nor on what its allocator does. Every operation costs
    some 15 µs more.

    Args:
        limit: most bytes at once; None: any number.

    Attributes:
        peak: most bytes at once so far: of the tensors alive, and again of those that an operation read and made, for libraries
            such as oneDNN copy both into a layout of their own.
    """

    def __init__(self, limit: float | None = None) -> None:
        super().__init__()
        self.limit, self.peak = limit, 0
        self._alive = 0
        self._known: dict[int, weakref.ref] = {}  # by address

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what is new of its result."""
        result = func(*args, **(kwargs or {}))
        made = [
            tensor
            for tensor in _tensors((result,))
            if tensor.untyped_storage().data_ptr() not in self._known
        ]
        if made:  # of most operations the result is a view
            read = list(_tensors(args))
            there = {tensor.untyped_storage().data_ptr() for tensor in read}
            size = sum(self._keep(tensor.untyped_storage(), there) for tensor in made)
            again = (
                size + sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in read)
                if size and read
                else 0
            )
            self.peak = max(self.peak, self._alive + again)
            if self.limit is not None and self.peak > self.limit:
                raise OverLimit(f"{self.peak} bytes of tensors, where {self.limit:.0f} are allowed")
        return result

    def _keep(self, memory: torch.UntypedStorage, there: set[int]) -> int:
        """Take note of memory, and of its end; → its bytes, 0 of what was ``there`` before."""
        place = memory.data_ptr()
        size = 0 if place in there else memory.nbytes()

        def forget(_memory: weakref.ref) -> None:
            del self._known[place]
            self._alive -= size

        if place and place not in self._known:
            self._known[place] = weakref.ref(memory, forget)
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
