"""Choosing a run's settings without test labels: by successive halving, on labeled source images.

The images are those that training has set aside, under four corruption types that are never tested on, so nothing of the
test set, neither image nor label nor kind of shift, can reach a setting. Every number of steps is judged in one pass.
Successive halving: Jamieson and Talwalkar, AISTATS 2016, arXiv 1502.07943; the resource is the number of images.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tttlab.adaptation.gate import ABOVE, Gate, saves_time
from tttlab.adaptation.inner_loop import InnerLoop
from tttlab.adaptation.method import Method
from tttlab.config.values import HELD_OUT
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.data.splits import balanced_subset
from tttlab.experiments.blocks import Block, Job, list_blocks, list_jobs
from tttlab.experiments.jobs import adapt_to_job
from tttlab.experiments.trials import DEFAULT, Grid, Outcome, Trial, Values
from tttlab.networks.source_statistics import Statistics
from tttlab.runtime.group_size import Groups, Wish
from tttlab.runtime.parallel import in_order
from tttlab.runtime.resuming import Work
from tttlab.seeding import numpy_generator
from tttlab.shifts.shift import Shift
from tttlab.shifts.streams import Stream

TIMED = 6  # images under every shift that a gate's time is measured on


def held_out_shifts(severities: Sequence[int]) -> list[Shift]:
    """List the shifts that settings are judged under: the clean images, and the corruption types that no test uses."""
    return [
        Shift(),
        *(Shift(corruption, severity) for corruption in HELD_OUT for severity in severities),
    ]


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
        default: the setting that is compared in any case, as the first.
        count: most candidates; of a larger grid a random part is taken.
        seed: of that choice.
        key: names the run, for the same purpose.
        in_one_pass: one adaptation shows what fewer steps would have given, so that ``steps`` are not combined with the rest.
    """
    if not in_one_pass:
        return Grid(_grid(search, default, count, seed, *key), (0,), 0)
    own = default.get("steps", 0)
    steps = tuple(sorted({*search.get("steps", ()), own}))
    others = {name: values for name, values in search.items() if name != "steps"}
    return Grid(_grid(others, default, count, seed, *key), steps, steps.index(own))


def _grid(
    search: Mapping[str, Sequence[Any]], default: Values, count: int, seed: int, *key: str
) -> list[Values]:
    """Combine all values, the default first, and take a random part of what is too much."""
    names = list(search)
    first = {name: default[name] for name in names if name in default}
    grid = [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*(search[name] for name in names))
    ]
    others = [values for values in grid if values != first]
    if len(others) > count - 1:
        chosen = numpy_generator(seed, "candidates", *key).choice(
            len(others), count - 1, replace=False
        )
        others = [others[place] for place in sorted(chosen)]
    return [first, *others]


def successive_halving(
    judge: Callable[[int, Sequence[int]], Mapping[int, Outcome]],
    candidates: int,
    rounds: int,
    keep: float,
    clean_penalty: float,
) -> list[Trial]:
    """Judge all candidates on little, the best of them on more, and so on.

    Args:
        judge: called with a round's number and the candidates that take part in it.
        candidates: how many there are; of those with equal scores the earlier one wins.
        rounds: how many there are.
        keep: share of the candidates that a round passes on to the next, at least one, beside the `DEFAULT`, which is always
            passed on, to be compared with.
        clean_penalty: see `tttlab.adaptation.gate.score`.

    Returns:
        all candidates, the best first; one that went further stands before one that did not.
    """
    outcomes: dict[int, tuple[Outcome, ...]] = dict.fromkeys(range(candidates), ())
    alive, ranking = list(outcomes), []
    for turn in range(rounds):
        for number, outcome in judge(turn, alive).items():
            outcomes[number] += (outcome,)
        alive.sort(key=lambda number: (-outcomes[number][-1].scores(clean_penalty).max(), number))
        others = [number for number in alive if number != DEFAULT]
        best = {DEFAULT, *others[: math.ceil(len(others) * keep)]} if turn + 1 < rounds else set()
        ranking = [number for number in alive if number not in best] + ranking
        alive = [number for number in alive if number in best]
    return [Trial(number, outcomes[number]) for number in ranking]


