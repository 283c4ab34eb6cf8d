"""Choosing a run's settings without test labels: by successive halving, on labeled source images.

The images are those that training has set aside, under four corruption types that are never tested on, so nothing of the
test set, neither image nor label nor kind of shift, can reach a setting. Every number of steps is judged in one pass.
Successive halving: Jamieson and Talwalkar, AISTATS 2016, arXiv 1502.07943; the resource is the number of images. The best of
many is partly the luckiest of them, so the run's own values stay unless the best is better by more than one standard error.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tttlab.arrivals import Stream
from tttlab.data import ImageSet, balanced_subset
from tttlab.gate import ABOVE, Gate, choose_gate, saves_time, score
from tttlab.group_size import Groups, Wish
from tttlab.inner_loop import InnerLoop
from tttlab.intervals import crossed_standard_error
from tttlab.method import Method
from tttlab.parallel import in_order
from tttlab.params import HELD_OUT
from tttlab.pixels import as_images
from tttlab.resuming import Work
from tttlab.seeding import numpy_generator
from tttlab.shifts import Shift
from tttlab.source_statistics import Statistics
from tttlab.sweep import Block, Job, adapt_to_job, list_blocks, list_jobs

Values = dict[str, Any]
KEPT = 6  # candidates that are told: the best, for comparison
DEFAULT = 0  # the candidate that holds the run's own values
TIMED = 6  # images under every shift that a gate's time is measured on


def held_out_shifts(severities: Sequence[int]) -> list[Shift]:
    """List the shifts that settings are judged under: the clean images, and the corruption types that no test uses."""
    return [Shift(), *(Shift(corruption, severity) for corruption in HELD_OUT for severity in severities)]


class Grid(NamedTuple):
    """The settings to compare.

    ``candidates`` without their steps, the run's own values first, the others in the order of the grid; ``steps``, the numbers
    of steps, ascending, and ``own``, the place of the run's own among them. Where one pass does not show them: candidates with
    their steps, and a single number in place of these.
    """

    candidates: list[Values]
    steps: tuple[int, ...]
    own: int


def list_candidates(
    search: Mapping[str, Sequence[Any]], default: Values, count: int, seed: int, *key: str, in_one_pass: bool = True
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
        image: ``(N,)`` number of the image.
        corruption: ``(N,)`` number of the corruption type, -1 for an image without a shift.
        source: ``(N,)`` whether the source network is right.
        adapted: ``(N, R)`` whether the network is right after each of the R numbers of steps.
        signals: what a gate may read, each ``(N,)``; see `tttlab.signals`.
        milliseconds: ``(R,)`` mean cost per image.
    """

    image: np.ndarray
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

    def cells(self, place: int, clean_penalty: float) -> np.ndarray:
        """Divide the score of a number of steps among the images and the C corruption types: ``(n, C)``, its mean the score.

        The penalty, the same under all corruptions, is each image's own share of it.
        """
        right, clean = self.adapted[:, place], self.clean
        (image, names), (kind, kinds) = (
            np.unique(own[~clean], return_inverse=True)[::-1] for own in (self.image, self.corruption)
        )
        counts, sums = np.zeros((2, len(names), len(kinds)))
        np.add.at(sums, (image, kind), right[~clean])
        np.add.at(counts, (image, kind), 1)
        cells = sums / counts
        if (lost := self.source[clean] - right[clean]).sum() > 0:
            cells -= clean_penalty * lost[np.argsort(self.image[clean])][:, None]
        return cells

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

    def gate(self, place: int, clean_penalty: float, saves: Callable[[Gate], bool]) -> Gate | None:
        """Choose a gate for this candidate at one number of steps; None: adapting to every image is best."""
        last = self.outcomes[-1]
        return choose_gate(last.signals, last.source, last.adapted[:, place], last.corruption, clean_penalty, saves)


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
        subsets = [balanced_subset(self.images.image_ids, labels, count, self.seed, "tune") for count in self.counts]
        # A round computes what the rounds before have not; on streams all of its images.
        before = itertools.chain([[]], itertools.repeat([]) if self.stream else subsets)
        self._fresh = [np.setdiff1d(own, known) for own, known in zip(subsets, before, strict=False)]
        self._groups = Groups(self.images_per_step, max(self.workers, 1))

    def __call__(self, turn: int, numbers: Sequence[int]) -> dict[int, Outcome]:
        """Judge some candidates on the images of a round and of all before."""
        items = [(number, turn, job) for number in numbers for job in list_jobs(self._blocks(turn), self.stream)]
        missing = [item for item in items if not all(self.work.has(self._name(*item[:2], block)) for block in item[2].blocks)]
        self.on_images(sum(job.size for _, _, job in items) - sum(job.size for _, _, job in missing))
        for done in in_order(self._adapt, missing, self.workers, lambda item: f"candidate {item[0] + 1}, {item[2].title}"):
            self.on_images(done)
        turns = [turn] if self.stream else range(turn + 1)
        return {
            number: join(self.work.load(self._name(number, turn, block)) for turn in turns for block in self._blocks(turn))
            for number in numbers
        }

    def _blocks(self, turn: int) -> list[Block]:
        """List the blocks of the images that are new in a round."""
        return list_blocks(held_out_shifts(self.severities), self.images.view(self._fresh[turn]), self.stream)

    def _name(self, number: int, turn: int, block: Block) -> str:
        return f"{self.prefix}-{number}-{turn}-{block.name}"

    def _adapt(self, item: tuple[int, int, Job]) -> int:
        number, turn, job = item
        method, loop, statistics = self.build(self.candidates[number])
        own = self.images.view(self._fresh[turn])
        record = (loop.steps,) if self.stream else self.steps
        found = adapt_to_job(self.network, method, loop, own, job, self.stream, self._groups, statistics=statistics,
                             seed=self.seed, record=record, device=self.device)  # fmt: skip
        for block in job.blocks:
            image = {"image": torch.from_numpy(self._fresh[turn][block.images])}
            kept = marked(found[block.shift], own.labels[block.images], block.shift) | image
            self.work.save(self._name(number, turn, block), kept)
        return job.size

    def saves_time(self, values: Values, gate: Gate) -> bool:
        """Time a candidate with and without a gate on some images under every shift; see `tttlab.gate.saves_time`."""
        method, loop, statistics = self.build(values)
        loop = replace(loop, steps=values.get("steps", loop.steps))
        shifts = held_out_shifts(self.severities)
        own = self.images.take(balanced_subset(self.images.image_ids, self.images.labels, TIMED, self.seed, "tune"))
        pixels = torch.from_numpy(np.concatenate([shift.apply(own, self.seed) for shift in shifts]))
        names = [name for _ in shifts for name in own.image_ids]
        return saves_time(self.network, as_images(pixels).to(self.device), method, loop, gate, statistics=statistics,
                          image_ids=names, seed=self.seed, groups=Groups(self.images_per_step))  # fmt: skip


