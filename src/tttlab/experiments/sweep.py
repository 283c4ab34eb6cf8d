"""One model and one method over all shifts, image by image or along streams: the table of predictions with and without."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from tttlab.adaptation import signals
from tttlab.adaptation.adapter import Adaptation, adapt
from tttlab.adaptation.gate import Gate
from tttlab.adaptation.inner_loop import InnerLoop
from tttlab.adaptation.method import Method
from tttlab.adaptation.normalisation import Normalisation
from tttlab.adaptation.online import check_batch, joined, learning
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.data.views import Augmentation
from tttlab.errors import UserError
from tttlab.networks.source_statistics import Statistics, kinds
from tttlab.runtime.group_size import Groups, Wish
from tttlab.runtime.parallel import in_order
from tttlab.runtime.resuming import Work
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


def list_blocks(shifts: Sequence[Shift], test: ImageSet, stream: Stream | None = None) -> list[Block]:
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
    return [Job(tuple(own[shift] for shift in dict.fromkeys(shift for visit in route for shift in visit.shifts)), route)
            for route in stream.routes(list(own))]  # fmt: skip


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
    missing = [job for job in own if not all(work.has(f"{prefix}-{block.name}") for block in job.blocks)]
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


def adapt_to_job(
    network: nn.Module,
    method: Method,
    loop: InnerLoop,
    images: ImageSet,
    job: Job,
    stream: Stream | None,
    groups: Groups,
    **settings: Any,
) -> dict[Shift, dict[str, Tensor]]:
    """Compute what belongs together; see `adapt_to_block` and `adapt_along`."""
    if job.route:
        return adapt_along(network, method, loop, images, job.route, stream, groups=groups, **settings)
    (block,) = job.blocks
    result = adapt_to_block(network, method, loop, images, block, groups=groups, **settings)
    return {block.shift: result}


def adapt_to_block(
    network: nn.Module,
    method: Method,
    loop: InnerLoop,
    images: ImageSet,
    block: Block,
    *,
    statistics: Statistics,
    seed: int,
    gate: Gate | None = None,
    record: Sequence[int] = (0,),
    groups: Groups,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Adapt to the images of one block, each on its own.

    Args:
        network: the source network.
        method: the test-time method.
        loop: the inner loop.
        images: the clean test images, all of them.
        block: which of them, and what is done to them.
        statistics: source statistics.
        seed: of all random streams.
        gate: judges each image; all are adapted to all the same, so that with and without a gate can be compared.
        record: R numbers of steps after which to predict too.
        groups: how many images at once.
        device: where to compute.

    Returns:
        what is worth keeping of an `Adaptation` of n images: per image its class and confidence with and without, and
        ``losses (n, steps + 1)``, ``fell_back``, ``milliseconds``; ``predictions_at (n, R)`` and ``milliseconds_at (n, R)``;
        the image's ``distance`` to the source, the gate's judgement and its cost. Logits of a thousand classes would fill a
        disk.
    """
    own = block.shift.of(images).take(block.images)
    pixels = as_images(torch.from_numpy(block.shift.apply(own, seed))).to(device)
    result = adapt(network, pixels, method, loop, statistics=statistics, image_ids=own.image_ids, seed=seed, record=record,
                   images_per_step=groups.of("adapt", *kind(method, loop)))  # fmt: skip
    judged = judge(gate, network, pixels, method, loop, groups, statistics=statistics, image_ids=own.image_ids, seed=seed)
    return summary(result) | judged


def kind(method: Method, loop: InnerLoop) -> tuple[str, InnerLoop]:
    """Say what the memory of an image depends on: everything but the learning rate."""
    return repr(method), replace(loop, lr=0.0)


