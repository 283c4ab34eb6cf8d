"""One piece of work: adapt to the images of a block, each on its own, or along a stream."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tttlab.adaptation import signals
from tttlab.adaptation.adapter import Adaptation, adapt
from tttlab.adaptation.gate import Gate
from tttlab.adaptation.inner_loop import InnerLoop
from tttlab.adaptation.method import Method
from tttlab.adaptation.online import joined, learning
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.experiments.blocks import Block, Job
from tttlab.networks.source_statistics import Statistics
from tttlab.runtime.group_size import Groups
from tttlab.shifts.shift import Shift
from tttlab.shifts.streams import Stream, Visit


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
        return adapt_along(
            network, method, loop, images, job.route, stream, groups=groups, **settings
        )
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
    result = adapt(
        network,
        pixels,
        method,
        loop,
        statistics=statistics,
        image_ids=own.image_ids,
        seed=seed,
        record=record,
        images_per_step=groups.of("adapt", *kind(method, loop)),
    )
    judged = judge(
        gate,
        network,
        pixels,
        method,
        loop,
        groups,
        statistics=statistics,
        image_ids=own.image_ids,
        seed=seed,
    )
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
                    learner = stack.enter_context(
                        learning(network, batch, method, loop, statistics, seed, record)
                    )
                found = learner.adapt(batch, names)
                judged = judge(
                    gate,
                    network,
                    batch,
                    method,
                    loop,
                    groups,
                    statistics=statistics,
                    image_ids=names,
                    seed=seed,
                )
                for number in np.unique(places[:, 0]):
                    mine = places[:, 0] == number
                    own = Adaptation(*(values[mine] for values in found))
                    parts[visit.shifts[number]].append(
                        Arrived(
                            places[mine, 1],
                            own,
                            {name: value[mine] for name, value in judged.items()},
                        )
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
    judged = {
        name: torch.cat([part.judged[name] for part in parts])[back] for name in parts[0].judged
    }
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
    gate: Gate | None,
    network: nn.Module,
    images: Tensor,
    method: Method,
    loop: InnerLoop,
    groups: Groups,
    **settings: Any,
) -> dict[str, Tensor]:
    """Measure every image's distance to the source and ask the gate, on the clock; arguments as for `signals.measure`."""

    def ask(signal: signals.Signal) -> tuple[Tensor, float]:
        sizes = groups.of(
            signal,
            *(kind(method, loop) if signal == "loss" else ()),
            largest=signals.LARGEST,
            timed=False,
        )
        began = time.perf_counter()
        values = signals.measure(
            signal, network, images, method, loop, images_per_step=sizes, **settings
        )[1].cpu()
        return values, (time.perf_counter() - began) * 1e3 / len(images)

    distance, spent = ask("distance")
    if gate is None:
        return {
            "distance": distance,
            "gate_open": torch.ones(len(images), dtype=torch.bool),
            "gate_milliseconds": torch.zeros(len(images)),
        }
    values, spent = (distance, spent) if gate.signal == "distance" else ask(gate.signal)
    return {
        "distance": distance,
        "gate_open": gate.opens(values),
        "gate_milliseconds": torch.full((len(images),), spent),
    }


def confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Give the largest class probability and its class for ``logits (N, K)``, each ``(N,)``."""
    return tuple(logits.softmax(-1).max(-1))
