"""Methods on networks over all shifts: predictions with and without adaptation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tttlab.adaptation.online import check_batch
from tttlab.data.image_sets import ImageSet
from tttlab.errors import UserError
from tttlab.experiments.blocks import Block, Job, list_blocks, list_jobs
from tttlab.experiments.jobs import Experiment, Known, adapt_to_job
from tttlab.experiments.rows import predictions
from tttlab.runtime.machine import Machine
from tttlab.runtime.parallel import working
from tttlab.runtime.resuming import Work
from tttlab.shifts.corruptions.canvas import import_transforms
from tttlab.shifts.shift import Shift

if TYPE_CHECKING:
    import pandas as pd

Rows = Callable[[Mapping[str, Tensor], Block, ImageSet], "pd.DataFrame"]


@dataclass(frozen=True)
class Sweep:
    """An experiment under several shifts; interrupted work continues after its finished blocks.

    Labels are joined to the predictions afterwards and never reach the computation.

    Attributes:
        experiment: what is done to every image.
        shifts: under which the images are seen.
        work: where finished blocks are kept, the same for all ranks.
        prefix: of the names under which they are kept.
        rows: makes the table of one block.
    """

    experiment: Experiment
    shifts: Sequence[Shift]
    work: Work
    prefix: str
    rows: Rows = predictions

    def blocks(self) -> list[Block]:
        """Divide the images of all shifts into blocks."""
        return list_blocks(self.shifts, self.experiment.images, self.experiment.stream)

    def name(self, block: Block) -> str:
        """Name the results of a block."""
        return f"{self.prefix}-{block.name}"

    def lacks(self, job: Job) -> bool:
        """Tell whether a job is still to be done."""
        return not all(self.work.has(self.name(block)) for block in job.blocks)


class Result(NamedTuple):
    """What a sweep has found.

    Attributes:
        table: by default a row per (shift, image).
        losses: mean over shifted images before every step and after the last ``(steps + 1,)``, on
            streams without the last.
    """

    table: "pd.DataFrame"
    losses: np.ndarray


def adapt_to_shifts(
    sweep: Sweep,
    machine: Machine = Machine(),
    on_images: Callable[[int], Any] = lambda _count: None,
) -> Result | None:
    """Adapt to every image of every shift; see `adapting`."""
    with adapting([sweep], machine) as finish:
        return finish(on_images)


@contextmanager
def adapting(
    sweeps: Sequence[Sweep], machine: Machine = Machine()
) -> Iterator[Callable[[Callable[[int], Any]], Result | None]]:
    """Carry out several sweeps; on a CPU the next one begins while the last is looked at.

    Args:
        sweeps: in this order.
        machine: where to compute; every rank takes one of ``machine.ranks`` shares of each sweep.

    Yields:
        a function that waits for the next sweep. It calls its argument with the numbers of this
        rank's images as they are done, and returns the result; None on all ranks but the first.

    Raises:
        UserError: a batch of a stream is too small, or a block is missing after all ranks are done.
    """
    shares, missing = [], []
    for sweep in sweeps:
        if sweep.experiment.stream:
            check_batches(sweep.experiment, sweep.shifts)
        # Every rank takes its share of all jobs, finished or not: ranks that start a moment apart
        # must agree on who does what.
        jobs = list_jobs(sweep.blocks(), sweep.experiment.stream)[machine.rank :: machine.ranks]
        shares.append(sum(job.size for job in jobs))
        missing.append([job for job in jobs if sweep.lacks(job)])
    # What is learnt of the images' memory and time serves all sweeps on the same network.
    groups = {id(sweep.experiment.task.network): machine.groups() for sweep in sweeps}

    known = Known()  # every worker has its own

    def compute(item: tuple[Sweep, Job]) -> int:
        (sweep, job), experiment = item, item[0].experiment
        sizes = groups[id(experiment.task.network)]
        results = adapt_to_job(experiment, job, sizes, machine.device, known)
        for block in job.blocks:
            sweep.work.save(sweep.name(block), results[block.shift])
        return job.size

    if any(shift.synthetic for sweep in sweeps for shift in sweep.shifts):
        import_transforms()  # else every worker would
    items = [(sweep, job) for sweep, jobs in zip(sweeps, missing, strict=True) for job in jobs]
    waiting = iter(zip(sweeps, shares, missing, strict=True))

    def title(item: tuple[Sweep, Job]) -> str:
        return f"{item[0].prefix}, {item[1].title}"

    with working(compute, items, machine.workers, title) as counts:

        def finish(on_images: Callable[[int], Any]) -> Result | None:
            sweep, share, jobs = next(waiting)
            on_images(share - sum(job.size for job in jobs))
            for count in islice(counts, len(jobs)):
                on_images(count)
            machine.barrier()
            return None if machine.rank else collect(sweep)

        yield finish


def check_batches(experiment: Experiment, shifts: Sequence[Shift]) -> None:
    """Check that the labels that a stream's order needs are known and no batch is too small.

    Raises:
        UserError: a label is unknown, or a batch is too small for the method.
    """
    stream = experiment.stream
    for route in stream.routes(shifts):
        for visit in route:
            labels = [np.asarray(shift.of(experiment.images).labels) for shift in visit.shifts]
            for batch in stream.batches(visit, labels, 0):
                check_batch(experiment.task.method, len(batch))


def mean_of_finite(losses: Tensor) -> Tensor:
    """Average losses ``(N, S + 1)`` over the images on which they stayed numbers: ``(S + 1,)``."""
    return losses[losses.isfinite().all(1)].mean(0)


def collect(sweep: Sweep) -> Result:
    """Put the finished blocks of a sweep together.

    Raises:
        UserError: one is missing.
    """
    import pandas as pd  # while workers are at the next sweep

    tables, losses = [], []
    for block in sweep.blocks():
        if (result := sweep.work.load(sweep.name(block))) is None:
            raise UserError(
                f"expected the results of {sweep.name(block)} in {sweep.work.folder}, found none "
                "after all processes were done; use a file system that all machines share"
            )
        tables.append(sweep.rows(result, block, sweep.experiment.images))
        if not block.shift.clean:
            losses.append(result["losses"])
    mean_losses = mean_of_finite(torch.cat(losses)).numpy() if losses else np.empty(0)
    return Result(pd.concat(tables, ignore_index=True), mean_losses)