def adapt_along(
    network: nn.Module,
    method: Method,
    loop: InnerLoop,
    images: ImageSet,
    route: Sequence[Visit],
    stream: Stream,
    *,
    statistics: Statistics,
    seed: int,
    gate: Gate | None = None,
    record: Sequence[int] = (0,),
    groups: Groups,
    device: str | torch.device = "cpu",
) -> dict[Shift, dict[str, Tensor]]:
    """Adapt along one stream, from the source weights on.

    Args:
        network: the source network.
        method: the test-time method.
        loop: the inner loop.
        images: the clean test images.
        route: the visits of the stream.
        stream: how images arrive; its batch size, a scientific setting, says how many are adapted to at once.
        statistics: source statistics.
        seed: of all random streams.
        gate: judges each image, as in `adapt_to_block`.
        record: of 0 and ``loop.steps``, those to predict after too.
        groups: how many images at once, where that is not the batch.
        device: where to compute.

    Returns:
        for every shift on the way what `adapt_to_block` gives, in the order of the images.
    """
    parts: dict[Shift, list[Arrived]] = {shift: [] for visit in route for shift in visit.shifts}
    with ExitStack() as stack:
        learner = None
        for visit in route:
            sets = [shift.seen(images, seed) for shift in visit.shifts]
            for places in stream.batches(visit, [np.asarray(own.labels) for own in sets], seed):
                batch = as_images(torch.from_numpy(look(sets, places))).to(device)
                names = [sets[number].image_ids[place] for number, place in places]
                if learner is None:
                    learner = stack.enter_context(learning(network, batch, method, loop, statistics, seed, record))
                found = learner.adapt(batch, names)
                judged = judge(gate, network, batch, method, loop, groups, statistics=statistics, image_ids=names, seed=seed)
                for number in np.unique(places[:, 0]):
                    mine = places[:, 0] == number
                    own = Adaptation(*(values[mine] for values in found))
                    parts[visit.shifts[number]].append(
                        Arrived(places[mine, 1], own, {name: value[mine] for name, value in judged.items()})
                    )
    return {shift: in_order_of_images(own) for shift, own in parts.items()}


class Arrived(NamedTuple):
    """Of those images of one batch that came under one shift: their places in its set, what became of them, the judgement."""

    places: np.ndarray
    adaptation: Adaptation
    judged: dict[str, Tensor]


def look(sets: Sequence[ImageSet], places: np.ndarray) -> np.ndarray:
    """Look at the images of a batch, whose ``places (n, 2)`` are the number of a set and a place in it: ``(n, S, S, 3)``."""
    pixels = np.empty((len(places), *sets[0].pixels.shape[1:]), np.uint8)
    for number in np.unique(places[:, 0]):
        mine = places[:, 0] == number
        pixels[mine] = sets[number].pixels[places[mine, 1]]
    return pixels


def in_order_of_images(parts: Sequence[Arrived]) -> dict[str, Tensor]:
    """Put what came batch by batch into the order of the images, as `adapt_to_block` gives it."""
    back = np.argsort(np.concatenate([part.places for part in parts]))
    found = Adaptation(*(values[back] for values in joined([part.adaptation for part in parts])))
    judged = {name: torch.cat([part.judged[name] for part in parts])[back] for name in parts[0].judged}
    return summary(found, stream=True) | judged


def summary(result: Adaptation, stream: bool = False) -> dict[str, Tensor]:
    """Keep of an `Adaptation` what is worth it; see `adapt_to_block`. Along a stream no loss after the last step is known."""
    last = result.losses[:, -1]
    source_confidence, source_prediction = confidence(result.source_logits)
    adapted_confidence, adapted_prediction = confidence(result.logits)
    return {
        "source_prediction": source_prediction,
        "adapted_prediction": adapted_prediction,
        "source_confidence": source_confidence,
        "adapted_confidence": adapted_confidence,
        "losses": result.losses,
        "loss_last": torch.full_like(last, torch.nan) if stream else last,
        "fell_back": result.fell_back,
        "milliseconds": result.milliseconds,
        "predictions_at": result.logits_at.argmax(-1),
        "milliseconds_at": result.milliseconds_at,
    }


