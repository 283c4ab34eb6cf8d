"""Random inputs for invented tasks: scattered cells, objects, rectangles, patterns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from tttlab.arc.tasks import COLOURS

ROUND = np.ones((3, 3), bool)  # a cell and its eight neighbours
PLUS = ndimage.generate_binary_structure(2, 1)  # a cell and its four neighbours
DIAGONAL = ROUND & ~PLUS


def colours(generator: np.random.Generator, count: int) -> list[int]:
    """Draw different colours, none of them black."""
    return (1 + generator.permutation(COLOURS - 1)[:count]).tolist()


@dataclass(frozen=True)
class Size:
    """The size of a task's grids: one for all, or another for every pair.

    Attributes:
        least: cells along a side, at least.
        most: at most.
        fixed: height and width of all; None: drawn for each.
    """

    least: int
    most: int
    fixed: tuple[int, int] | None

    @classmethod
    def of_task(cls, generator: np.random.Generator, least: int, most: int) -> "Size":
        """Draw the sizes of one task."""
        fixed = cls._any(generator, least, most) if generator.random() < 0.5 else None
        return cls(least, most, fixed)

    def draw(self, generator: np.random.Generator) -> tuple[int, int]:
        """Draw height and width of one grid."""
        return self.fixed or self._any(generator, self.least, self.most)

    @staticmethod
    def _any(generator: np.random.Generator, least: int, most: int) -> tuple[int, int]:
        height, width = generator.integers(least, most + 1, 2).tolist()
        return (height, height) if generator.random() < 0.5 else (height, width)


def empty(size: tuple[int, int]) -> np.ndarray:
    """Make a black grid."""
    return np.zeros(size, np.int8)


def scattered(
    generator: np.random.Generator, size: tuple[int, int], palette: Sequence[int], share: float
) -> np.ndarray:
    """Scatter cells of a palette over a black grid; ``share`` of all cells are hit."""
    drawn = generator.choice(np.asarray(palette, np.int8), size)
    return np.where(generator.random(size) < share, drawn, 0).astype(np.int8)


def few(
    generator: np.random.Generator, size: tuple[int, int], palette: Sequence[int], count: int
) -> np.ndarray:
    """Put ``count`` cells of a palette at different places of a black grid."""
    grid = empty(size)
    places = generator.permutation(grid.size)[:count]
    grid.flat[places] = generator.choice(np.asarray(palette, np.int8), len(places))
    return grid


def blob(generator: np.random.Generator, largest: int) -> np.ndarray:
    """Draw a connected shape ``(H, W)`` of at most ``largest`` cells a side, as a mask."""
    height, width = generator.integers(1, largest + 1, 2)
    shape = generator.random((height, width)) < generator.choice([0.6, 0.8, 1.0])
    labels, number = ndimage.label(shape, ROUND)
    if not number:
        return np.ones((1, 1), bool)
    shape = labels == 1 + np.argmax(np.bincount(labels.flat)[1:])
    return shape[shape.any(1)][:, shape.any(0)]


def ring(generator: np.random.Generator, largest: int) -> np.ndarray:
    """Draw the outline of a rectangle of three to ``largest`` cells a side, as a mask."""
    shape = np.ones(generator.integers(3, max(largest, 3) + 1, 2), bool)
    shape[1:-1, 1:-1] = False
    return shape


def block(generator: np.random.Generator, largest: int, least: int = 1) -> np.ndarray:
    """Draw a full rectangle of ``least`` to ``largest`` cells a side, as a mask."""
    return np.ones(generator.integers(least, largest + 1, 2), bool)


def placed(
    generator: np.random.Generator,
    size: tuple[int, int],
    shapes: Sequence[np.ndarray],
    palette: Sequence[int],
) -> np.ndarray:
    """Put shapes onto a black grid, each in a colour of the palette, none touching another.

    A shape that finds no place is left out.
    """
    grid = empty(size)
    for shape in shapes:
        rows, columns = size[0] - shape.shape[0] + 1, size[1] - shape.shape[1] + 1
        if rows < 1 or columns < 1:
            continue
        near = ndimage.binary_dilation(grid > 0, ROUND)
        for _ in range(8):
            top, left = int(generator.integers(rows)), int(generator.integers(columns))
            place = np.s_[top : top + shape.shape[0], left : left + shape.shape[1]]
            if not (near[place] & shape).any():
                grid[place][shape] = generator.choice(np.asarray(palette))
                break
    return grid


def objects(grid: np.ndarray) -> list[np.ndarray]:
    """List the masks of all objects: connected cells that are not black."""
    labels, number = ndimage.label(grid > 0, ROUND)
    return [labels == label for label in range(1, number + 1)]


def box(mask: np.ndarray) -> tuple[slice, slice]:
    """Find the bounding box of a mask."""
    return ndimage.find_objects(mask.astype(np.int8))[0]