@dataclass
class Judge:
    """Adapts to labeled source images under held-out corruptions, keeps what is done, and counts what is right.

    Attributes:
        network: the source network.
        images: labeled source images that no training has seen.
        counts: images per shift in each round, growing; None: all.
        severities: of the held-out corruptions.
        candidates: settings without their steps.
        steps: the numbers of steps that are judged for each.
        build: makes method, inner loop and source statistics from a candidate.
        seed: of all random streams.
        work: where finished blocks are kept.
        prefix: of the names under which they are kept.
        workers: processes that share the work; changes no result.
        device: where to compute.
        on_images: called with the number of (image, shift) pairs done.
        stream: how images arrive; candidates then come with their steps, and every round begins anew with all its images, for
            a short stream does not tell what a long one does.
        images_per_step: images worked on at once, a machine setting.
    """

    network: nn.Module
    images: ImageSet
    counts: Sequence[int | None]
    severities: Sequence[int]
    candidates: Sequence[Values]
    steps: Sequence[int]
    build: Callable[[Values], tuple[Method, InnerLoop, Statistics]]
    seed: int
    work: Work
    prefix: str
    workers: int = 0
    device: str | torch.device = "cpu"
    on_images: Callable[[int], Any] = lambda _count: None
    stream: Stream | None = None
    images_per_step: Wish = "auto"

    def __post_init__(self) -> None:
        labels = self.images.labels
        subsets = [
            balanced_subset(self.images.image_ids, labels, count, self.seed, "tune")
            for count in self.counts
        ]
        # A round computes what the rounds before have not; on streams all of its images.
        before = itertools.chain([[]], itertools.repeat([]) if self.stream else subsets)
        self._fresh = [
            np.setdiff1d(own, known) for own, known in zip(subsets, before, strict=False)
        ]
        self._groups = Groups(self.images_per_step, max(self.workers, 1))

    def __call__(self, turn: int, numbers: Sequence[int]) -> dict[int, Outcome]:
        """Judge some candidates on the images of a round and of all before."""
        items = [
            (number, turn, job)
            for number in numbers
            for job in list_jobs(self._blocks(turn), self.stream)
        ]
        missing = [
            item
            for item in items
            if not all(self.work.has(self._name(*item[:2], block)) for block in item[2].blocks)
        ]
        self.on_images(
            sum(job.size for _, _, job in items) - sum(job.size for _, _, job in missing)
        )
        for done in in_order(
            self._adapt,
            missing,
            self.workers,
            lambda item: f"candidate {item[0] + 1}, {item[2].title}",
        ):
            self.on_images(done)
        turns = [turn] if self.stream else range(turn + 1)
        return {
            number: join(
                self.work.load(self._name(number, turn, block))
                for turn in turns
                for block in self._blocks(turn)
            )
            for number in numbers
        }

    def _blocks(self, turn: int) -> list[Block]:
        """List the blocks of the images that are new in a round."""
        return list_blocks(
            held_out_shifts(self.severities), self.images.view(self._fresh[turn]), self.stream
        )

    def _name(self, number: int, turn: int, block: Block) -> str:
        return f"{self.prefix}-{number}-{turn}-{block.name}"

    def _adapt(self, item: tuple[int, int, Job]) -> int:
        number, turn, job = item
        method, loop, statistics = self.build(self.candidates[number])
        own = self.images.view(self._fresh[turn])
        record = (loop.steps,) if self.stream else self.steps
        found = adapt_to_job(
            self.network,
            method,
            loop,
            own,
            job,
            self.stream,
            self._groups,
            statistics=statistics,
            seed=self.seed,
            record=record,
            device=self.device,
        )
        for block in job.blocks:
            image = {"image": torch.from_numpy(self._fresh[turn][block.images])}
            kept = marked(found[block.shift], own.labels[block.images], block.shift) | image
            self.work.save(self._name(number, turn, block), kept)
        return job.size

    def saves_time(self, values: Values, gate: Gate) -> bool:
        """Time a candidate with and without a gate on some images under every shift; see `gate.saves_time`."""
        method, loop, statistics = self.build(values)
        loop = replace(loop, steps=values.get("steps", loop.steps))
        shifts = held_out_shifts(self.severities)
        own = self.images.take(
            balanced_subset(self.images.image_ids, self.images.labels, TIMED, self.seed, "tune")
        )
        pixels = torch.from_numpy(np.concatenate([shift.apply(own, self.seed) for shift in shifts]))
        names = [name for _ in shifts for name in own.image_ids]
        return saves_time(
            self.network,
            as_images(pixels).to(self.device),
            method,
            loop,
            gate,
            statistics=statistics,
            image_ids=names,
            seed=self.seed,
            groups=Groups(self.images_per_step),
        )


def marked(result: Mapping[str, Tensor], labels: np.ndarray, shift: Shift) -> dict[str, Tensor]:
    """Compare what a block was predicted as with its labels ``(n,)``; whether it is right is all that is kept of them."""
    known = torch.from_numpy(np.array(labels))
    return {
        "corruption": torch.full(
            (len(known),), HELD_OUT.index(shift.corruption) if shift.severity else -1
        ),
        "source": (result["source_prediction"] == known).double(),
        "adapted": (result["predictions_at"] == known[:, None]).double(),
        "confidence": result["source_confidence"],
        "distance": result["distance"],
        "loss": result["losses"][:, 0],
        "milliseconds": result["milliseconds_at"],
    }


def join(parts: Iterable[Mapping[str, Tensor]]) -> Outcome:
    """Put blocks that `marked` made together."""
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
    """Count the (image, shift) pairs that a search adapts to; ``anew``: every round takes all its images, as on streams."""
    total, before = 0, 0
    for count in counts:
        now = min(count or images, images)
        total += candidates * (now - before) * len(held_out_shifts(severities))
        candidates, before = 1 + math.ceil((candidates - 1) * keep), 0 if anew else now
    return total
