"""Counts the operations of ARC at one size, offline and at test time, without a GPU or a long run.

`FlopCounterMode` counts matrix products on the meta device, where nothing is computed: two
operations for a product and its sum. What else is done (norms, softmax, the optimiser) is small
beside it. Because of attention, the operations of a pair are a polynomial of second degree in its
number of tokens; so three counts tell those of all lengths.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.amount import FULL, Amount
from tttlab.arc import building
from tttlab.arc.canvas import Tokens
from tttlab.arc.demonstrations import Demonstrations, as_array
from tttlab.arc.invented.inventing import invent
from tttlab.arc.network import CanvasTransformer
from tttlab.arc.offline import PairLoader, training_pairs
from tttlab.arc.settings import Settings
from tttlab.arc.tasks import ArcTask, load
from tttlab.seeding import torch_generator
from tttlab.workflow.arc.preparing import answered, fitting

PEAK = 989e12  # per second: dense bf16 matrix products of an H100, as of an H200, by NVIDIA
UTILISATION = 0.3
LARGE = 1e14  # from here on operations are told in PFLOP, and in hours
SAMPLED_STEPS = 2  # of a task, whose lengths are measured
SAMPLED_BATCHES = 32  # of the offline training, the same
# What Hu et al. 2025 (arXiv 2511.14761) trained and how long: pairs, GPU seconds.
PUBLISHED = {
    "offline, 100 epochs of 400,000 pairs": (100 * 400_000, 4.8 * 3600 * 8),
    "a task, 100 epochs of 51 × 3 pairs": (100 * 51 * 3, 70.0),
}
PUBLISHED_FORWARD = 28e9  # multiply-adds of a forward pass

Count = Callable[[int], int]  # tokens of a pair, without the task's → operations


def report(settings: Settings, amount: Amount = FULL) -> dict[str, Any]:
    """Count all operations of a size, and print them.

    Args:
        settings: the size.
        amount: most tasks whose lengths are measured.

    Returns:
        ``rows`` with operations, and the hours that these take at `UTILISATION` of `PEAK`.
    """
    forward, training = counts(building.build(settings, 1))
    chosen, run = settings.tasks, settings.adapt.run("all")
    collection = fitting(load(chosen.training, "training"), chosen.largest)
    shown = [answered(task, collection.answers[task.name]) for task in collection.tasks]
    asked = fitting(load(chosen.evaluation, "evaluation"), chosen.largest).tasks
    canvas = building.canvas_of(settings).tokens
    invented = invent(
        settings.invented.tasks, settings.invented.pairs, chosen.largest, settings.seed
    )
    of_batches = np.array(
        offline_lengths(settings, shown[: amount.images], invented[: amount.images])
    )
    of_steps = np.array(test_time_lengths(settings, asked[: amount.images]))
    offline, test_time = (np.mean([training(n) for n in n_s]) for n_s in (of_batches, of_steps))
    pairs = sum(len(task.demonstrations) for task in shown) * auxiliaries(settings, "offline")
    pairs += len(invented) * settings.invented.pairs
    views = auxiliaries(settings, "test_time") * run.placements
    tasks = chosen.count or len(asked)
    questions = tasks * sum(len(task.questions) for task in asked) / len(asked)
    rows = {
        f"a pair, {canvas} tokens: forward": forward(canvas),
        f"a pair, {canvas} tokens: forward and backward": training(canvas),
        f"a pair offline, {of_batches.mean():.0f} tokens: forward and backward": offline,
        f"a pair at test time, {of_steps.mean():.0f} tokens: forward and backward": test_time,
        f"offline training, {settings.train.epochs} epochs of {pairs:,} pairs": (
            settings.train.epochs * pairs * offline
        ),
        f"test-time training of a task, {run.steps:,} steps of {run.pairs} pairs": (
            run.steps * run.pairs * test_time
        ),
        f"test-time training of {tasks} tasks": tasks * run.steps * run.pairs * test_time,
        f"predicting once for {tasks} tasks, {views} views of {questions:.0f} questions": (
            questions * views * forward(canvas)
        ),
    }
    found = {"rows": [describe(*row) for row in rows.items()]}
    found |= {"peak": PEAK, "utilisation": UTILISATION}
    if 0.9 < forward(canvas) / 2 / PUBLISHED_FORWARD < 1.1:
        found["published"] = published(training(canvas))
    print_rows(found)
    return found


def counts(network: CanvasTransformer) -> tuple[Count, Count]:
    """Count the operations of a pair: of its forward pass, and of forward and backward pass.

    Returns:
        both as functions of the number of tokens, without the task's.
    """
    known = [count(network, length) for length in (1, 2, 3)]
    forward, training = (_through(values) for values in zip(*known, strict=True))
    return forward, training


def count(network: CanvasTransformer, length: int) -> tuple[int, int]:
    """Count one pair's operations at one length: forward, and forward and backward."""
    copy = CanvasTransformer(network.canvas, network.architecture, 1).to("meta")
    shape = {"dtype": torch.long, "device": "meta"}
    tokens = Tokens(
        torch.zeros(1, length, network.canvas.patch**2, **shape),
        torch.zeros(1, length, **shape),
        torch.ones(1, length, dtype=torch.bool, device="meta"),
        torch.zeros(1, **shape),
    )
    with FlopCounterMode(display=False) as counter:
        logits = copy(tokens)
        forward = counter.get_total_flops()
        logits.sum().backward()
    return forward, counter.get_total_flops()


