"""Rules whose output has a size of its own.

Each draws a task's own constants, and returns what makes its pairs.
"""

import numpy as np
from scipy import ndimage

from tttlab.arc.auxiliary import SYMMETRIES, turned
from tttlab.arc.invented import scenes
from tttlab.arc.invented.rule import Grids, Maker
from tttlab.arc.invented.scenes import Size, blob, block, colours


def turn(task: np.random.Generator, largest: int) -> Maker:
    """Turn or mirror the whole grid."""
    size, palette = Size.of_task(task, 2, largest), colours(task, int(task.integers(2, 6)))
    symmetry, share = SYMMETRIES[task.integers(1, 8)], task.choice([0.4, 1.0])

    def make(generator: np.random.Generator) -> Grids:
        grid = scenes.scattered(generator, size.draw(generator), palette, share)
        return grid, turned(grid, symmetry)

    return make


def mirrored(task: np.random.Generator, largest: int) -> Maker:
    """Put the grid's mirror images beside it."""
    size, palette = Size.of_task(task, 2, largest // 2), colours(task, int(task.integers(1, 5)))
    way, before = task.integers(3), task.random() < 0.3
    share = task.choice([0.5, 1.0])

    def make(generator: np.random.Generator) -> Grids:
        grid = scenes.scattered(generator, size.draw(generator), palette, share)
        output = grid
        for axis in ((0,), (1,), (0, 1))[way]:
            parts = [output, np.flip(output, axis)]
            output = np.concatenate(parts[::-1] if before else parts, axis)
        return grid, output

    return make


def tiled(task: np.random.Generator, largest: int) -> Maker:
    """Repeat the grid, every second time turned or mirrored."""
    rows, columns = task.integers(1, 4, 2).tolist()
    if rows == columns == 1:
        rows = 2
    most = max(largest // max(rows, columns), 2)
    size, palette = Size.of_task(task, 2, most), colours(task, int(task.integers(1, 5)))
    symmetry = ["none", "none", "flip_rows", "flip_columns", "turn180"][task.integers(5)]
    share = task.choice([0.5, 1.0])

    def make(generator: np.random.Generator) -> Grids:
        grid = scenes.scattered(generator, size.draw(generator), palette, share)
        other = turned(grid, symmetry)
        parts = [
            [grid if (row + column) % 2 == 0 else other for column in range(columns)]
            for row in range(rows)
        ]
        return grid, np.block(parts)

    return make


def enlarged(task: np.random.Generator, largest: int) -> Maker:
    """Enlarge cells, or the other way round."""
    factor, back = int(task.integers(2, 4)), task.random() < 0.4
    size, palette = Size.of_task(task, 2, max(largest // factor, 2)), colours(task, 4)
    share = task.choice([0.5, 1.0])

    def make(generator: np.random.Generator) -> Grids:
        grid = scenes.scattered(generator, size.draw(generator), palette, share)
        large = np.kron(grid, np.ones((factor, factor), np.int8))
        return (large, grid) if back else (grid, large)

    return make


def self_tiled(task: np.random.Generator, _largest: int) -> Maker:
    """Put the grid where it has a colour, or where it has none."""
    side = 3 if task.random() < 0.7 else 2
    palette, inverse = colours(task, int(task.integers(1, 4))), task.random() < 0.3

    def make(generator: np.random.Generator) -> Grids:
        grid = scenes.scattered(generator, (side, side), palette, 0.5)
        where = (grid == 0) if inverse else (grid > 0)
        return grid, np.kron(where.astype(np.int8), grid)

    return make


def cropped(task: np.random.Generator, largest: int) -> Maker:
    """Cut out one object: the largest, the one of a colour, or all that is coloured."""
    size, palette = Size.of_task(task, 5, largest), colours(task, 4)
    kind = task.integers(3)

    def make(generator: np.random.Generator) -> Grids:
        shapes = [blob(generator, 5) | block(generator, 1)]
        if kind < 2:
            shapes += [blob(generator, 3) for _ in range(generator.integers(1, 4))]
        grid = scenes.placed(generator, size.draw(generator), shapes[:1], palette[:1])
        others = scenes.placed(generator, grid.shape, shapes[1:], palette[1:])
        near = ndimage.binary_dilation(grid > 0, scenes.ROUND)
        if kind == 2:
            grid = np.where(grid > 0, generator.choice(palette, grid.shape), 0).astype(np.int8)
        else:
            grid = np.where(near, grid, others).astype(np.int8)
        found = scenes.objects(grid)
        if not found:
            return grid, grid
        if kind == 0:
            chosen = max(found, key=np.sum)
        elif kind == 1:
            chosen = grid == palette[0]
        else:
            chosen = grid > 0
        return grid, np.where(chosen, grid, 0)[scenes.box(chosen)].astype(np.int8)

    return make


_LOGIC = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "nor": lambda first, second: ~(first | second),
    "without": lambda first, second: first & ~second,
}


def combined(task: np.random.Generator, largest: int) -> Maker:
    """Combine two parts, side by side, cell by cell; a line may lie between them."""
    line = task.random() < 0.7
    size = Size.of_task(task, 2, (largest - line) // 2)
    first, second, divider, ink = colours(task, 4)
    if task.random() < 0.3:
        second = first
    logic = _LOGIC[list(_LOGIC)[task.integers(5)]]
    below, layered = task.random() < 0.4, task.random() < 0.25

    def make(generator: np.random.Generator) -> Grids:
        height, width = size.draw(generator)
        left = scenes.scattered(generator, (height, width), [first], 0.5)
        right = scenes.scattered(generator, (height, width), [second], 0.5)
        bar = np.full((height, int(line)), divider, np.int8)
        grid = np.concatenate([left, bar, right], 1)
        output = logic(left > 0, right > 0).astype(np.int8) * np.int8(ink)
        if layered:
            output = np.where(left > 0, left, right)
        return (grid.T, output.T) if below else (grid, output)

    return make


def part(task: np.random.Generator, largest: int) -> Maker:
    """Take one half, one quarter, or what a frame encloses."""
    size, palette = Size.of_task(task, 2, (largest - 1) // 2), colours(task, 6)
    kind, corner = task.integers(3), task.integers(2, size=2)

    def make(generator: np.random.Generator) -> Grids:
        height, width = size.draw(generator)
        if kind == 2:
            inside = scenes.scattered(generator, (height, width), palette[:4], 0.6)
            return np.pad(inside, 1, constant_values=palette[5]), inside
        whole = (2 * height, 2 * width) if kind else (height, 2 * width)
        grid = scenes.scattered(generator, whole, palette, 1.0)
        top, left = corner * (height, width) * (kind, 1)
        output = grid[top : top + height, left : left + width]
        return (grid.T, output.T) if kind == 0 and corner[0] else (grid, output)

    return make


def most(task: np.random.Generator, largest: int) -> Maker:
    """Answer with the most frequent colour, as one cell or over the whole grid."""
    size, palette = Size.of_task(task, 3, min(largest, 6)), colours(task, int(task.integers(3, 6)))
    single, rare = task.random() < 0.5, task.random() < 0.3

    def make(generator: np.random.Generator) -> Grids:
        grid = scenes.scattered(generator, size.draw(generator), palette, 1.0)
        counts = np.bincount(grid.flat, minlength=10)
        present = counts[counts > 0]
        wanted = present.min() if rare else present.max()
        if (counts == wanted).sum() > 1:
            return grid, grid
        colour = int(np.flatnonzero(counts == wanted)[0])
        return grid, np.full((1, 1) if single else grid.shape, colour, np.int8)

    return make


def different(task: np.random.Generator, largest: int) -> Maker:
    """Of three parts find the one that differs from the two others."""
    side = int(task.integers(2, max(3, largest // 3 + 1)))
    palette, below = colours(task, int(task.integers(1, 4))), task.random() < 0.5

    def make(generator: np.random.Generator) -> Grids:
        same = scenes.scattered(generator, (side, side), palette, 0.5)
        odd = scenes.scattered(generator, (side, side), palette, 0.5)
        parts = [same, same]
        parts.insert(int(generator.integers(3)), odd)
        if (same == odd).all():
            return odd, odd
        return np.concatenate(parts, 0 if below else 1), odd

    return make


def counted(task: np.random.Generator, largest: int) -> Maker:
    """Count objects or cells: the answer is a row of as many cells."""
    size, palette = Size.of_task(task, 3, largest), colours(task, 3)
    length, objects = int(task.integers(3, 6)), task.random() < 0.5
    padded, ink = task.random() < 0.6, palette[0] if task.random() < 0.6 else palette[1]

    def make(generator: np.random.Generator) -> Grids:
        number = int(generator.integers(1, length + 1))
        shape = size.draw(generator)
        if objects:
            shapes = [block(generator, 2) for _ in range(number)]
            grid = scenes.placed(generator, shape, shapes, palette[:1])
            number = len(scenes.objects(grid))
        else:
            grid = scenes.few(generator, shape, palette[:1], number)
        output = np.zeros((1, length if padded else max(number, 1)), np.int8)
        output[0, :number] = ink
        return grid, output

    return make


def condensed(task: np.random.Generator, largest: int) -> Maker:
    """Remove rows or columns that repeat the one before, or that are black."""
    size, palette = Size.of_task(task, 2, largest // 2), colours(task, 4)
    rows_only, black = task.random() < 0.4, task.random() < 0.4

    def make(generator: np.random.Generator) -> Grids:
        height, width = size.draw(generator)
        small = scenes.scattered(generator, (height, width), palette, 1.0)
        grid = small
        for axis in (0,) if rows_only else (0, 1):
            counts = generator.integers(1, 3, small.shape[axis])
            if black:
                grid = np.insert(grid, np.flatnonzero(counts > 1), 0, axis)
            else:
                grid = np.repeat(grid, counts, axis)
        return grid, small

    return make


RULES = (
    turn,
    mirrored,
    tiled,
    enlarged,
    self_tiled,
    cropped,
    combined,
    part,
    most,
    different,
    counted,
    condensed,
)
