"""How many images to work on at once: the fastest number of those that fit into memory.

All work on images is done in these groups. On a GPU the allocator tells how many bytes an image
takes, and a group that is too large raises an error. On a CPU there is no error: the system kills
the process. So there the tensors of the first group are counted while it runs, and a group that
goes beyond the limit is stopped and tried again at half the size.
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
FORWARD_LARGEST = 256  # images in one forward pass without steps
TRIALS = 2  # groups timed before a size is judged: the first one of a size pays for warming up
# A size is worth while if an image takes at most this share of the time it takes at half the size.
WORTH = 0.95
SHARE = 0.7  # a group may be expected to take this share of the free memory
CPU_LIMIT = 2**31  # bytes; far fewer keep a CPU's cores busy
Wish = int | Literal["auto"]
T = TypeVar("T")


class TooLittleMemory(UserError):
    """A single image does not fit into the memory."""


@dataclass
class Group:
    """One group of images.

    Attributes:
        size: number of images.
        work: the work that they took, in images; an image that stops after the first step counts
            for less than one.
    """

    size: int
    work: float


class GroupSize:
    """The number of images per group; learns from the groups that it sizes.

    A fixed wish is followed. ``auto`` begins small. Once the memory per image is known, it takes
    the largest size that fits or, if timed, doubles the size for as long as that saves time. In any
    case a group that runs out of memory is tried again at half the size. No result depends on it.

    Args:
        wish: images per group.
        processes: number of processes that share the memory of a CPU.
        largest: most images of a group, for ``auto``.
        timed: whether to find the fastest size. If not, the size is the same in every execution,
            unless memory is scarce.

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
        """Work on one group inside the context; running out of memory ends it without an error.

        Args:
            left: images not yet done.
            device: where the work is done.

        Yields:
            how many of these to take; set its ``work`` if they took less than that.

        Raises:
            UserError: not even one image fits into memory.
        """
        size = min(self.size, left)
        group, trial = Group(size, size), self.growing and size == self.size
        tally = self._tally(size, device)
        bytes_before = restart_peak(device) if trial else 0
        started = time.perf_counter()
        try:
            with tally or nullcontext():
                yield group
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            if size == 1:
                advice = "" if self._processes == 1 else ", or lower machine.workers"
                raise TooLittleMemory(
                    f"one image does not fit into the memory of {device}; lower num_views, "
                    f"choose fewer trainable parameters or a smaller backbone{advice}"
                ) from error
            self.size, self.growing = size // 2, False
            torch.cuda.empty_cache()
            return
        seconds = time.perf_counter() - started
        if tally:
            self._bytes_per_image = max(tally.peak, 1) / group.work
            self._fit(device)
        elif trial and device.type == "cuda":
            taken = torch.cuda.max_memory_allocated(device) - bytes_before
            self._bytes_per_image = max(self._bytes_per_image, taken / size)
        if trial and self.growing:
            self._learn(seconds / group.work, device)

    def _tally(self, size: int, device: torch.device) -> Tally | None:
        """Make a counter of a group's tensors; None on a GPU or once an image's bytes are known."""
        if device.type == "cuda" or not self._automatic or self._bytes_per_image:
            return None
        return Tally(self._limit(device) if size > 1 else free_bytes(device) / self._processes)

    def _limit(self, device: torch.device) -> float:
        """Bytes that a group may take."""
        if device.type == "cuda":
            return SHARE * free_bytes(device)
        return min(SHARE * free_bytes(device) / self._processes, CPU_LIMIT)

    def _fit(self, device: torch.device) -> None:
        """Lower the size if it may not fit: the images counted may have taken less than others."""
        fitting = int(self._limit(device) / self._bytes_per_image)
        if fitting < self.size:
            self.size, self.growing = max(fitting, 1), False

    def _learn(self, seconds: float, device: torch.device) -> None:
        """Record the time per image at this size, and choose the next size."""
        if not self._timed:
            fitting = int(self._limit(device) / self._bytes_per_image)
            self.size, self.growing = max(min(fitting, self._largest), self.size), False
            return
        times = self._seconds.setdefault(self.size, [])
        times.append(seconds)
        if len(times) < TRIALS:
            return
        best = {size: min(times) for size, times in self._seconds.items()}
        doubled = 2 * self.size
        faster = best[self.size] <= WORTH * best.get(self.size // 2, float("inf"))
        fits = doubled * self._bytes_per_image < self._limit(device) and doubled <= self._largest
        if faster and fits:
            self.size = doubled
        else:
            self.size, self.growing = min(best, key=best.__getitem__), False


class Groups:
    """Group sizes of several kinds of work, each learnt apart: they differ in memory per image.

    Args:
        wish: as for `GroupSize`.
        processes: as for `GroupSize`.
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
    """Return a `GroupSize` as it is, and make one of a wish; ``kind``: its further arguments."""
    return wish if isinstance(wish, GroupSize) else GroupSize(wish, **kind)


def in_groups(
    work: Callable[[slice], T], count: int, device: torch.device, sizes: GroupSize
) -> Iterator[T]:
    """Yield ``work``'s result for every group of images.

    Args:
        work: called with the positions of a group's images; again with fewer if memory ran out.
        count: number of all images.
        device: where the work is done.
        sizes: sizes of the groups.
    """
    done = 0
    while done < count:
        results = []  # stays empty if memory runs out
        with sizes.open(count - done, device) as group:
            results.append(work(slice(done, done + group.size)))
        if results:
            done += group.size
            yield results.pop()


def through(
    work: Callable[[Tensor], T], batches: Iterable[Tensor], sizes: GroupSize
) -> Iterator[T]:
    """Yield ``work``'s result for every group of images of every batch ``(N, …)``."""
    for images in batches:

        def work_on(part: slice, images: Tensor = images) -> T:
            return work(images[part])

        yield from in_groups(work_on, len(images), images.device, sizes)


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; PyTorch's CPU allocator and some GPU libraries say so in words."""
    phrases = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        phrase in str(error) for phrase in phrases
    )
