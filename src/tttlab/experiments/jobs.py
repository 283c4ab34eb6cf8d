"""One job: adapt to the images of a block, each on its own, or along a stream."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tttlab.adaptation import signals
from tttlab.adaptation.adapter import Adaptation, adapt
from tttlab.adaptation.gate import Gate
from tttlab.adaptation.online import joined, learning
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import InnerLoop
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.experiments.blocks import Block, Job
from tttlab.runtime.group_size import FORWARD_LARGEST, Groups
from tttlab.shifts.shift import Shift
from tttlab.shifts.streams import Stream, Visit


@dataclass(frozen=True)
class Experiment:
    """What is done to every image under every shift.

    Attributes:
        task: what the images are adapted by.
        images: the clean test images.
        stream: how images arrive; None: each is adapted to on its own.
        gate: judges each image. Images that it rejects are adapted to as well, so that results
            with and without a gate can be compared.
        record: R numbers of steps after which to predict too; on streams 0 and ``loop.steps``.
    """

    task: Task
    images: ImageSet
    stream: Stream | None = None
    gate: Gate | None = None
    record: Sequence[int] = (0,)


@dataclass(frozen=True)
class Known:
    """What one process has found out in earlier jobs and need not find out again.

    Attributes:
        distances: by network, images and block: ``(n,)`` to the source, the same for every run.
        checked: the tasks whose network, method and settings fit each other.
    """

    distances: dict[tuple[int, int, Block], Tensor] = field(default_factory=dict)
    checked: set[int] = field(default_factory=set)


def adapt_to_job(
    experiment: Experiment,
    job: Job,
    groups: Groups,
    device: str | torch.device = "cpu",
    known: Known | None = None,
) -> dict[Shift, dict[str, Tensor]]:
    """Compute one job: a block, or all blocks of one stream.

    Args:
        experiment: what is done to every image.
        job: the images.
        groups: how many images at once.
        device: where to compute.
        known: from earlier jobs of this process; what is found out is added.

    Returns:
        for every shift of the job the result of `adapt_to_blocks`, in the order of the images.
    """
    if job.route:
        return adapt_along(experiment, job.route, groups, device)
    return adapt_to_blocks(experiment, job.blocks, groups, device, known)


def adapt_to_blocks(
    experiment: Experiment,
    blocks: Sequence[Block],
    groups: Groups,
    device: str | torch.device,
    known: Known | None = None,
) -> dict[Shift, dict[str, Tensor]]:
    """Adapt to the images of blocks under different shifts, each on its own.

    Returns:
        for every shift the parts of an `Adaptation` that are saved; logits of a thousand classes
        would fill a disk. Per image, of n: the class and confidence with and without adaptation;
        ``losses (n, steps + 1)``, ``fell_back``, ``milliseconds``; ``predictions_at (n, R)`` and
        ``milliseconds_at (n, R)``; the ``distance`` to the source, the gate's judgement and its
        cost.
    """
    task, known = experiment.task, known or Known()
    sets = [block.shift.of(experiment.images).take(block.images) for block in blocks]
    names = [name for images in sets for name in images.image_ids]
    pixels = [
        block.shift.apply(images, task.seed) for block, images in zip(blocks, sets, strict=True)
    ]
    pixels = as_images(torch.from_numpy(np.concatenate(pixels))).to(device)
    result = adapt(
        task.network,
        pixels,
        task.method,
        task.loop,
        statistics=task.statistics,
        image_ids=names,
        seed=task.seed,
        record=experiment.record,
        images_per_step=groups.of("adapt", *kind(task)),
        checked=id(task) in known.checked,
    )
    known.checked.add(id(task))
    keys = [(id(task.network), id(experiment.images), block) for block in blocks]
    measured = [known.distances[key] for key in keys if key in known.distances]
    distance = torch.cat(measured) if len(measured) == len(keys) else None
    judged = judge(experiment.gate, task, pixels, names, groups, distance=distance)
    found = judged["distance"].split([len(images) for images in sets])
    known.distances.update(zip(keys, found, strict=True))
    whole, results, start = summary(result) | judged, {}, 0
    for block, images in zip(blocks, sets, strict=True):
        part = slice(start, start + len(images))
        # Cloned, for a saved part of a tensor takes all of it along.
        results[block.shift] = {name: values[part].clone() for name, values in whole.items()}
        start = part.stop
    return results


def kind(task: Task) -> tuple[str, InnerLoop]:
    """Give what the memory per image depends on: everything but the learning rate."""
    return repr(task.method), replace(task.loop, lr=0.0)


def adapt_along(
    experiment: Experiment, route: Sequence[Visit], groups: Groups, device: str | torch.device
) -> dict[Shift, dict[str, Tensor]]:
    """Adapt along one stream, starting at the source weights; see `adapt_to_job`.

    The stream's batch size says how many images are adapted to at once: it is part of the method.
    """
    task, stream = experiment.task, experiment.stream
    parts: dict[Shift, list[Arrived]] = {shift: [] for visit in route for shift in visit.shifts}
    with ExitStack() as stack:
        learner = None
        for visit in route:
            sets = [shift.seen(experiment.images, task.seed) for shift in visit.shifts]
            labels = [np.asarray(images.labels) for images in sets]
            for positions in stream.batches(visit, labels, task.seed):
                batch = as_images(torch.from_numpy(load_pixels(sets, positions))).to(device)
                names = [sets[number].image_ids[position] for number, position in positions]
                if learner is None:
                    learner = stack.enter_context(learning(task, batch, experiment.record))
                result = learner.adapt(batch, names)
                judgement = judge(experiment.gate, task, batch, names, groups)
                for number in np.unique(positions[:, 0]):
                    under = positions[:, 0] == number
                    part = Adaptation(*(values[under] for values in result))
                    judged = {name: values[under] for name, values in judgement.items()}
                    arrived = Arrived(positions[under, 1], part, judged)
                    parts[visit.shifts[number]].append(arrived)
    return {shift: in_order_of_images(arrived) for shift, arrived in parts.items()}


class Arrived(NamedTuple):
    """The images of one batch that came under one shift.

    Attributes:
        positions: ``(n,)`` in the shift's set.
        adaptation: of these images.
        judged: their part of the result of `judge`.
    """

    positions: np.ndarray
    adaptation: Adaptation
    judged: dict[str, Tensor]


def load_pixels(sets: Sequence[ImageSet], positions: np.ndarray) -> np.ndarray:
    """Load the images of a batch ``(n, S, S, 3)``.

    Args:
        sets: the images under each shift.
        positions: ``(n, 2)``, the number of a set and a position in it.
    """
    pixels = np.empty((len(positions), *sets[0].pixels.shape[1:]), np.uint8)
    for number in np.unique(positions[:, 0]):
        under = positions[:, 0] == number
        pixels[under] = sets[number].pixels[positions[under, 1]]
    return pixels


def in_order_of_images(parts: Sequence[Arrived]) -> dict[str, Tensor]:
    """Put the results of all batches into the order of the images; see `adapt_to_blocks`."""
    order = np.argsort(np.concatenate([part.positions for part in parts]))
    whole = joined([part.adaptation for part in parts])
    adaptation = Adaptation(*(values[order] for values in whole))
    judged = {
        name: torch.cat([part.judged[name] for part in parts])[order] for name in parts[0].judged
    }
    return summary(adaptation, stream=True) | judged


def summary(result: Adaptation, stream: bool = False) -> dict[str, Tensor]:
    """Reduce an `Adaptation` to the parts that are saved; see `adapt_to_blocks`.

    Along a stream the loss after the last step is unknown.
    """
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
    gate: Gate | None,
    task: Task,
    images: Tensor,
    image_ids: Sequence[str],
    groups: Groups,
    *,
    distance: Tensor | None = None,
) -> dict[str, Tensor]:
    """Measure every image's distance to the source unless it is known; ask the gate and time it."""

    def ask(signal: signals.Signal) -> tuple[Tensor, float]:
        key = kind(task) if signal == "loss" else ()
        sizes = groups.of(signal, *key, largest=FORWARD_LARGEST, timed=False)
        start = time.perf_counter()
        values = signals.measure_signal(signal, task, images, image_ids, sizes)[1].cpu()
        return values, (time.perf_counter() - start) * 1e3 / len(images)

    milliseconds = 0.0
    if distance is None or (gate and gate.signal == "distance"):
        distance, milliseconds = ask("distance")
    if gate is None:
        return {
            "distance": distance,
            "gate_open": torch.ones(len(images), dtype=torch.bool),
            "gate_milliseconds": torch.zeros(len(images)),
        }
    values = distance
    if gate.signal != "distance":
        values, milliseconds = ask(gate.signal)
    return {
        "distance": distance,
        "gate_open": gate.opens(values),
        "gate_milliseconds": torch.full((len(images),), milliseconds),
    }


def confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Give the largest class probability and its class for ``logits (N, K)``, each ``(N,)``."""
    return tuple(logits.softmax(-1).max(-1))
