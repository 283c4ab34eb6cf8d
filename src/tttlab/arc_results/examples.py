"""Tasks as people know them: what was shown and asked, what was answered, what is right."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tttlab.arc.tasks import Answers, ArcTask, Pair
from tttlab.arc.votes import GridKey

SHOWN_VOTES = 3
GROUPS = ("won", "lost", "never", "both")
_GROUP_OF = {  # by whether it is solved without, and with
    (False, True): "won",
    (True, False): "lost",
    (False, False): "never",
    (True, True): "both",
}


@dataclass(frozen=True)
class Guess:
    """A grid that was voted for.

    Attributes:
        grid: ``(H, W)``; empty where no view gave a grid.
        votes: views that gave it.
        views: views that voted in all.
        right: whether it is the answer.
        wrong_cells: cells that are not the answer's; None where the size is another.
    """

    grid: np.ndarray
    votes: int
    views: int
    right: bool
    wrong_cells: int | None

    @property
    def share(self) -> float:
        """The share of the voting views that gave it."""
        return self.votes / self.views if self.views else 0.0


@dataclass(frozen=True)
class Question:
    """A question with its answers.

    Attributes:
        grid: what is asked.
        before: guesses without test-time training, most votes first.
        after: guesses by the number of steps.
        answer: the right one.
    """

    grid: np.ndarray
    before: tuple[Guess, ...]
    after: Mapping[int, tuple[Guess, ...]]
    answer: np.ndarray

    @property
    def votes(self) -> tuple[Guess, ...]:
        """The guesses after the last step."""
        return self.after[max(self.after)]


@dataclass(frozen=True)
class Example:
    """A task with its answers.

    Attributes:
        name: of the task.
        group: one of `GROUPS`.
        solved_at: numbers of steps after which it is solved.
        demonstrations: what shows its rule.
        questions: what is asked.
    """

    name: str
    group: str
    solved_at: tuple[int, ...]
    demonstrations: tuple[Pair, ...]
    questions: tuple[Question, ...]

    @property
    def longest_side(self) -> int:
        """Return the most cells along a side of any grid."""
        grids = [grid for pair in self.demonstrations for grid in pair]
        for question in self.questions:
            guesses = [*question.before, *(g for gs in question.after.values() for g in gs)]
            grids += [question.grid, question.answer, *(guess.grid for guess in guesses)]
        return max(side for grid in grids for side in grid.shape)


def gather(
    tasks: Iterable[ArcTask],
    answers: Answers,
    votes: tuple[pd.DataFrame, pd.DataFrame],
    solved: tuple[pd.DataFrame, pd.DataFrame],
) -> dict[str, list[Example]]:
    """Put every task with its answers into a group.

    Args:
        tasks: those that were asked.
        answers: to their questions.
        votes: without and with test-time training, from `results.read_votes`.
        solved: the same, from `scores.score`.

    Returns:
        by `GROUPS`: solved only with test-time training, only without, not at all, both ways.
    """
    before, after = (_guesses(table, answers) for table in votes)
    without, with_ = (_solved_at(table) for table in solved)
    steps, none = sorted({step for _, _, step in after}), max(step for _, _, step in before)
    groups: dict[str, list[Example]] = {group: [] for group in GROUPS}
    for task in tasks:
        was, is_now = none in without[task.name], steps[-1] in with_[task.name]
        group = _GROUP_OF[was, is_now]
        questions = tuple(
            Question(
                grid,
                before[task.name, number, none],
                {step: after[task.name, number, step] for step in steps},
                answers[task.name][number],
            )
            for number, grid in enumerate(task.questions)
        )
        example = Example(task.name, group, with_[task.name], task.demonstrations, questions)
        groups[group].append(example)
    return groups


def _guesses(
    votes: pd.DataFrame, answers: Answers
) -> dict[tuple[str, int, int], tuple[Guess, ...]]:
    """Make the first guesses by task, question and number of steps; none where no view voted."""
    found = {
        (task, number, steps): []
        for steps in votes["steps"].unique().tolist()
        for task, grids in answers.items()
        for number in range(len(grids))
    }
    table = votes[votes["place"].between(1, SHOWN_VOTES)].sort_values("place")
    for row in table.itertuples():
        guess = _guess(row.key, row.votes, row.views, answers[row.task][row.question])
        found[row.task, row.question, row.steps].append(guess)
    return {key: tuple(guesses) for key, guesses in found.items()}


def _guess(key: GridKey, votes: int, views: int, answer: np.ndarray) -> Guess:
    grid = key.grid
    wrong = int((grid != answer).sum()) if grid.shape == answer.shape else None
    return Guess(grid, votes, views, wrong == 0, wrong)


def _solved_at(scores: pd.DataFrame) -> dict[str, tuple[int, ...]]:
    """List the numbers of steps after which each task is solved."""
    return {
        task: tuple(part.loc[part["pass2"].astype(bool), "steps"].tolist())
        for task, part in scores.groupby("task")
    }
