"""How many images to work on at once: no more than fit into memory, and of these as many as is fastest.

Whatever looks at images does so by these groups. On a GPU the bytes that an image takes are read from its allocator, and what
is too much raises an error there. On a CPU nothing does until the system kills the process: so the tensors of the first group
are counted while it is worked on, within a limit, and one that would go beyond it is tried again at half the size.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from tttlab.errors import UserError
from tttlab.runtime.devices import restart_peak
from tttlab.runtime.memory import Tally, free_bytes

FIRST, LARGEST = 8, 1024
TRIALS = 2  # groups timed before a size is judged: the first one of a size pays for warming up
WORTH = 0.95  # a size is worth while if an image takes at most this share of the time it took at half the size
SHARE = 0.7  # of the free memory that a group may be expected to take
CPU_LIMIT = 2**31  # bytes; a CPU's cores are busy with far less than that
Wish = int | Literal["auto"]
T = TypeVar("T")


@dataclass
class Group:
    """One group's ``size``, and the ``work`` it was, in images: one that is done after the first step counts for less."""

    size: int
    work: float


class GroupSize:
    """The number of images per group; learns from the groups that it sizes.

    A fixed wish is followed. ``auto`` begins small and, once it is known what an image takes, goes on with the largest size
    that fits or, timed, doubles the size for as long as that saves time. In any case a group that runs out of memory is tried
    again at half the size. Results do not depend on any of it.

    Args:
        wish: images per group.
        processes: how many like this one share the memory of a CPU.
        largest: most images of a group, where there is no fixed wish.
        timed: whether to find the size that is fastest; False: it is the same in every execution, unless memory is scarce.

    Attributes:
        size: images of the next group.
        growing: whether larger sizes are still to be tried.
    """

    def __init__(
        self, wish: Wish = "auto", *, processes: int = 1, largest: int = LARGEST, timed: bool = True
    ) -> None:
        self.size = min(FIRST, largest) if wish == "auto" else wish
        self.growing = self._automatic = wish == "auto"
        self._processes, self._largest, self._timed = processes, largest, timed
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
        group, trial = Group(size, size), self.growing and size == self.size
        tally = self._tally(size, device)
        before, began = restart_peak(device) if trial else 0, time.perf_counter()
        try:
            with tally or nullcontext():
                yield group
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            if size == 1:
                others = "" if self._processes == 1 else ", or lower machine.workers"
                raise UserError(
                    f"one image does not fit into the memory of {device}; lower num_views, choose fewer trainable "
                    f"parameters or a smaller backbone{others}"
                ) from error
            self.size, self.growing = size // 2, False
            torch.cuda.empty_cache()
            return
        spent = time.perf_counter() - began
        if tally:
            self._bytes_per_image = max(tally.peak, 1) / group.work
            self._fit(device)
        elif trial and device.type == "cuda":
            self._bytes_per_image = max(
                self._bytes_per_image, (torch.cuda.max_memory_allocated(device) - before) / size
            )
        if trial and self.growing:
            self._learn(spent / group.work, device)

    def _tally(self, size: int, device: torch.device) -> Tally | None:
        """Count the tensors of a group on a CPU, as long as it is not known what an image takes."""
        if device.type == "cuda" or not self._automatic or self._bytes_per_image:
            return None
        return Tally(self._limit(device) if size > 1 else free_bytes(device) / self._processes)

    def _limit(self, device: torch.device) -> float:
        """Bytes that a group may take."""
        if device.type == "cuda":
            return SHARE * free_bytes(device)
        return min(SHARE * free_bytes(device) / self._processes, CPU_LIMIT)

    def _fit(self, device: torch.device) -> None:
        """Take fewer images where so many may not fit, as when those that were counted were less work than others will be."""
        fitting = int(self._limit(device) / self._bytes_per_image)
        if fitting < self.size:
            self.size, self.growing = max(fitting, 1), False

    def _learn(self, seconds: float, device: torch.device) -> None:
        """Take in the time per image at this size, and choose the next one."""
        if not self._timed:
            fitting = int(self._limit(device) / self._bytes_per_image)
            self.size, self.growing = max(min(fitting, self._largest), self.size), False
            return
        known = self._seconds.setdefault(self.size, [])
        known.append(seconds)
        if len(known) < TRIALS:
            return
        best = {size: min(times) for size, times in self._seconds.items()}
        fits = 2 * self.size * self._bytes_per_image < self._limit(device)
        if (
            best[self.size] <= WORTH * best.get(self.size // 2, float("inf"))
            and fits
            and 2 * self.size <= self._largest
        ):
            self.size *= 2
        else:
            self.size, self.growing = min(best, key=best.__getitem__), False


class Groups:
    """Sizes of the groups of several kinds of work, each learnt on its own: what an image takes differs between them.

    Args:
        wish: as for `GroupSize`.
        processes: likewise.
    """

    def __init__(self, wish: Wish = "auto", processes: int = 1) -> None:
        self._wish, self._processes = wish, processes
        self._sizes: dict[Hashable, GroupSize] = {}

    def of(self, *kind: Hashable, largest: int = LARGEST, timed: bool = True) -> GroupSize:
        """Give the size for one kind of work."""
        if kind not in self._sizes:
            self._sizes[kind] = GroupSize(
                self._wish, processes=self._processes, largest=largest, timed=timed
            )
        return self._sizes[kind]


def as_sizes(wish: Wish | GroupSize, **kind: Any) -> GroupSize:
    """Return what has learnt already as it is, and begin anew with a mere wish; further arguments as for `GroupSize`."""
    return wish if isinstance(wish, GroupSize) else GroupSize(wish, **kind)


def in_groups(
    work: Callable[[slice], T], count: int, device: torch.device, sizes: GroupSize
) -> Iterator[T]:
    """Yield what ``work`` makes of images, group by group.

    Args:
        work: called with the places of a group's images; again, with fewer, if memory ran out.
        count: of all images.
        device: where the work is done.
        sizes: of the groups.
    """
    done = 0
    while done < count:
        found = []
        with sizes.open(count - done, device) as group:
            found.append(work(slice(done, done + group.size)))
        if found:
            done += group.size
            yield found.pop()


def through(
    work: Callable[[Tensor], T], batches: Iterable[Tensor], sizes: GroupSize
) -> Iterator[T]:
    """Yield what ``work`` makes of the images of every batch ``(N, …)``, group by group."""
    for images in batches:
        yield from in_groups(lambda part: work(images[part]), len(images), images.device, sizes)  # noqa: B023


def _out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out; PyTorch's CPU allocator and some GPU libraries only say so in words."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        word in str(error) for word in words
    )
