"""Rules that paint beside, between, around or inside what is there; the size stays.

Each rule draws a task's own constants, and returns what makes its pairs.
"""

import numpy as np
from scipy import ndimage

from tttlab.arc.invented import scenes
from tttlab.arc.invented.rule import Grids, Maker
from tttlab.arc.invented.scenes import DIAGONAL, PLUS, ROUND, Size, blob, block, colours, ring

_LEAST = 3


_DIRECTIONS = {
    "right": [(0, 1)],
    "down": [(1, 0)],
    "left": [(0, -1)],
    "up": [(-1, 0)],
    "row": [(0, 1), (0, -1)],
    "column": [(1, 0), (-1, 0)],
    "plus": [(0, 1), (0, -1), (1, 0), (-1, 0)],
    "cross": [(1, 1), (1, -1), (-1, 1), (-1, -1)],
    "falling": [(1, 1), (-1, -1)],
    "slope": [(1, 1)],
}


def rays(task: np.random.Generator, largest: int) -> Maker:
    """Draw rays from cells to the edge, in the cell's colour or another."""
    size, palette = Size.of_task(task, _LEAST, largest), colours(task, 4)
    names = list(_DIRECTIONS)
    by_colour = task.random() < 0.3
    ways = {colour: _DIRECTIONS[names[task.integers(len(names))]] for colour in palette[:2]}
    if not by_colour:
        ways = dict.fromkeys(ways, ways[palette[0]])
    ink = palette[2] if task.random() < 0.4 else None
    most = int(task.integers(1, 4))

    def make(generator: np.random.Generator) -> Grids:
        shape = size.draw(generator)
        grid = scenes.few(generator, shape, palette[:2], int(generator.integers(1, most + 1)))
        output = grid.copy()
        for row, column in np.argwhere(grid):
            for down, right in ways[int(grid[row, column])]:
                y, x = row + down, column + right
                while 0 <= y < shape[0] and 0 <= x < shape[1]:
                    if not grid[y, x]:
                        output[y, x] = ink or grid[row, column]
                    y, x = y + down, x + right
        return grid, output

    return make


def connect(task: np.random.Generator, largest: int) -> Maker:
    """Join cells of one colour that share a row or column."""
    size, palette = Size.of_task(task, 5, largest), colours(task, 3)
    ink = palette[2] if task.random() < 0.5 else None

    def make(generator: np.random.Generator) -> Grids:
        shape = size.draw(generator)
        grid = scenes.few(generator, shape, palette[:2], int(generator.integers(3, 8)))
        output = grid.copy()
        for turned, drawn in ((grid, output), (grid.T, output.T)):
            for line, target in zip(turned, drawn, strict=True):
                for colour in palette[:2]:
                    found = np.flatnonzero(line == colour)
                    if len(found) == 2 and not line[found[0] + 1 : found[1]].any():
                        target[found[0] + 1 : found[1]] = ink or colour
        return grid, output

    return make


def grow(task: np.random.Generator, largest: int) -> Maker:
    """Paint the black neighbours of cells or objects of one colour."""
    size, palette = Size.of_task(task, 5, largest), colours(task, 4)
    near = [PLUS, ROUND, DIAGONAL][task.integers(3)]
    single, both = task.random() < 0.6, task.random() < 0.5
    inks = {palette[0]: palette[2]} | ({palette[1]: palette[3]} if both else {})

    def make(generator: np.random.Generator) -> Grids:
        shape = size.draw(generator)
        shapes = [block(generator, 1 if single else 3) for _ in range(generator.integers(1, 5))]
        grid = scenes.placed(generator, shape, shapes, palette[:2])
        output = grid.copy()
        for colour, ink in inks.items():
            output[ndimage.binary_dilation(grid == colour, near) & (grid == 0)] = ink
        return grid, output

    return make


def fill(task: np.random.Generator, largest: int) -> Maker:
    """Fill what outlines enclose, or all that they do not."""
    size, palette = Size.of_task(task, 6, largest), colours(task, 3)
    outside, own = task.random() < 0.2, task.random() < 0.2

    def make(generator: np.random.Generator) -> Grids:
        shapes = [ring(generator, 6) for _ in range(generator.integers(1, 4))]
        shapes += [blob(generator, 2) for _ in range(generator.integers(3))]
        grid = scenes.placed(generator, size.draw(generator), shapes, palette[: 1 + own])
        output = grid.copy()
        for mask in scenes.objects(grid):
            inside = ndimage.binary_fill_holes(mask) & (grid == 0)
            output[inside] = grid[mask][0] if own else palette[2]
        if outside:
            output = np.where(output == palette[2], 0, np.where(grid == 0, palette[2], grid))
        return grid, output.astype(np.int8)

    return make


def hollow(task: np.random.Generator, largest: int) -> Maker:
    """Paint the inside of rectangles, their corners, or their rim."""
    size, palette = Size.of_task(task, 6, largest), colours(task, 2)
    ink = palette[1] if task.random() < 0.7 else 0
    part = task.integers(3)

    def make(generator: np.random.Generator) -> Grids:
        shapes = [block(generator, 6, 3) for _ in range(generator.integers(1, 4))]
        grid = scenes.placed(generator, size.draw(generator), shapes, palette[:1])
        output = grid.copy()
        for mask in scenes.objects(grid):
            corner = np.zeros_like(mask[scenes.box(mask)])
            corner[[0, 0, -1, -1], [0, -1, 0, -1]] = True
            inside = ndimage.binary_erosion(np.pad(mask, 1), ROUND)[1:-1, 1:-1]
            if part == 0:
                output[inside] = ink
            elif part == 1:
                output[scenes.box(mask)][corner] = ink
            else:
                output[mask & ~inside] = ink
        return grid, output

    return make


def cross(task: np.random.Generator, largest: int) -> Maker:
    """Paint where lines cross; the lines are given, or marks at the edge say where they are."""
    size, palette = Size.of_task(task, 4, largest), colours(task, 3)
    given = task.random() < 0.5

    def make(generator: np.random.Generator) -> Grids:
        shape = size.draw(generator)
        grid, output = scenes.empty(shape), scenes.empty(shape)
        rows = generator.permutation(shape[0])[: generator.integers(1, 3)]
        columns = generator.permutation(shape[1])[: generator.integers(1, 3)]
        output[rows] = palette[0]
        output[:, columns] = palette[1]
        if given:  # the lines are there
            grid = output.copy()
            output[np.ix_(rows, columns)] = palette[2]
        else:  # marks at the edge say where they are
            grid[rows, 0], grid[0, columns] = palette[0], palette[1]
            grid[0, 0] = 0
            output[np.ix_(rows, columns)] = palette[2]
            if 0 in rows or 0 in columns:
                return grid, grid
        return grid, output

    return make


def frame(task: np.random.Generator, largest: int) -> Maker:
    """Draw a frame along the edge, over all that is there."""
    size, palette = Size.of_task(task, _LEAST, largest), colours(task, 3)
    share = task.uniform(0.0, 0.5)

    def make(generator: np.random.Generator) -> Grids:
        grid = scenes.scattered(generator, size.draw(generator), palette[:2], share)
        output = np.full_like(grid, palette[2])
        output[1:-1, 1:-1] = grid[1:-1, 1:-1]
        return grid, output

    return make


RULES = (rays, connect, grow, fill, hollow, cross, frame)
