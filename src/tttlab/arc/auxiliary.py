"""Auxiliary tasks: the same task, turned or mirrored, in other colours.

A rule stays a rule under them, so that a few demonstrations become many. Each auxiliary task has a
task token of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tttlab.arc.tasks import COLOURS

SYMMETRIES = (
    "none",
    "turn90",
    "turn180",
    "turn270",
    "flip_rows",
    "flip_columns",
    "transpose",
    "antitranspose",
)
_INVERSES = {"turn90": "turn270", "turn270": "turn90"}


def turned(grid: np.ndarray, symmetry: str) -> np.ndarray:
    """Turn (counter-clockwise) or mirror a grid ``(…, H, W)``."""
    axes = (-2, -1)
    match symmetry:
        case "none":
            return grid
        case "turn90" | "turn180" | "turn270":
            return np.rot90(grid, int(symmetry.removeprefix("turn")) // 90, axes)
        case "flip_rows":
            return np.flip(grid, -2)
        case "flip_columns":
            return np.flip(grid, -1)
        case "transpose":
            return np.swapaxes(grid, *axes)
        case "antitranspose":
            return np.swapaxes(np.flip(grid, axes), *axes)
    raise AssertionError(symmetry)


@dataclass(frozen=True)
class Auxiliary:
    """One auxiliary task.

    Attributes:
        symmetry: one of `SYMMETRIES`.
        colours: by which each of the ten colours is replaced.
    """

    symmetry: str = "none"
    colours: tuple[int, ...] = tuple(range(COLOURS))

    def apply(self, grid: np.ndarray) -> np.ndarray:
        """Transform a grid ``(H, W)``."""
        return turned(np.asarray(self.colours, np.int8)[grid], self.symmetry)

    def invert(self, grid: np.ndarray) -> np.ndarray:
        """Undo `apply`."""
        back = np.argsort(self.colours).astype(np.int8)
        return back[turned(grid, _INVERSES.get(self.symmetry, self.symmetry))]


def draw_auxiliaries(
    generator: np.random.Generator, symmetries: Sequence[str], colour_maps: int
) -> tuple[Auxiliary, ...]:
    """Draw auxiliary tasks: the task itself, then every symmetry in every colour map.

    Black, the background of most grids, is kept.
    """
    drawn = [Auxiliary()]
    for symmetry in symmetries:
        for _ in range(colour_maps):
            colours = (0, *(1 + generator.permutation(COLOURS - 1)).tolist())
            drawn.append(Auxiliary(symmetry, tuple(map(int, colours))))
    return tuple(drawn)