def marked(result: Mapping[str, Tensor], labels: np.ndarray, shift: Shift) -> dict[str, Tensor]:
    """Compare what a block was predicted as with its labels ``(n,)``; whether it is right is all that is kept of them."""
    known = torch.from_numpy(np.array(labels))
    return {
        "corruption": torch.full((len(known),), HELD_OUT.index(shift.corruption) if shift.severity else -1),
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
    candidates: int, images: int, counts: Sequence[int | None], severities: Sequence[int], keep: float, anew: bool = False
) -> int:
    """Count the (image, shift) pairs that a search adapts to; ``anew``: every round takes all its images, as on streams."""
    total, before = 0, 0
    for count in counts:
        now = min(count or images, images)
        total += candidates * (now - before) * len(held_out_shifts(severities))
        candidates, before = 1 + math.ceil((candidates - 1) * keep), 0 if anew else now
    return total


class Choice(NamedTuple):
    """A trial, by its place among the ranked, and a number of steps, by its place among those that were judged."""

    rank: int
    place: int


def compare(trial: Trial, place: int, default: Trial, own: int, clean_penalty: float) -> tuple[float, float]:
    """Give by how much a candidate's score exceeds the default's, on the same images, and the standard error of that.

    Images and corruption types are both taken for drawn at random: a setting must hold under types that it has not seen.

    Args:
        trial: the candidate.
        place: its number of steps.
        default: the run's own values.
        own: their number of steps.
        clean_penalty: see `tttlab.gate.score`.
    """
    turn = len(trial.outcomes) - 1  # the default took part in every round
    cells = trial.outcomes[turn].cells(place, clean_penalty) - default.outcomes[turn].cells(own, clean_penalty)
    return float(cells.mean()), crossed_standard_error(cells)


def pick(trials: Sequence[Trial], own: int, clean_penalty: float) -> Choice:
    """Take the best trial if it is better than the run's own values by more than one standard error, else these.

    Args:
        trials: from `successive_halving`.
        own: place of the run's own number of steps.
        clean_penalty: see `tttlab.gate.score`.
    """
    rank = next(rank for rank, trial in enumerate(trials) if trial.number == DEFAULT)
    place, _ = trials[0].best(clean_penalty)
    difference, error = compare(trials[0], place, trials[rank], own, clean_penalty)
    return Choice(0, place) if difference > error + 1e-9 else Choice(rank, own)


