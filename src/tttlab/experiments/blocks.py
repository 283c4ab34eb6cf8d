"""Division of the images of all shifts into blocks, and which blocks are computed together."""

from collections.abc import Sequence
from typing import NamedTuple

from tttlab.data.image_sets import ImageSet
from tttlab.shifts.shift import CUT, Shift
from tttlab.shifts.streams import Stream, Visit

BLOCK = 256  # images; constant, so that no machine setting changes a result
TOGETHER = 64  # images; smaller blocks are adapted to together, which takes less time per image


class Block(NamedTuple):
    """Consecutive images under one shift, which are computed and saved as one piece."""

    shift: Shift
    number: int
    images: range

    @property
    def name(self) -> str:
        """For example ``fog-3-0``; fits a file name, in which more stands around it."""
        return f"{self.shift.file_name(CUT)}-{self.number}"


def list_blocks(
    shifts: Sequence[Shift], test: ImageSet, stream: Stream | None = None
) -> list[Block]:
    """Divide the images of every shift into blocks, shift after shift.

    A shift without images of its own shows those of ``test``. On streams a shift is one block.
    """
    blocks = []
    for shift in shifts:
        count = len(shift.of(test))
        size = max(count, 1) if stream else BLOCK
        for number, start in enumerate(range(0, count, size)):
            blocks.append(Block(shift, number, range(start, min(start + size, count))))
    return blocks


class Job(NamedTuple):
    """Blocks that are computed together, and the route of the stream through them, if any."""

    blocks: tuple[Block, ...]
    route: tuple[Visit, ...] | None

    @property
    def size(self) -> int:
        """Count the images."""
        return sum(len(block.images) for block in self.blocks)

    @property
    def title(self) -> str:
        """Name the images for messages."""
        first, last = self.blocks[0], self.blocks[-1]
        if first is last:
            return f"{first.shift.name}, images {first.images.start} to {first.images.stop - 1}"
        return f"{'a stream from ' * bool(self.route)}{first.shift.name} to {last.shift.name}"


def list_jobs(blocks: Sequence[Block], stream: Stream | None) -> list[Job]:
    """Group the blocks by what is computed together: a few small ones, or all of one stream."""
    if stream is None:
        jobs = []
        for block in blocks:
            if jobs and jobs[-1].size + len(block.images) <= TOGETHER:
                jobs[-1] = Job((*jobs[-1].blocks, block), None)
            else:
                jobs.append(Job((block,), None))
        return jobs
    block_of = {block.shift: block for block in blocks}
    jobs = []
    for route in stream.routes(list(block_of)):
        shifts = dict.fromkeys(shift for visit in route for shift in visit.shifts)
        jobs.append(Job(tuple(block_of[shift] for shift in shifts), route))
    return jobs
