"""How many images to work on at once: as many as is fastest, and no more than fit into memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from tttlab.errors import UserError

FIRST, LARGEST = 8, 1024
TRIALS = 2  # groups timed before a size is judged: the first one of a size pays for warming up
WORTH = 0.95  # a size is worth while if an image takes at most this share of the time it took at half the size
SHARE = 0.7  # of the free memory that a group may be expected to take


@dataclass
class Group:
    """One group's ``size``, and the ``work`` it was, in images: one that is done after the first step counts for less."""

    size: int
    work: float


class GroupSize:
    """The number of images per group; learns from the groups that it sizes.

    A fixed wish is followed, ``auto`` doubles the size for as long as that saves time and the next size is expected to fit.
    In either case a group that runs out of memory is tried again at half the size. Results do not depend on any of it.

    Attributes:
        size: images of the next group.
        growing: whether larger sizes are still to be tried.
    """

    def __init__(self, wish: int | Literal["auto"] = "auto") -> None:
        self.size = FIRST if wish == "auto" else wish
        self.growing = wish == "auto"
        self._seconds: dict[int, list[float]] = {}  # per image, by size
        self._bytes_per_image = 0.0

    @contextmanager
    def open(self, left: int, device: torch.device) -> Iterator[Group]:
        """Work on one group inside the context; if that runs out of memory, leave it as if nothing had been tried.

        Args:
            left: images that wait.
            device: where the work is done.

        Yields:
            how many of them to take; set its ``work`` where that is less.

        Raises:
            UserError: not even one image fits into memory.
        """
        size = min(self.size, left)
        group = Group(size, size)
        memory, began = _start_measuring(device) if self.growing and size == self.size else 0, time.perf_counter()
        try:
            yield group
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            if size == 1:
                raise UserError(
                    f"adapting one image does not fit into the memory of {device}; lower num_views, choose fewer trainable "
                    "parameters or a smaller backbone"
                ) from error
            self.size, self.growing = size // 2, False
            torch.cuda.empty_cache()
            return
        if self.growing and size == self.size:
            self._bytes_per_image = max(self._bytes_per_image, (_peak(device) - memory) / size)
            self._learn((time.perf_counter() - began) / group.work, device)

    def _learn(self, seconds: float, device: torch.device) -> None:
        """Take in the time per image at this size, and choose the next one."""
        known = self._seconds.setdefault(self.size, [])
        known.append(seconds)
        if len(known) < TRIALS:
            return
        best = {size: min(times) for size, times in self._seconds.items()}
        fits = 2 * self.size * self._bytes_per_image < SHARE * _free(device)
        if best[self.size] <= WORTH * best.get(self.size // 2, float("inf")) and fits and 2 * self.size <= LARGEST:
            self.size *= 2
        else:
            self.size, self.growing = min(best, key=best.__getitem__), False


def _out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out; PyTorch's CPU allocator and some GPU libraries only say so in words."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def _start_measuring(device: torch.device) -> int:
    """Bytes in use before a group; `_peak` counts from here.

    As long as groups grow the last one measured is the largest, so that the peak since then is that of all of them.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return _peak(device)


def _peak(device: torch.device) -> int:
    """Most bytes in use: on a GPU since `_start_measuring`, on a CPU since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _free(device: torch.device) -> int:
    """Bytes that a group may hope for."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available
