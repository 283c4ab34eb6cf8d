"""Rules that move cells, mirror them, or continue what is there; the size stays.

Each rule draws a task's own constants, and returns what makes its pairs.
"""

import numpy as np

from tttlab.arc.invented import scenes
from tttlab.arc.invented.rule import Grids, Maker
from tttlab.arc.invented.scenes import Size, blob, colours

_LEAST = 3


def move(task: np.random.Generator, largest: int) -> Maker:
    """Shift everything; what leaves is lost, or comes back at the other side."""
    size, palette = Size.of_task(task, _LEAST, largest), colours(task, int(task.integers(1, 4)))
    down, right = task.integers(-2, 3, 2).tolist()
    wrap, dense = task.random() < 0.4, task.random() < 0.5

    def make(generator: np.random.Generator) -> Grids:
        shape = size.draw(generator)
        shapes = [blob(generator, 3) for _ in range(3)]
        grid = (
            scenes.scattered(generator, shape, palette, 0.3)
            if dense
            else scenes.placed(generator, shape, shapes, palette)
        )
        moved = np.roll(grid, (down, right), (0, 1))
        if not wrap:
            kept = np.pad(np.ones(shape, bool), 4)
            kept = np.roll(kept, (down, right), (0, 1))[4:-4, 4:-4]
            moved = np.where(kept, moved, 0)
        return grid, moved

    return make


def fall(task: np.random.Generator, largest: int) -> Maker:
    """Let all cells fall to one side."""
    size, palette = Size.of_task(task, _LEAST, largest), colours(task, int(task.integers(1, 5)))
    turns, share = int(task.integers(4)), task.uniform(0.2, 0.5)

    def make(generator: np.random.Generator) -> Grids:
        grid = scenes.scattered(generator, size.draw(generator), palette, share)
        turned = np.rot90(grid, turns)
        order = np.argsort(turned > 0, axis=0, kind="stable")
        return grid, np.rot90(np.take_along_axis(turned, order, 0), -turns)

    return make


def complete(task: np.random.Generator, largest: int) -> Maker:
    """Make the picture symmetric: one half is given, or a few cells of it are missing."""
    size, palette = Size.of_task(task, 4, largest), colours(task, 4)
    columns, half = task.random() < 0.5, task.random() < 0.6

    def make(generator: np.random.Generator) -> Grids:
        shape = size.draw(generator)
        whole = scenes.scattered(generator, shape, palette[:3], 0.5 if half else 1.0)
        axis = 1 if columns else 0
        mirrored = np.flip(whole, axis)
        first = np.arange(shape[axis]) < (shape[axis] + 1) // 2
        first = first[None, :] if columns else first[:, None]
        whole = np.where(first, whole, mirrored)
        if half:
            return np.where(first, whole, 0), whole
        top, left = (int(generator.integers(side - 1)) for side in shape)
        grid = whole.copy()
        grid[top : top + 2, left : left + 2] = palette[3]
        twin = np.flip(grid, axis)
        return grid, whole if (twin[grid == palette[3]] != palette[3]).all() else grid

    return make


def repeat(task: np.random.Generator, largest: int) -> Maker:
    """Continue a pattern of rows or columns to the edge, or draw in what is covered."""
    size, palette = Size.of_task(task, 5, largest), colours(task, 4)
    period, across, covered = int(task.integers(2, 4)), task.random() < 0.5, task.random() < 0.3

    def make(generator: np.random.Generator) -> Grids:
        height, width = size.draw(generator)
        stripe = scenes.scattered(generator, (period, width), palette[:3], 0.7)
        whole = np.tile(stripe, (height // period + 1, 1))[:height]
        grid = whole.copy()
        if covered:
            top, left = generator.integers(height - 1), generator.integers(width - 1)
            grid[top : top + 2, left : left + 2] = palette[3]
        else:
            grid[period + int(generator.integers(0, 2)) :] = 0
        return (grid.T, whole.T) if across else (grid, whole)

    return make


def mirror_in_place(task: np.random.Generator, largest: int) -> Maker:
    """Mirror every object in its own box."""
    size, palette = Size.of_task(task, 5, largest), colours(task, 3)
    axis = int(task.integers(2))

    def make(generator: np.random.Generator) -> Grids:
        shapes = [blob(generator, 4) for _ in range(generator.integers(1, 4))]
        grid = scenes.placed(generator, size.draw(generator), shapes, palette[:1])
        grid = np.where(grid > 0, generator.choice(palette, grid.shape), 0).astype(np.int8)
        output = scenes.empty(grid.shape)
        for mask in scenes.objects(grid):
            flipped = np.flip(np.where(mask, grid, 0)[scenes.box(mask)], axis)
            output[scenes.box(mask)][flipped > 0] = flipped[flipped > 0]
        overlapping = (output > 0).sum() < (grid > 0).sum()
        return grid, grid if overlapping else output

    return make


RULES = (move, fall, complete, repeat, mirror_in_place)
