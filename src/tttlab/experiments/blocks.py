"""How the images of all shifts are divided into pieces, and which of them must be computed together."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import quote

from tttlab.data.image_sets import ImageSet
from tttlab.shifts.shift import Shift
from tttlab.shifts.streams import Stream, Visit

_NAME_LIMIT = 120  # characters of a shift in the name of a file
BLOCK = 256  # images; a number that never changes, so that no machine setting changes a result


class Block(NamedTuple):
    """Some consecutive images under one shift: what is computed, and kept, as one piece."""

    shift: Shift
    number: int
    images: range

    @property
    def name(self) -> str:
        """For example ``fog-3-0``; fit to name a file, which may have 255 bytes."""
        name = quote(self.shift.name, safe=" ")
        if len(name) > _NAME_LIMIT:
            name = f"{name[:_NAME_LIMIT]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        return f"{name}-{self.number}"


def list_blocks(
    shifts: Sequence[Shift], test: ImageSet, stream: Stream | None = None
) -> list[Block]:
    """Divide the images of every shift, by default the test images, into blocks, shift after shift; on streams one each."""
    counts = [len(shift.of(test)) for shift in shifts]
    return [
        Block(shift, number, range(start, min(start + size, count)))
        for shift, count in zip(shifts, counts, strict=True)
        for size in [max(count, 1) if stream else BLOCK]
        for number, start in enumerate(range(0, count, size))
    ]


class Job(NamedTuple):
    """Blocks that are computed in one piece, and the way of the stream that leads through them; None: there is no stream."""

    blocks: tuple[Block, ...]
    route: tuple[Visit, ...] | None

    @property
    def size(self) -> int:
        """Count the images."""
        return sum(len(block.images) for block in self.blocks)

    @property
    def title(self) -> str:
        """Say which images these are."""
        first, last = self.blocks[0], self.blocks[-1]
        if first is last:
            return f"{first.shift.name}, images {first.images.start} to {first.images.stop - 1}"
        return f"a stream from {first.shift.name} to {last.shift.name}"


def list_jobs(blocks: Sequence[Block], stream: Stream | None) -> list[Job]:
    """Say what must be computed together: every block alone, or all that one stream leads through."""
    if stream is None:
        return [Job((block,), None) for block in blocks]
    own = {block.shift: block for block in blocks}
    return [
        Job(
            tuple(
                own[shift]
                for shift in dict.fromkeys(shift for visit in route for shift in visit.shifts)
            ),
            route,
        )
        for route in stream.routes(list(own))
    ]
