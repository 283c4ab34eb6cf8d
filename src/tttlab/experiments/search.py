"""The results of a whole tuning, and what is written about them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tttlab.adaptation.gate import Gate
from tttlab.experiments.trials import DEFAULT, Choice, Grid, Trial, Values, compare, pick

LISTED = 6  # candidates that the written choice lists: the best ones, for comparison


@dataclass(frozen=True)
class Search:
    """The results of a whole tuning.

    Attributes:
        trials: from `tttlab.experiments.tuning.successive_halving`.
        grid: the candidates that the trials number.
        trains: whether the method takes ``steps``, which a gate could save. False on a stream:
            there a candidate contains its steps, or takes the run's.
        clean_penalty: see `tttlab.experiments.gate_choice.score`.
    """

    trials: Sequence[Trial]
    grid: Grid
    trains: bool
    clean_penalty: float

    def values(self, rank: int, step_index: int) -> Values:
        """Give a trial's settings; a number of steps is added if it trains and contains none."""
        values = self.grid.candidates[self.trials[rank].number]
        if self.trains and "steps" not in values:
            return values | {"steps": self.grid.steps[step_index]}
        return values

    def choose(self, saves: Callable[[Values, Gate], bool] | None) -> dict[str, Any]:
        """Choose the settings and the gate, in the form that is written as JSON for `adapt`.

        The result contains no times, so that equal choices give equal files. Only the choice of
        the gate depends on measured time.

        Args:
            saves: tells whether a gate saves time with some settings; None: no gate is wanted.
        """
        rank, step_index = self._pick()
        values, found = self.values(rank, step_index), self.chosen()
        gate = None
        if saves and self.trains:
            gate = self.trials[rank].gate(
                step_index, self.clean_penalty, lambda gate: saves(values, gate)
            )
        return {
            "tuned": True,
            "settings": values,
            "score": found["score"],
            # The same above the network as it is, and the standard error of this difference.
            "lead": found["score"] - (found["accuracy"] - found["gain"]),
            "lead_error": self.trials[rank].outcomes[-1].lead_error(step_index, self.clean_penalty),
            "gain": found["gain"],
            "steps": list(self.grid.steps),
            "candidates": [self.entry(rank) for rank in range(min(LISTED, len(self.trials)))],
            "search": self.tried_values(),
            "without_influence": self.without_influence(),
            "gate": gate and asdict(gate),
        }

    def entry(self, rank: int) -> dict[str, Any]:
        """Describe a trial at its best number of steps: settings, score, lead over the default."""
        trial = self.trials[rank]
        default = next(trial for trial in self.trials if trial.number == DEFAULT)
        step_index, score = trial.best(self.clean_penalty)
        difference, error = compare(
            trial, step_index, default, self.grid.default_index, self.clean_penalty
        )
        return {
            "settings": self.values(rank, step_index),
            "score": score,
            "images": len(np.unique(trial.outcomes[-1].image)),
            "above_default": difference,
            "standard_error": error,
        }

    def tried_values(self) -> dict[str, list[Any]]:
        """List the values of every setting of which more than one value was tried, in order."""
        tried: dict[str, set[Any]] = {}
        for values, _, _ in self._all_values():
            for name, value in values.items():
                tried.setdefault(name, set()).add(value)
        return {
            name: sorted(values, key=_order) for name, values in tried.items() if len(values) > 1
        }

    def without_influence(self) -> list[str]:
        """Name the settings whose values all scored the same, whatever the other settings were.

        Candidates are compared on the images of the last round that they all took part in.
        Settings with values that were never compared are not named.
        """
        trials = self._all_values()
        names = dict.fromkeys(name for values, _, _ in trials for name in values)
        return [name for name in names if _all_tie(trials, name, self.clean_penalty)]

    def describe(self) -> list[tuple[Values, dict[int, dict[str, float]]]]:
        """Describe every trial at its best number of steps.

        Returns:
            for every trial its settings, and `Outcome.summary` by the number of pairs judged.
        """
        descriptions = []
        for rank, trial in enumerate(self.trials):
            step_index, _ = trial.best(self.clean_penalty)
            results = {
                len(outcome.clean): outcome.summary(step_index, self.clean_penalty)
                for outcome in trial.outcomes
            }
            descriptions.append((self.values(rank, step_index), results))
        return descriptions

    def chosen(self) -> dict[str, float]:
        """Summarise the chosen settings in the last round; see `Outcome.summary`."""
        rank, step_index = self._pick()
        return self.trials[rank].outcomes[-1].summary(step_index, self.clean_penalty)

    def _pick(self) -> Choice:
        return pick(self.trials, self.grid.default_index, self.clean_penalty)

    def _all_values(self) -> list[tuple[Values, Trial, int]]:
        """List every trial at every number of steps: the settings, the trial, the step index."""
        return [
            (self.values(rank, step_index), trial, step_index)
            for rank, trial in enumerate(self.trials)
            for step_index in range(len(self.grid.steps))
        ]


def _all_tie(trials: Sequence[tuple[Values, Trial, int]], name: str, clean_penalty: float) -> bool:
    """Tell whether all values of a setting score the same while the other settings are equal.

    False too if some value was never compared with another one.
    """
    groups: dict[tuple, dict[Any, tuple[Trial, int]]] = {}
    for values, trial, step_index in trials:
        if name in values:
            rest = tuple(pair for pair in values.items() if pair[0] != name)
            groups.setdefault(rest, {})[values[name]] = trial, step_index
    compared = [group for group in groups.values() if len(group) > 1]
    for group in compared:
        last = min(len(trial.outcomes) for trial, _ in group.values()) - 1
        scores = {
            trial.outcomes[last].scores(clean_penalty)[step_index]
            for trial, step_index in group.values()
        }
        if len(scores) > 1:
            return False
    return bool(compared) and {*itertools.chain(*compared)} == {*itertools.chain(*groups.values())}


def _order(value: Any) -> tuple[bool, Any]:
    """Sort numbers by size and before words."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return not is_number, value if is_number else str(value)
