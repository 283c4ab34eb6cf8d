"""Choosing a run's settings without test labels: by successive halving, on labeled source images.

The images are those that training has set aside, under four corruption types that are never tested on, so nothing of the
test set, neither image nor label nor kind of shift, can reach a setting. Every number of steps is judged in one pass.
Successive halving: Jamieson and Talwalkar, AISTATS 2016, arXiv 1502.07943; the resource is the number of images.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tttlab.arrivals import Stream
from tttlab.data import ImageSet, balanced_subset
from tttlab.gate import ABOVE, Gate, choose_gate, score
from tttlab.group_size import GroupSize
from tttlab.inner_loop import InnerLoop
from tttlab.method import Method
from tttlab.parallel import in_order
from tttlab.params import HELD_OUT
from tttlab.resuming import Work
from tttlab.seeding import numpy_generator
from tttlab.shifts import Shift
from tttlab.source_statistics import Statistics
from tttlab.sweep import Block, Job, adapt_to_job, list_jobs

Values = dict[str, Any]
KEPT = 6  # candidates that are told: the chosen one, and runners-up for comparison


def held_out_shifts(severities: Sequence[int]) -> list[Shift]:
    """List the shifts that settings are judged under: the clean images, and the corruption types that no test uses."""
    return [Shift(), *(Shift(corruption, severity) for corruption in HELD_OUT for severity in severities)]


def list_candidates(
    search: Mapping[str, Sequence[Any]], default: Values, count: int, seed: int, *key: str, in_one_pass: bool = True
) -> tuple[list[Values], tuple[int, ...]]:
    """List the settings to compare.

    Args:
        search: setting → values to choose from.
        default: the setting that is compared in any case, as the first.
        count: most candidates; of a larger grid a random part is taken.
        seed: of that choice.
        key: names the run, for the same purpose.
        in_one_pass: one adaptation shows what fewer steps would have given, so that ``steps`` are not combined with the rest.

    Returns:
        candidates without their steps, in the order of the grid, and the numbers of steps, ascending; or, where one pass does
        not show them, candidates with their steps, and a single number in place of these.
    """
    if not in_one_pass:
        candidates = _grid(search, default, count, seed, *key)
        return candidates, (0,)
    steps = tuple(sorted({*search.get("steps", ()), *([default["steps"]] if "steps" in default else ())})) or (0,)
    return _grid({name: values for name, values in search.items() if name != "steps"}, default, count, seed, *key), steps


def _grid(search: Mapping[str, Sequence[Any]], default: Values, count: int, seed: int, *key: str) -> list[Values]:
    """Combine all values, the default first, and take a random part of what is too much."""
    names = list(search)
    first = {name: default[name] for name in names if name in default}
    grid = [dict(zip(names, values, strict=True)) for values in itertools.product(*(search[name] for name in names))]
    others = [values for values in grid if values != first]
    if len(others) > count - 1:
        chosen = numpy_generator(seed, "candidates", *key).choice(len(others), count - 1, replace=False)
        others = [others[place] for place in sorted(chosen)]
    return [first, *others]


@dataclass(frozen=True)
class Outcome:
    """What one candidate did to N (image, shift) pairs.

    Attributes:
        corruption: ``(N,)`` number of the corruption type, -1 for an image without a shift.
        source: ``(N,)`` whether the source network is right.
        adapted: ``(N, R)`` whether the network is right after each of the R numbers of steps.
        signals: what a gate may read, each ``(N,)``; see `tttlab.signals`.
        milliseconds: ``(R,)`` mean cost per image.
    """

    corruption: np.ndarray
    source: np.ndarray
    adapted: np.ndarray
    signals: dict[str, np.ndarray]
    milliseconds: np.ndarray

    @property
    def clean(self) -> np.ndarray:
        """Tell which pairs are images without a shift ``(N,)``."""
        return self.corruption < 0

    def scores(self, clean_penalty: float) -> np.ndarray:
        """Judge every number of steps ``(R,)``."""
        return np.array([score(self.source, right, self.clean, clean_penalty) for right in self.adapted.T])

    def summary(self, place: int, clean_penalty: float) -> dict[str, float]:
        """Say what a number of steps, by its place among the R, gave and took."""
        right, clean = self.adapted[:, place], self.clean
        return {
            "score": float(self.scores(clean_penalty)[place]),
            "accuracy": float(right[~clean].mean()),
            "gain": float(right[~clean].mean() - self.source[~clean].mean()),
            "clean_change": float(right[clean].mean() - self.source[clean].mean()),
            "milliseconds": float(self.milliseconds[place]),
        }


@dataclass(frozen=True)
class Trial:
    """A candidate with its outcomes, one per round that it took part in; each is on all images up to that round.

    Attributes:
        number: its place among the candidates.
        outcomes: at least one.
    """

    number: int
    outcomes: tuple[Outcome, ...]

    def best(self, clean_penalty: float) -> tuple[int, float]:
        """Give the place of the best number of steps, the smallest of equals, and its score, in the last round."""
        scores = self.outcomes[-1].scores(clean_penalty)
        return int(scores.argmax()), float(scores.max())

    def gate(self, place: int, clean_penalty: float) -> Gate | None:
        """Choose a gate for this candidate at one number of steps; None: adapting to every image is best."""
        last = self.outcomes[-1]
        return choose_gate(last.signals, last.source, last.adapted[:, place], last.corruption, clean_penalty)


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
        keep: share of the candidates that a round passes on to the next, at least one.
        clean_penalty: see `tttlab.gate.score`.

    Returns:
        all candidates, the best first; one that went further stands before one that did not.
    """
    outcomes: dict[int, tuple[Outcome, ...]] = dict.fromkeys(range(candidates), ())
    alive, ranking = list(outcomes), []
    for turn in range(rounds):
        for number, outcome in judge(turn, alive).items():
            outcomes[number] += (outcome,)
        alive.sort(key=lambda number: (-outcomes[number][-1].scores(clean_penalty).max(), number))
        passed = math.ceil(len(alive) * keep) if turn + 1 < rounds else 0
        ranking = alive[passed:] + ranking
        alive = alive[:passed]
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

    def __post_init__(self) -> None:
        labels = self.images.labels
        subsets = [balanced_subset(self.images.image_ids, labels, count, self.seed, "tune") for count in self.counts]
        # A round computes what the rounds before have not; on streams all of its images.
        before = itertools.chain([[]], itertools.repeat([]) if self.stream else subsets)
        self._fresh = [np.setdiff1d(own, known) for own, known in zip(subsets, before, strict=False)]
        self._group = GroupSize()

    def __call__(self, turn: int, numbers: Sequence[int]) -> dict[int, Outcome]:
        """Judge some candidates on the images of a round and of all before."""
        shifts, count = held_out_shifts(self.severities), len(self._fresh[turn])
        jobs = list_jobs([Block(shift, 0, range(count)) for shift in shifts], self.stream) if count else []
        items = [(number, turn, job) for number in numbers for job in jobs]
        missing = [
            item for item in items if not all(self.work.has(self._name(*item[:2], block.shift)) for block in item[2].blocks)
        ]
        self.on_images(sum(job.size for _, _, job in items) - sum(job.size for _, _, job in missing))
        for done in in_order(self._adapt, missing, self.workers):
            self.on_images(done)
        turns = [turn] if self.stream else [turn for turn in range(turn + 1) if len(self._fresh[turn])]
        return {
            number: join(self.work.load(self._name(number, turn, shift)) for turn in turns for shift in shifts)
            for number in numbers
        }

    def _name(self, number: int, turn: int, shift: Shift) -> str:
        return f"{self.prefix}-{number}-{turn}-{shift.name}"

    def _adapt(self, item: tuple[int, int, Job]) -> int:
        number, turn, job = item
        method, loop, statistics = self.build(self.candidates[number])
        own = self.images.take(self._fresh[turn])
        record = (loop.steps,) if self.stream else self.steps
        found = adapt_to_job(self.network, method, loop, own, job, self.stream, self._group, statistics=statistics,
                             seed=self.seed, record=record, device=self.device)  # fmt: skip
        for shift, result in found.items():
            self.work.save(self._name(number, turn, shift), marked(result, own, shift))
        return job.size


