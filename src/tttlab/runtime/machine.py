"""What does the work: device, processes, images at once. None of it changes a result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tttlab.runtime.group_size import Groups, Wish


@dataclass(frozen=True)
class Machine:
    """What does one rank's share of the work.

    Attributes:
        device: where to compute.
        workers: processes that share this rank's work on a CPU.
        images_per_step: images worked on at once; what ``auto`` finds in one block serves the next.
        rank: number of this process among those that share the work.
        ranks: how many they are; killed work may go on with another number of them.
        neighbours: those of the ranks that are on this machine and share its memory.
        barrier: returns when all ranks have called it.
    """

    device: str | torch.device = "cpu"
    workers: int = 0
    images_per_step: Wish = "auto"
    rank: int = 0
    ranks: int = 1
    neighbours: int = 1
    barrier: Callable[[], Any] = lambda: None

    def groups(self) -> Groups:
        """Begin to learn how many images to work on at once in each of the processes here."""
        return Groups(self.images_per_step, max(self.workers, 1) * self.neighbours)
