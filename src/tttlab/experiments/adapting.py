"""One method on one network over all shifts: predictions with and without adaptation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tttlab.adaptation.online import check_batch
from tttlab.data.image_sets import ImageSet
from tttlab.errors import UserError
from tttlab.experiments.blocks import Block, Job, list_blocks, list_jobs
from tttlab.experiments.jobs import Experiment, adapt_to_job
from tttlab.experiments.rows import predictions
from tttlab.runtime.machine import Machine
from tttlab.runtime.parallel import in_order
from tttlab.runtime.resuming import Work
from tttlab.shifts.shift import Shift

Rows = Callable[[Mapping[str, Tensor], Block, ImageSet], pd.DataFrame]


def adapt_to_shifts(
    experiment: Experiment,
    shifts: Sequence[Shift],
    *,
    work: Work,
    prefix: str,
    machine: Machine = Machine(),
    on_images: Callable[[int], Any] = lambda _count: None,
    rows: Rows = predictions,
) -> tuple[pd.DataFrame, np.ndarray] | None:
    """Adapt to every image of every shift; interrupted work continues after its finished blocks.

    Labels are joined to the predictions afterwards and never reach the computation.

    Args:
        experiment: what is done to every image.
        shifts: under which the images are seen.
        work: where finished blocks are kept, the same for all ranks.
        prefix: of the names under which they are kept.
        machine: where to compute; every rank takes one of ``machine.ranks`` shares.
        on_images: called with the number of this rank's images done.
        rows: makes the table of one block.

    Returns:
        a table, by default with a row per (shift, image), and the mean loss over shifted images
        before every step and after the last ``(steps + 1,)``, on streams without the last; None on
        all ranks but the first.

    Raises:
        UserError: a block is missing after all ranks are done.
    """
    images, stream = experiment.images, experiment.stream
    blocks = list_blocks(shifts, images, stream)
    if stream:
        check_batches(experiment, shifts)
    # Every rank takes its share of all jobs, finished or not: ranks that start a moment apart must
    # agree on who does what.
    share = list_jobs(blocks, stream)[machine.rank :: machine.ranks]
    missing = [
        job for job in share if not all(work.has(f"{prefix}-{block.name}") for block in job.blocks)
    ]
    on_images(sum(job.size for job in share) - sum(job.size for job in missing))
    groups = machine.groups()

    def compute(job: Job) -> int:
        results = adapt_to_job(experiment, job, groups, machine.device)
        for block in job.blocks:
            work.save(f"{prefix}-{block.name}", results[block.shift])
        return job.size

    for count in in_order(compute, missing, machine.workers, lambda job: f"{prefix}, {job.title}"):
        on_images(count)
    machine.barrier()
    return None if machine.rank else collect(work, prefix, blocks, images, rows)


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


def collect(
    work: Work, prefix: str, blocks: Sequence[Block], images: ImageSet, rows: Rows
) -> tuple[pd.DataFrame, np.ndarray]:
    """Put finished blocks together; see `adapt_to_shifts`."""
    tables, losses = [], []
    for block in blocks:
        if (result := work.load(f"{prefix}-{block.name}")) is None:
            raise UserError(
                f"expected the results of {prefix}-{block.name} in {work.folder}, found none "
                "after all processes were done; use a file system that all machines share"
            )
        tables.append(rows(result, block, images))
        if not block.shift.clean:
            losses.append(result["losses"])
    mean_losses = torch.cat(losses).nanmean(0).numpy() if losses else np.empty(0)
    return pd.concat(tables, ignore_index=True), mean_losses
