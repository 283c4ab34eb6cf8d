"""Choosing a run's settings without test labels: by successive halving, on labeled source images.

The images are the validation images, under four corruption types that are never tested on. So
neither images, labels nor corruption types of the test set can influence a setting. One pass
judges every number of steps. Successive halving: Jamieson and Talwalkar, AISTATS 2016,
arXiv 1502.07943; the resource is the number of images.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tttlab.adaptation.gate import ABOVE, Gate, saves_time
from tttlab.adaptation.task import Task
from tttlab.config.values import HELD_OUT
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.data.splits import balanced_subset
from tttlab.experiments.blocks import Block, Job, list_blocks, list_jobs
from tttlab.experiments.jobs import Experiment, adapt_to_job
from tttlab.experiments.trials import DEFAULT, Grid, Outcome, Trial, Values
from tttlab.runtime.group_size import Groups
from tttlab.runtime.machine import Machine
from tttlab.runtime.parallel import in_order
from tttlab.runtime.resuming import Work
from tttlab.seeding import numpy_generator
from tttlab.shifts.shift import Shift, list_shifts
from tttlab.shifts.streams import Stream

TIMED = 6  # images per shift on which a gate's time is measured


def held_out_shifts(severities: Sequence[int], strength: str = "own") -> list[Shift]:
    """List the shifts of tuning: none, and the corruption types that no test uses."""
    return list_shifts(HELD_OUT, severities, strength)


def list_candidates(
    search: Mapping[str, Sequence[Any]],
    default: Values,
    count: int,
    seed: int,
    *key: str,
    in_one_pass: bool = True,
) -> Grid:
    """List the settings to compare.

    Args:
        search: setting → values to choose from.
        default: the run's own values, which are always the first candidate.
        count: maximum number of candidates; a larger grid is sampled at random.
        seed: of this sample.
        key: names the run, for the same purpose.
        in_one_pass: whether one adaptation also shows the results of fewer steps; if so,
            ``steps`` are not combined with the other settings.
    """
    if not in_one_pass:
        return Grid(_grid(search, default, count, seed, *key), (0,), 0)
    default_steps = default.get("steps", 0)
    steps = tuple(sorted({*search.get("steps", ()), default_steps}))
    search = {name: values for name, values in search.items() if name != "steps"}
    candidates = _grid(search, default, count, seed, *key)
    return Grid(candidates, steps, steps.index(default_steps))


def _grid(
    search: Mapping[str, Sequence[Any]], default: Values, count: int, seed: int, *key: str
) -> list[Values]:
    """Combine all values, the default first, and sample the others at random if they are many."""
    first = {name: default[name] for name in search if name in default}
    combinations = itertools.product(*search.values())
    grid = [dict(zip(search, values, strict=True)) for values in combinations]
    grid = [values for values in grid if values != first]
    if len(grid) > count - 1:
        generator = numpy_generator(seed, "candidates", *key)
        sample = generator.choice(len(grid), count - 1, replace=False)
        grid = [grid[index] for index in sorted(sample)]
    return [first, *grid]


def successive_halving(
    judge: Callable[[int, Sequence[int]], Mapping[int, Outcome]],
    candidates: int,
    rounds: int,
    keep: float,
    clean_penalty: float,
) -> list[Trial]:
    """Judge all candidates on few images, the best of them on more, and so on.

    Args:
        judge: called with a round's number and the candidates that take part in it.
        candidates: their number; of equal scores the earlier candidate wins.
        rounds: their number.
        keep: share of the candidates that a round passes on to the next, at least one. The
            `DEFAULT` is always passed on, for comparison.
        clean_penalty: see `tttlab.experiments.gate_choice.score`.

    Returns:
        all candidates, the best first; candidates that reached a later round come before others.
    """
    outcomes: dict[int, tuple[Outcome, ...]] = dict.fromkeys(range(candidates), ())
    alive, ranking = list(outcomes), []
    for turn in range(rounds):
        for number, outcome in judge(turn, alive).items():
            outcomes[number] += (outcome,)
        alive.sort(key=lambda number: (-outcomes[number][-1].scores(clean_penalty).max(), number))
        rivals = [number for number in alive if number != DEFAULT]
        best = {DEFAULT, *rivals[: math.ceil(len(rivals) * keep)]} if turn + 1 < rounds else set()
        ranking = [number for number in alive if number not in best] + ranking
        alive = [number for number in alive if number in best]
    return [Trial(number, outcomes[number]) for number in ranking]


@dataclass(frozen=True)
class Rounds:
    """The labeled source images that every round of a tuning judges on.

    Attributes:
        images: all of them, none of which was trained on.
        counts: images per shift in each round, growing; None: all.
        severities: of the held-out corruptions.
        seed: of all random streams.
        stream: how images arrive. Every round then adapts to all its images anew, because a
            short stream does not show what happens on a long one.
        strength: of the held-out corruptions.
    """

    images: ImageSet
    counts: Sequence[int | None]
    severities: Sequence[int]
    seed: int
    stream: Stream | None = None
    strength: str = "own"

    @cached_property
    def shifts(self) -> list[Shift]:
        """List the shifts of tuning."""
        return held_out_shifts(self.severities, self.strength)

    def subset(self, count: int | None) -> np.ndarray:
        """Choose the indices of ``count`` images, balanced by class; larger subsets contain it."""
        return balanced_subset(self.images.image_ids, self.images.labels, count, self.seed, "tune")

    @cached_property
    def fresh(self) -> list[np.ndarray]:
        """List the indices of the images that each round computes: new ones, on streams all."""
        subsets = [self.subset(count) for count in self.counts]
        if self.stream:
            return [np.unique(subset) for subset in subsets]
        return [
            np.setdiff1d(subset, previous)
            for previous, subset in itertools.pairwise([np.empty(0, int), *subsets])
        ]

    def blocks(self, turn: int) -> list[Block]:
        """Divide the images that a round computes into blocks."""
        return list_blocks(self.shifts, self.images.view(self.fresh[turn]), self.stream)


@dataclass(frozen=True)
class Judge:
    """Adapts to labeled source images under held-out corruptions, and marks right predictions.

    Attributes:
        rounds: the images.
        grid: the settings; on streams every candidate contains its number of steps.
        build: makes the task from a candidate.
        work: where finished blocks are kept.
        prefix: of the names under which they are kept.
        machine: where to compute.
        on_images: called with the number of (image, shift) pairs done.
    """

    rounds: Rounds
    grid: Grid
    build: Callable[[Values], Task]
    work: Work
    prefix: str
    machine: Machine = Machine()
    on_images: Callable[[int], Any] = lambda _count: None

    @cached_property
    def _groups(self) -> Groups:
        return self.machine.groups()

    def __call__(self, turn: int, numbers: Sequence[int]) -> dict[int, Outcome]:
        """Judge some candidates on the images of a round and of all earlier rounds."""
        jobs = list_jobs(self.rounds.blocks(turn), self.rounds.stream)
        items = [(number, turn, job) for number in numbers for job in jobs]
        missing = [item for item in items if not self._has(*item)]
        done = sum(job.size for _, _, job in items) - sum(job.size for _, _, job in missing)
        self.on_images(done)

        def title(item: tuple[int, int, Job]) -> str:
            return f"candidate {item[0] + 1}, {item[2].title}"

        for count in in_order(self._adapt, missing, self.machine.workers, title):
            self.on_images(count)
        turns = [turn] if self.rounds.stream else range(turn + 1)
        blocks = [(each, block) for each in turns for block in self.rounds.blocks(each)]
        return {
            number: join(self.work.load(self._name(number, *block)) for block in blocks)
            for number in numbers
        }

    def _has(self, number: int, turn: int, job: Job) -> bool:
        return all(self.work.has(self._name(number, turn, block)) for block in job.blocks)

    def _name(self, number: int, turn: int, block: Block) -> str:
        return f"{self.prefix}-{number}-{turn}-{block.name}"

    def _adapt(self, item: tuple[int, int, Job]) -> int:
        number, turn, job = item
        task = self.build(self.grid.candidates[number])
        fresh, stream = self.rounds.fresh[turn], self.rounds.stream
        images = self.rounds.images.view(fresh)
        record = (task.loop.steps,) if stream else self.grid.steps
        experiment = Experiment(task, images, stream, record=record)
        results = adapt_to_job(experiment, job, self._groups, self.machine.device)
        for block in job.blocks:
            labels = images.labels[block.images]
            marks = mark(results[block.shift], labels, block.shift)
            marks |= {"image": torch.from_numpy(fresh[block.images])}
            self.work.save(self._name(number, turn, block), marks)
        return job.size

    def saves_time(self, values: Values, gate: Gate) -> bool:
        """Time a candidate with and without a gate on some images under every shift.

        See `tttlab.adaptation.gate.saves_time`.
        """
        task, rounds = self.build(values), self.rounds
        task = replace(task, loop=replace(task.loop, steps=values.get("steps", task.loop.steps)))
        images = rounds.images.take(rounds.subset(TIMED))
        pixels = np.concatenate([shift.apply(images, rounds.seed) for shift in rounds.shifts])
        names = [name for _ in rounds.shifts for name in images.image_ids]
        pixels = as_images(torch.from_numpy(pixels)).to(self.machine.device)
        return saves_time(task, gate, pixels, names, Groups(self.machine.images_per_step))


def mark(result: Mapping[str, Tensor], labels: np.ndarray, shift: Shift) -> dict[str, Tensor]:
    """Compare a block's predictions with the labels ``(n,)``; only right or wrong is kept."""
    target = torch.from_numpy(np.array(labels))
    corruption = HELD_OUT.index(shift.corruption) if shift.severity else -1
    return {
        "corruption": torch.full((len(target),), corruption),
        "source": (result["source_prediction"] == target).double(),
        "adapted": (result["predictions_at"] == target[:, None]).double(),
        "confidence": result["source_confidence"],
        "distance": result["distance"],
        "loss": result["losses"][:, 0],
        "milliseconds": result["milliseconds_at"],
    }


def join(parts: Iterable[Mapping[str, Tensor]]) -> Outcome:
    """Join the blocks that `mark` made."""
    parts = list(parts)
    columns = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    signals = {name: columns.pop(name) for name in ABOVE}
    return Outcome(**columns | {"milliseconds": columns["milliseconds"].mean(0)}, signals=signals)


def pairs_to_judge(
    candidates: int,
    images: int,
    counts: Sequence[int | None],
    severities: Sequence[int],
    keep: float,
    anew: bool = False,
) -> int:
    """Count the (image, shift) pairs that a search adapts to.

    Args:
        candidates: their number in the first round.
        images: the number of all images.
        counts: images per shift in each round; None: all.
        severities: of the held-out corruptions.
        keep: share of the candidates that a round passes on.
        anew: whether every round adapts to all its images, as on streams.
    """
    total, previous = 0, 0
    for count in counts:
        current = min(count or images, images)
        total += candidates * (current - previous) * len(held_out_shifts(severities))
        candidates, previous = 1 + math.ceil((candidates - 1) * keep), 0 if anew else current
    return total