def marked(result: Mapping[str, Tensor], images: ImageSet, shift: Shift) -> dict[str, Tensor]:
    """Compare the predictions of `adapt_to_block` with the labels; whether they are right is all that is kept of them."""
    labels = torch.from_numpy(np.array(images.labels))
    return {
        "corruption": torch.full((len(labels),), HELD_OUT.index(shift.corruption) if shift.severity else -1),
        "source": (result["source_prediction"] == labels).double(),
        "adapted": (result["predictions_at"] == labels[:, None]).double(),
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
    candidates: int, images: int, counts: Sequence[int | None], severities: Sequence[int], keep: float, anew: bool = False
) -> int:
    """Count the (image, shift) pairs that a search adapts to; ``anew``: every round takes all its images, as on streams."""
    total, before = 0, 0
    for count in counts:
        now = min(count or images, images)
        total += candidates * (now - before) * len(held_out_shifts(severities))
        candidates, before = math.ceil(candidates * keep), 0 if anew else now
    return total


def choose(
    trials: Sequence[Trial], candidates: Sequence[Values], steps: Sequence[int], trains: bool, clean_penalty: float, gate: bool
) -> dict[str, Any]:
    """Say what was chosen, as JSON holds it and `adapt` reads it: settings, the gate, and the best candidates in order.

    Nothing that differs from one execution to the next, such as a time: an equal choice is then an equal file.

    Args:
        trials: from `successive_halving`.
        candidates: what they are numbered by.
        steps: the numbers of steps that were judged.
        trains: whether the method takes ``steps``, which is what a gate can save; False on a stream, where the candidates name
            theirs or leave the run's.
        clean_penalty: see `tttlab.gate.score`.
        gate: whether to choose a gate.
    """
    ranked = [_with_steps(candidates[trial.number], steps[trial.best(clean_penalty)[0]], trains) for trial in trials]
    place, _ = trials[0].best(clean_penalty)
    chosen = trials[0].gate(place, clean_penalty) if gate and trains else None
    return {
        "tuned": True,
        "settings": ranked[0],
        "steps": list(steps),
        "candidates": ranked[:KEPT],
        "gate": chosen and asdict(chosen),
    }


def describe(
    trials: Sequence[Trial], candidates: Sequence[Values], steps: Sequence[int], trains: bool, clean_penalty: float
) -> list[tuple[Values, dict[int, dict[str, float]]]]:
    """Tell every trial: its settings with its best number of steps, and its results by how many (image, shift) pairs it saw."""
    told = []
    for trial in trials:
        place, _ = trial.best(clean_penalty)
        values = _with_steps(candidates[trial.number], steps[place], trains)
        told.append((values, {len(outcome.clean): outcome.summary(place, clean_penalty) for outcome in trial.outcomes}))
    return told


def _with_steps(values: Values, steps: int, trains: bool) -> Values:
    """Add the number of steps to a candidate that takes some and does not name them."""
    return values | ({"steps": steps} if trains and "steps" not in values else {})