@dataclass(frozen=True)
class Search:
    """What was compared with what.

    Attributes:
        trials: from `successive_halving`.
        grid: what they are numbered by.
        trains: whether the method takes ``steps``, which is what a gate can save; False on a stream, where the candidates name
            theirs or leave the run's.
        clean_penalty: see `tttlab.gate.score`.
    """

    trials: Sequence[Trial]
    grid: Grid
    trains: bool
    clean_penalty: float

    def values(self, rank: int, place: int) -> Values:
        """Give a trial's settings with a number of steps, where it takes some and does not name them."""
        values = self.grid.candidates[self.trials[rank].number]
        return values | ({"steps": self.grid.steps[place]} if self.trains and "steps" not in values else {})

    def choose(self, saves: Callable[[Values, Gate], bool] | None) -> dict[str, Any]:
        """Say what was chosen, as JSON holds it and `adapt` reads it: settings, the gate, the best candidates in order.

        Nothing that differs from one execution to the next, such as a time: an equal choice is then an equal file. The gate
        alone is looked at by the clock.

        Args:
            saves: tells whether a gate saves time with some settings; None: no gate is wanted.
        """
        rank, place = pick(self.trials, self.grid.own, self.clean_penalty)
        values = self.values(rank, place)
        gate = None
        if saves and self.trains:
            gate = self.trials[rank].gate(place, self.clean_penalty, lambda gate: saves(values, gate))
        return {
            "tuned": True,
            "settings": values,
            "steps": list(self.grid.steps),
            "candidates": [self.told(rank) for rank in range(min(KEPT, len(self.trials)))],
            "search": self.searched(),
            "without_influence": self.without_influence(),
            "gate": gate and asdict(gate),
        }

    def told(self, rank: int) -> dict[str, Any]:
        """Tell a trial with its best number of steps: settings, score, and how far it is above the run's own values."""
        trial = self.trials[rank]
        default = next(trial for trial in self.trials if trial.number == DEFAULT)
        place, score = trial.best(self.clean_penalty)
        difference, error = compare(trial, place, default, self.grid.own, self.clean_penalty)
        about = {"settings": self.values(rank, place), "score": score, "images": len(np.unique(trial.outcomes[-1].image))}
        return about | {"above_default": difference, "standard_error": error}

    def searched(self) -> dict[str, list[Any]]:
        """List, of every setting of which more than one value was tried, these values in order."""
        tried: dict[str, set[Any]] = {}
        for values, _, _ in self._judged():
            for name, value in values.items():
                tried.setdefault(name, set()).add(value)
        return {name: sorted(values, key=_order) for name, values in tried.items() if len(values) > 1}

    def without_influence(self) -> list[str]:
        """Name the settings that made no difference: whatever the others were, all of their values scored the same.

        Candidates are compared on the images of the last round that they all took part in. What the search did not try beside
        each other is not said to tie.
        """
        judged = self._judged()
        names = dict.fromkeys(name for values, _, _ in judged for name in values)
        return [name for name in names if _all_tie(judged, name, self.clean_penalty)]

    def _judged(self) -> list[tuple[Values, Trial, int]]:
        """List every trial with every number of steps, by its place, and the settings that these are."""
        return [(self.values(rank, place), trial, place)
                for rank, trial in enumerate(self.trials) for place in range(len(self.grid.steps))]  # fmt: skip

    def describe(self) -> list[tuple[Values, dict[int, dict[str, float]]]]:
        """Tell every trial: its settings with its best number of steps, and its results by how many pairs it saw."""
        found = []
        for rank, trial in enumerate(self.trials):
            place, _ = trial.best(self.clean_penalty)
            results = {len(outcome.clean): outcome.summary(place, self.clean_penalty) for outcome in trial.outcomes}
            found.append((self.values(rank, place), results))
        return found

    def chosen(self) -> dict[str, float]:
        """Say what the chosen settings gave and took in the last round; see `Outcome.summary`."""
        rank, place = pick(self.trials, self.grid.own, self.clean_penalty)
        return self.trials[rank].outcomes[-1].summary(place, self.clean_penalty)


def _all_tie(judged: Sequence[tuple[Values, Trial, int]], name: str, clean_penalty: float) -> bool:
    """Tell whether a setting's values, all of them compared with another one, score the same beside the same other settings."""
    groups: dict[tuple, dict[Any, tuple[Trial, int]]] = {}
    for values, trial, place in judged:
        if name in values:
            others = tuple(pair for pair in values.items() if pair[0] != name)
            groups.setdefault(others, {})[values[name]] = trial, place
    compared = [group for group in groups.values() if len(group) > 1]
    for group in compared:
        last = min(len(trial.outcomes) for trial, _ in group.values()) - 1
        if len({trial.outcomes[last].scores(clean_penalty)[place] for trial, place in group.values()}) > 1:
            return False
    return bool(compared) and {*itertools.chain(*compared)} == {*itertools.chain(*groups.values())}


def _order(value: Any) -> tuple[bool, Any]:
    """Sort numbers by size and before words."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return not number, value if number else str(value)
