"""One model and one method over all shifts, image by image or along streams: the table of predictions with and without."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from tttlab.adaptation.inner_loop import InnerLoop
from tttlab.adaptation.method import Method
from tttlab.adaptation.normalisation import Normalisation
from tttlab.adaptation.online import check_batch
from tttlab.data.image_sets import ImageSet
from tttlab.data.views import Augmentation
from tttlab.errors import UserError
from tttlab.experiments.blocks import Block, Job, list_blocks, list_jobs
from tttlab.experiments.jobs import adapt_to_job
from tttlab.experiments.rows import predictions
from tttlab.networks.source_statistics import Statistics, kinds
from tttlab.runtime.group_size import Groups, Wish
from tttlab.runtime.parallel import in_order
from tttlab.runtime.resuming import Work
from tttlab.shifts.shift import Shift
from tttlab.shifts.streams import Stream


def adapt_to_shifts(
    network: nn.Module,
    method: Method,
    loop: InnerLoop,
    images: ImageSet,
    shifts: Sequence[Shift],
    *,
    work: Work,
    prefix: str,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
    neighbours: int = 1,
    barrier: Callable[[], Any] = lambda: None,
    images_per_step: Wish = "auto",
    on_images: Callable[[int], Any] = lambda _count: None,
    rows: Callable[[Mapping[str, Tensor], Block, ImageSet], pd.DataFrame] | None = None,
    stream: Stream | None = None,
    **settings: Any,
) -> tuple[pd.DataFrame, np.ndarray] | None:
    """Adapt to every image of every shift and keep each finished block, so that a killed sweep goes on where it was.

    Labels are joined to the predictions afterwards and never reach the computation.

    Args:
        network: the source network.
        method: the test-time method.
        loop: the inner loop.
        images: the clean test images.
        shifts: what is done to them, or other images.
        work: where finished blocks are kept, the same for all ranks.
        prefix: of the names under which they are kept.
        workers: processes that share this rank's blocks; changes no result.
        rank: number of this process among those that share the sweep; every ``ranks``-th block is its own.
        ranks: how many they are; changes no result, nor need it be the number that a killed sweep had.
        neighbours: those of the ranks that are on this machine and share its memory.
        barrier: returns when all ranks have called it.
        images_per_step: images worked on at once, a machine setting; what ``auto`` finds in one block serves the next.
        on_images: called with the number of this rank's images done.
        rows: makes the table of one block; None: `predictions`.
        stream: how the images of a shift arrive; None: each is adapted to on its own.
        settings: further arguments of `adapt_to_block`.

    Returns:
        a table, by default with a row per (shift, image), and the mean loss over shifted images before every step and, but
        for streams, after the last ``(steps + 1,)``; None on all ranks but the first.

    Raises:
        UserError: after all ranks are done, a block is missing.
    """
    blocks = list_blocks(shifts, images, stream)
    # Labels that an order needs, and batches that are too small, are missed before any work.
    for visit in (visit for route in stream.routes(shifts) for visit in route) if stream else ():
        labels = [np.asarray(shift.of(images).labels) for shift in visit.shifts]
        for batch in stream.batches(visit, labels, 0):
            check_batch(method, len(batch))
    # Its own whatever is done already: ranks that divided what is left might see different things left.
    own = list_jobs(blocks, stream)[rank::ranks]
    missing = [
        job for job in own if not all(work.has(f"{prefix}-{block.name}") for block in job.blocks)
    ]
    on_images(sum(job.size for job in own) - sum(job.size for job in missing))

    groups = Groups(images_per_step, max(workers, 1) * neighbours)

    def compute(job: Job) -> int:
        found = adapt_to_job(network, method, loop, images, job, stream, groups, **settings)
        for block in job.blocks:
            work.save(f"{prefix}-{block.name}", found[block.shift])
        return job.size

    for done in in_order(compute, missing, workers, lambda job: f"{prefix}, {job.title}"):
        on_images(done)
    barrier()
    return None if rank else collect(work, prefix, blocks, images, rows or predictions)


def collect(
    work: Work,
    prefix: str,
    blocks: Sequence[Block],
    images: ImageSet,
    rows: Callable[[Mapping[str, Tensor], Block, ImageSet], pd.DataFrame],
) -> tuple[pd.DataFrame, np.ndarray]:
    """Put finished blocks together; see `adapt_to_shifts`."""
    tables, curves = [], []
    for block in blocks:
        if (result := work.load(f"{prefix}-{block.name}")) is None:
            raise UserError(
                f"expected the results of {prefix}-{block.name} in {work.folder}, found none after all processes "
                "were done; use a file system that all machines share"
            )
        tables.append(rows(result, block, images))
        if not block.shift.clean:
            curves.append(result["losses"])
    losses = torch.cat(curves).nanmean(0).numpy() if curves else np.empty(0)
    return pd.concat(tables, ignore_index=True), losses


def complete(
    statistics: Statistics,
    method: Method,
    network: nn.Module,
    batches: Callable[[], Iterable[torch.Tensor]],
) -> Statistics:
    """Add what a method needs and must measure itself.

    Args:
        statistics: the standard source statistics.
        method: the method.
        network: the source network.
        batches: opens the source images ``(N, 3, H, W)``; called only if something is missing.
    """
    missing = set(method.needs) - kinds(statistics)
    return statistics | (method.source_statistics(network, batches()) if missing else {})


def inner_loop(settings: Mapping[str, Any], augmentation: Augmentation) -> InnerLoop:
    """Build the inner loop from the adapter's settings as params.yaml has them, flat, and the views to average over."""
    policy = Normalisation(settings["normalisation"], settings["prior"], settings["threshold"])
    own = {
        field.name: settings[field.name] for field in fields(InnerLoop) if field.name in settings
    }
    return InnerLoop(**own | {"normalisation": policy, "augmentation": augmentation})