def judge(
    gate: Gate | None, network: nn.Module, images: Tensor, method: Method, loop: InnerLoop, groups: Groups, **settings: Any
) -> dict[str, Tensor]:
    """Measure every image's distance to the source and ask the gate, on the clock; arguments as for `signals.measure`."""

    def ask(signal: signals.Signal) -> tuple[Tensor, float]:
        sizes = groups.of(signal, *(kind(method, loop) if signal == "loss" else ()), largest=signals.LARGEST, timed=False)
        began = time.perf_counter()
        values = signals.measure(signal, network, images, method, loop, images_per_step=sizes, **settings)[1].cpu()
        return values, (time.perf_counter() - began) * 1e3 / len(images)

    distance, spent = ask("distance")
    if gate is None:
        return {"distance": distance, "gate_open": torch.ones(len(images), dtype=torch.bool),
                "gate_milliseconds": torch.zeros(len(images))}  # fmt: skip
    values, spent = (distance, spent) if gate.signal == "distance" else ask(gate.signal)
    return {"distance": distance, "gate_open": gate.opens(values), "gate_milliseconds": torch.full((len(images),), spent)}


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
            raise UserError(f"expected the results of {prefix}-{block.name} in {work.folder}, found none after all processes "
                            "were done; use a file system that all machines share")  # fmt: skip
        tables.append(rows(result, block, images))
        if not block.shift.clean:
            curves.append(result["losses"])
    losses = torch.cat(curves).nanmean(0).numpy() if curves else np.empty(0)
    return pd.concat(tables, ignore_index=True), losses


def complete(
    statistics: Statistics, method: Method, network: nn.Module, batches: Callable[[], Iterable[torch.Tensor]]
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
    own = {field.name: settings[field.name] for field in fields(InnerLoop) if field.name in settings}
    return InnerLoop(**own | {"normalisation": policy, "augmentation": augmentation})


def predictions(result: Mapping[str, Tensor], block: Block, images: ImageSet) -> pd.DataFrame:
    """Put one block's results next to the labels (−1: unknown), one row per image."""
    columns: dict[str, Any] = {
        **identity(block, images),
        "source_prediction": result["source_prediction"].numpy(),
        "untrained_prediction": result["predictions_at"][:, 0].numpy(),
        **{name: result[name].numpy() for name in ("adapted_prediction", "source_confidence", "adapted_confidence")},
        "loss_first": result["losses"][:, 0].numpy(),
        "loss_last": result["loss_last"].numpy(),
        **{name: result[name].numpy() for name in ("distance", "gate_open", "fell_back", "milliseconds", "gate_milliseconds")},
    }
    return pd.DataFrame(columns)


def steps_rows(steps: Sequence[int]) -> Callable[[Mapping[str, Tensor], Block, ImageSet], pd.DataFrame]:
    """Make a table of one block's results along the recorded steps: one row per (image, step)."""

    def rows(result: Mapping[str, Tensor], block: Block, images: ImageSet) -> pd.DataFrame:
        tables = [
            pd.DataFrame({
                **identity(block, images),
                "step": step,
                "source_prediction": result["source_prediction"].numpy(),
                "prediction": result["predictions_at"][:, place].numpy(),
                "loss": result["losses"][:, min(step, result["losses"].shape[1] - 1)].numpy(),
                "milliseconds": result["milliseconds_at"][:, place].numpy(),
            })
            for place, step in enumerate(steps)
        ]  # fmt: skip
        return pd.concat(tables, ignore_index=True)

    return rows


def identity(block: Block, images: ImageSet) -> dict[str, Any]:
    """Name the images of a block, the shift, and the labels, which are joined here and were not seen before."""
    own = block.shift.of(images)
    return {
        "image_id": [own.image_ids[index] for index in block.images],
        "shift": block.shift.name,
        "corruption": block.shift.corruption,
        "severity": block.shift.severity,
        "label": np.asarray(own.labels)[block.images],
    }


def confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Give the largest class probability and its class for ``logits (N, K)``, each ``(N,)``."""
    return tuple(logits.softmax(-1).max(-1))
