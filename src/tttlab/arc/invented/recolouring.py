"""Rules that give cells or objects other colours; the size stays.

Each rule draws a task's own constants, and returns what makes its pairs.
"""

import numpy as np

from tttlab.arc.invented import scenes
from tttlab.arc.invented.rule import Grids, Maker
from tttlab.arc.invented.scenes import Size, blob, block, colours

_LEAST = 3


def recolour(task: np.random.Generator, largest: int) -> Maker:
    """Replace colours by others."""
    size, count = Size.of_task(task, _LEAST, largest), int(task.integers(1, 5))
    old = colours(task, count + 1)
    table = np.arange(10, dtype=np.int8)
    table[old[:count]] = (
        task.permutation(old)[:count] if task.random() < 0.5 else colours(task, count)
    )
    full = task.random() < 0.4

    def make(generator: np.random.Generator) -> Grids:
        shape = size.draw(generator)
        grid = scenes.scattered(generator, shape, old, 1.0 if full else 0.4)
        return grid, table[grid]

    return make


def clean(task: np.random.Generator, largest: int) -> Maker:
    """Remove single cells, or give them another colour."""
    size, palette = Size.of_task(task, 6, largest), colours(task, 3)
    ink = palette[2] if task.random() < 0.4 else 0
    only = palette[:1] if task.random() < 0.5 else palette[:2]

    def make(generator: np.random.Generator) -> Grids:
        shapes = [block(generator, 4, 2) for _ in range(generator.integers(1, 4))]
        shapes += [block(generator, 1) for _ in range(generator.integers(1, 6))]
        grid = scenes.placed(generator, size.draw(generator), shapes, only)
        output = grid.copy()
        for mask in scenes.objects(grid):
            if mask.sum() == 1:
                output[mask] = ink
        return grid, output

    return make


def by_size(task: np.random.Generator, largest: int) -> Maker:
    """Recolour or remove objects by how many cells they have."""
    size, palette = Size.of_task(task, 6, largest), colours(task, 4)
    kind = ["largest", "smallest", "count"][task.integers(3)]
    chosen, others = palette[1], 0 if task.random() < 0.3 else palette[0]

    def make(generator: np.random.Generator) -> Grids:
        shapes = [blob(generator, 4) for _ in range(generator.integers(2, 6))]
        grid = scenes.placed(generator, size.draw(generator), shapes, palette[:1])
        found, output = scenes.objects(grid), grid.copy()
        counts = [int(mask.sum()) for mask in found]
        if not counts:
            return grid, grid
        extreme = max(counts) if kind == "largest" else min(counts)
        if kind != "count" and counts.count(extreme) > 1:
            return grid, grid
        for mask, count in zip(found, counts, strict=True):
            if kind == "count":
                output[mask] = palette[min(count, 3)]
            else:
                output[mask] = chosen if count == extreme else others
        return grid, output

    return make


def touch(task: np.random.Generator, largest: int) -> Maker:
    """Recolour objects that touch the edge, or those that do not."""
    size, palette = Size.of_task(task, 5, largest), colours(task, 2)
    touching = task.random() < 0.5

    def make(generator: np.random.Generator) -> Grids:
        shapes = [blob(generator, 3) for _ in range(generator.integers(2, 6))]
        grid = scenes.placed(generator, size.draw(generator), shapes, palette[:1])
        output = grid.copy()
        for mask in scenes.objects(grid):
            edge = mask[[0, -1]].any() or mask[:, [0, -1]].any()
            if edge == touching:
                output[mask] = palette[1]
        return grid, output

    return make


def alternate(task: np.random.Generator, largest: int) -> Maker:
    """Recolour every second row or column of what is coloured, or a chessboard of it."""
    size, palette = Size.of_task(task, _LEAST, largest), colours(task, 2)
    axis, odd = task.integers(3), int(task.integers(2))

    def make(generator: np.random.Generator) -> Grids:
        shape = size.draw(generator)
        shapes = [block(generator, 5, 2) for _ in range(3)]
        grid = scenes.placed(generator, shape, shapes, palette[:1])
        row, column = np.indices(shape)
        which = [row, column, row + column][axis] % 2 == odd
        return grid, np.where((grid > 0) & which, palette[1], grid).astype(np.int8)

    return make


def ranked(task: np.random.Generator, largest: int) -> Maker:
    """Colour bars by their length."""
    size, palette = Size.of_task(task, 5, largest), colours(task, 4)
    turns = int(task.integers(4))
    inks = {"all": palette[1:4], "longest": [palette[1]], "ends": [palette[1], palette[2]]}
    kind = list(inks)[task.integers(3)]

    def make(generator: np.random.Generator) -> Grids:
        height, width = size.draw(generator)
        grid = scenes.empty((height, width))
        columns = np.arange(int(generator.integers(2)), width, 2)[:3]
        lengths = 1 + generator.permutation(height)[: len(columns)]
        for column, length in zip(columns, lengths, strict=True):
            grid[height - length :, column] = palette[0]
        output = grid.copy()
        order = columns[np.argsort(-lengths)]
        if kind == "ends":
            order = order[[0, -1]]
        for column, ink in zip(order, inks[kind], strict=False):
            output[:, column] = np.where(grid[:, column], ink, 0)
        return np.rot90(grid, turns), np.rot90(output, turns)

    return make


def flood(task: np.random.Generator, largest: int) -> Maker:
    """Give an object the colour of a single cell that lies in it, or remove what has none."""
    size, palette = Size.of_task(task, 6, largest), colours(task, 5)
    removed = task.random() < 0.3

    def make(generator: np.random.Generator) -> Grids:
        shapes = [block(generator, 4, 2) for _ in range(generator.integers(2, 5))]
        grid = scenes.placed(generator, size.draw(generator), shapes, palette[:1])
        output = grid.copy()
        for number, mask in enumerate(scenes.objects(grid)):
            if number and generator.random() < 0.3:
                output[mask] = 0 if removed else grid[mask]
                continue
            row, column = generator.choice(np.argwhere(mask))
            grid[row, column] = generator.choice(palette[1:])
            output[mask] = grid[row, column]
        return grid, output

    return make


RULES = (recolour, clean, by_size, touch, alternate, ranked, flood)