def _through(values: Sequence[int]) -> Count:
    """Continue the values at 1, 2 and 3 by Newton's polynomial of second degree."""
    first, second, third = values

    def value(n: int) -> int:
        n = int(n)
        curved = (n - 1) * (n - 2) // 2 * (third - 2 * second + first)
        return first + (n - 1) * (second - first) + curved

    return value


def auxiliaries(settings: Settings, part: str) -> int:
    """Count the auxiliary tasks of a task, offline or at test time."""
    return 1 + len(settings.auxiliary.kinds) * getattr(settings.auxiliary, part)


def offline_lengths(
    settings: Settings, tasks: Sequence[ArcTask], invented: Sequence[ArcTask]
) -> list[int]:
    """Measure the tokens of each pair in some batches of the first epoch, padding included."""
    pairs = training_pairs(settings, tasks, invented)
    canvas = building.canvas_of(settings)
    loader = PairLoader(pairs, canvas, settings.train.batch_size, settings.seed)
    loader.set_epoch(1)
    return [batch["positions"].shape[1] for batch in islice(loader, SAMPLED_BATCHES)]


def test_time_lengths(settings: Settings, tasks: Sequence[ArcTask]) -> list[int]:
    """Measure the tokens of each pair in some steps of every task, padding included."""
    drawn = building.draw(settings, tasks, settings.auxiliary.test_time)
    method = Demonstrations(building.canvas_of(settings), settings.adapt.run("all").pairs, 0)
    lengths = []
    for task, own in zip(tasks, drawn, strict=True):
        shown = replace(task, questions=())
        array = as_array(shown, own, len(task.demonstrations), 0, settings.tasks.largest)
        for step in range(SAMPLED_STEPS):
            generator = torch_generator(settings.seed, "views", task.name, step)
            views = method.views(torch.nn.Identity(), torch.from_numpy(array[None]), [generator])
            lengths.append(views["targets"].shape[2])
    return lengths


def describe(what: str, operations: float) -> dict[str, Any]:
    """Make a row."""
    hours = operations / (UTILISATION * PEAK) / 3600
    return {"what": what, "operations": float(operations), "hours": hours}


def published(operations: float) -> list[dict[str, Any]]:
    """Tell which share of the peak the published times mean.

    Args:
        operations: of a pair's forward and backward pass on the whole canvas.
    """
    return [
        {
            "what": what,
            "operations": pairs * operations,
            "gpu_seconds": seconds,
            "utilisation": pairs * operations / seconds / PEAK,
        }
        for what, (pairs, seconds) in PUBLISHED.items()
    ]


def print_rows(found: dict[str, Any]) -> None:
    """Print the table."""
    print(f"hours at {UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s, or of one GPU as published")
    for row in found["rows"]:
        hours = f"{row['hours']:12.3g} h" if row["operations"] >= LARGE else ""
        print(f"{row['what']:78}{amount_of(row['operations']):>14}{hours}")
    for row in found.get("published", ()):
        print(
            f"{'published: ' + row['what']:78}{amount_of(row['operations']):>14}"
            f"{row['gpu_seconds'] / 3600:12.3g} h, so {row['utilisation']:.1%} of the peak"
        )


def amount_of(operations: float) -> str:
    """Write a number of operations in a unit that people can read."""
    unit, size = ("PFLOP", 1e15) if operations >= LARGE else ("GFLOP", 1e9)
    return f"{operations / size:,.4g} {unit}"
