"""What a tuning has found out of its candidates, and the choice among them.

The best of many candidates is partly the luckiest of them, so the run's own values stay unless the best is better by more than
one standard error.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from tttlab.adaptation.gate import Gate
from tttlab.adaptation.gate_choice import choose_gate, score
from tttlab.evaluation.intervals import crossed_standard_error

Values = dict[str, Any]
KEPT = 6  # candidates that are told: the best, for comparison
DEFAULT = 0  # the candidate that holds the run's own values


class Grid(NamedTuple):
    """The settings to compare.

    ``candidates`` without their steps, the run's own values first, the others in the order of the grid; ``steps``, the numbers
    of steps, ascending, and ``own``, the place of the run's own among them. Where one pass does not show them: candidates with
    their steps, and a single number in place of these.
    """

    candidates: list[Values]
    steps: tuple[int, ...]
    own: int


@dataclass(frozen=True)
class Outcome:
    """What one candidate did to N (image, shift) pairs.

    Attributes:
        image: ``(N,)`` number of the image.
        corruption: ``(N,)`` number of the corruption type, -1 for an image without a shift.
        source: ``(N,)`` whether the source network is right.
        adapted: ``(N, R)`` whether the network is right after each of the R numbers of steps.
        signals: what a gate may read, each ``(N,)``; see `tttlab.adaptation.signals`.
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
        return np.array(
            [score(self.source, right, self.clean, clean_penalty) for right in self.adapted.T]
        )

    def cells(self, place: int, clean_penalty: float) -> np.ndarray:
        """Divide the score of a number of steps among the images and the C corruption types: ``(n, C)``, its mean the score.

        The penalty, the same under all corruptions, is each image's own share of it.
        """
        right, clean = self.adapted[:, place], self.clean
        (image, names), (kind, kinds) = (
            np.unique(own[~clean], return_inverse=True)[::-1]
            for own in (self.image, self.corruption)
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
        return choose_gate(
            last.signals, last.source, last.adapted[:, place], last.corruption, clean_penalty, saves
        )


class Choice(NamedTuple):
    """A trial, by its place among the ranked, and a number of steps, by its place among those that were judged."""

    rank: int
    place: int


def compare(
    trial: Trial, place: int, default: Trial, own: int, clean_penalty: float
) -> tuple[float, float]:
    """Give by how much a candidate's score exceeds the default's, on the same images, and the standard error of that.

    Images and corruption types are both taken for drawn at random: a setting must hold under types that it has not seen.

    Args:
        trial: the candidate.
        place: its number of steps.
        default: the run's own values.
        own: their number of steps.
        clean_penalty: see `tttlab.adaptation.gate_choice.score`.
    """
    turn = len(trial.outcomes) - 1  # the default took part in every round
    cells = trial.outcomes[turn].cells(place, clean_penalty) - default.outcomes[turn].cells(
        own, clean_penalty
    )
    return float(cells.mean()), crossed_standard_error(cells)


def pick(trials: Sequence[Trial], own: int, clean_penalty: float) -> Choice:
    """Take the best trial if it is better than the run's own values by more than one standard error, else these.

    Args:
        trials: from `tttlab.experiments.tuning.successive_halving`.
        own: place of the run's own number of steps.
        clean_penalty: see `tttlab.adaptation.gate_choice.score`.
    """
    rank = next(rank for rank, trial in enumerate(trials) if trial.number == DEFAULT)
    place, _ = trials[0].best(clean_penalty)
    difference, error = compare(trials[0], place, trials[rank], own, clean_penalty)
    return Choice(0, place) if difference > error + 1e-9 else Choice(rank, own)


@dataclass(frozen=True)
class Search:
    """What was compared with what.

    Attributes:
        trials: from `tttlab.experiments.tuning.successive_halving`.
        grid: what they are numbered by.
        trains: whether the method takes ``steps``, which is what a gate can save; False on a stream, where the candidates name
            theirs or leave the run's.
        clean_penalty: see `tttlab.adaptation.gate_choice.score`.
    """

    trials: Sequence[Trial]
    grid: Grid
    trains: bool
    clean_penalty: float

    def values(self, rank: int, place: int) -> Values:
        """Give a trial's settings with a number of steps, where it takes some and does not name them."""
        values = self.grid.candidates[self.trials[rank].number]
        return values | (
            {"steps": self.grid.steps[place]} if self.trains and "steps" not in values else {}
        )

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
            gate = self.trials[rank].gate(
                place, self.clean_penalty, lambda gate: saves(values, gate)
            )
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
        about = {
            "settings": self.values(rank, place),
            "score": score,
            "images": len(np.unique(trial.outcomes[-1].image)),
        }
        return about | {"above_default": difference, "standard_error": error}

    def searched(self) -> dict[str, list[Any]]:
        """List, of every setting of which more than one value was tried, these values in order."""
        tried: dict[str, set[Any]] = {}
        for values, _, _ in self._judged():
            for name, value in values.items():
                tried.setdefault(name, set()).add(value)
        return {
            name: sorted(values, key=_order) for name, values in tried.items() if len(values) > 1
        }

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
        return [
            (self.values(rank, place), trial, place)
            for rank, trial in enumerate(self.trials)
            for place in range(len(self.grid.steps))
        ]

    def describe(self) -> list[tuple[Values, dict[int, dict[str, float]]]]:
        """Tell every trial: its settings with its best number of steps, and its results by how many pairs it saw."""
        found = []
        for rank, trial in enumerate(self.trials):
            place, _ = trial.best(self.clean_penalty)
            results = {
                len(outcome.clean): outcome.summary(place, self.clean_penalty)
                for outcome in trial.outcomes
            }
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
        if (
            len(
                {
                    trial.outcomes[last].scores(clean_penalty)[place]
                    for trial, place in group.values()
                }
            )
            > 1
        ):
            return False
    return bool(compared) and {*itertools.chain(*compared)} == {*itertools.chain(*groups.values())}


def _order(value: Any) -> tuple[bool, Any]:
    """Sort numbers by size and before words."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return not number, value if number else str(value)
