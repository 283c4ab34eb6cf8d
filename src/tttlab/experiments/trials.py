"""What a tuning has found out about each candidate, and the choice among them.

The best of many candidates is partly the luckiest one. So the run's own values stay unless the
best candidate is better by more than one standard error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tttlab.adaptation.gate import Gate
from tttlab.evaluation.intervals import crossed_standard_error
from tttlab.experiments.gate_choice import by_image_and_type, choose_gate, score

Values = dict[str, Any]
DEFAULT = 0  # the candidate that holds the run's own values


class Grid(NamedTuple):
    """The settings to compare.

    Where one pass does not show several numbers of steps, the candidates contain their steps and
    ``steps`` is ``(0,)``.

    Attributes:
        candidates: without their steps; the run's own values first, the others in grid order.
        steps: the numbers of steps, ascending.
        default_index: index of the run's own number of steps in ``steps``.
    """

    candidates: list[Values]
    steps: tuple[int, ...]
    default_index: int


@dataclass(frozen=True)
class Outcome:
    """What one candidate did to N (image, shift) pairs.

    Attributes:
        image: ``(N,)`` number of the image.
        corruption: ``(N,)`` number of the corruption type, −1 for an image without a shift.
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
        """Mark the pairs without a shift ``(N,)``."""
        return self.corruption < 0

    def scores(self, clean_penalty: float) -> np.ndarray:
        """Score every number of steps ``(R,)``."""
        return np.array(
            [score(self.source, right, self.clean, clean_penalty) for right in self.adapted.T]
        )

    def cells(self, step_index: int, clean_penalty: float) -> np.ndarray:
        """Divide the score of a number of steps among the n images and the C corruption types.

        Every image carries its own part of the clean penalty, the same under all corruptions.

        Returns:
            ``(n, C)`` values, whose mean is the score.
        """
        return self._cells(self.adapted[:, step_index], clean_penalty)

    def lead_error(self, step_index: int, clean_penalty: float) -> float:
        """Give the standard error of a number of steps' score above the source network's.

        Images and corruption types are both random, as in `compare`.
        """
        before = self._cells(self.source, clean_penalty)
        return crossed_standard_error(self.cells(step_index, clean_penalty) - before)

    def _cells(self, right: np.ndarray, clean_penalty: float) -> np.ndarray:
        clean = self.clean
        cells = by_image_and_type(right[~clean], self.image[~clean], self.corruption[~clean])
        if (lost := self.source[clean] - right[clean]).sum() > 0:
            cells -= clean_penalty * lost[np.argsort(self.image[clean])][:, None]
        return cells

    def summary(self, step_index: int, clean_penalty: float) -> dict[str, float]:
        """Summarise what one number of steps gains and costs."""
        right, clean = self.adapted[:, step_index], self.clean
        return {
            "score": float(self.scores(clean_penalty)[step_index]),
            "accuracy": float(right[~clean].mean()),
            "gain": float(right[~clean].mean() - self.source[~clean].mean()),
            "clean_change": float(right[clean].mean() - self.source[clean].mean()),
            "milliseconds": float(self.milliseconds[step_index]),
        }


@dataclass(frozen=True)
class Trial:
    """A candidate with its outcomes.

    Attributes:
        number: its index among the candidates.
        outcomes: one per round that it took part in, each on all images up to that round.
    """

    number: int
    outcomes: tuple[Outcome, ...]

    def best(self, clean_penalty: float) -> tuple[int, float]:
        """Give the index of the number of steps that was best in the last round, and its score.

        Of equal scores the one with the fewest steps wins.
        """
        scores = self.outcomes[-1].scores(clean_penalty)
        return int(scores.argmax()), float(scores.max())

    def gate(
        self, step_index: int, clean_penalty: float, saves: Callable[[Gate], bool]
    ) -> Gate | None:
        """Choose a gate at one number of steps; None: adapting to every image is best."""
        last = self.outcomes[-1]
        adapted = last.adapted[:, step_index]
        return choose_gate(
            last.signals, last.source, adapted, last.image, last.corruption, clean_penalty, saves
        )


class Choice(NamedTuple):
    """The rank of a trial, and the index of its number of steps."""

    rank: int
    step_index: int


def compare(
    trial: Trial, step_index: int, default: Trial, default_index: int, clean_penalty: float
) -> tuple[float, float]:
    """Compare a candidate's score with the default's on the same images.

    The standard error treats images and corruption types both as drawn at random, because a
    setting must hold under types that it has not seen.

    Args:
        trial: the candidate.
        step_index: index of its number of steps.
        default: the run's own values.
        default_index: index of their number of steps.
        clean_penalty: see `tttlab.experiments.gate_choice.score`.

    Returns:
        the candidate's score minus the default's, and the standard error of this difference.
    """
    turn = len(trial.outcomes) - 1  # the default took part in every round
    cells = trial.outcomes[turn].cells(step_index, clean_penalty)
    cells = cells - default.outcomes[turn].cells(default_index, clean_penalty)
    return float(cells.mean()), crossed_standard_error(cells)


def pick(trials: Sequence[Trial], default_index: int, clean_penalty: float) -> Choice:
    """Pick the best trial if it beats the run's own values by over one standard error, else these.

    Args:
        trials: from `tttlab.experiments.tuning.successive_halving`.
        default_index: index of the run's own number of steps.
        clean_penalty: see `tttlab.experiments.gate_choice.score`.
    """
    rank = next(rank for rank, trial in enumerate(trials) if trial.number == DEFAULT)
    step_index, _ = trials[0].best(clean_penalty)
    difference, error = compare(trials[0], step_index, trials[rank], default_index, clean_penalty)
    return Choice(0, step_index) if difference > error + 1e-9 else Choice(rank, default_index)
