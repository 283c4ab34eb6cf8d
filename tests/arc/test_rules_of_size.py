"""Rules whose output has another size: what each says is true of every pair, by other means."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from tests.arc.inventions import holds, invented_by_rule
from tttlab.arc.auxiliary import SYMMETRIES, turned


@pytest.fixture(scope="module")
def invented():
    """Several tasks of every rule, by its name."""
    return invented_by_rule()


class TestResizing:
    def test_turn_is_one_symmetry_for_the_whole_task(self, invented):
        for task in invented["turn"]:
            assert any(
                all(
                    np.array_equal(turned(pair.input, symmetry), pair.output)
                    for pair in task.demonstrations
                )
                for symmetry in SYMMETRIES[1:]
            )

    def test_mirrored_and_its_mirror_image_are_one(self, invented):
        def statement(grid, output):
            sizes = np.array(output.shape) // np.array(grid.shape)
            flips = [np.flip(output, axis) for axis in (0, 1) if sizes[axis] == 2]
            return all(np.array_equal(output, flip) for flip in flips) and output.size > grid.size

        holds(invented, "mirrored", statement)

    def test_tiled_begins_with_the_grid_and_has_whole_copies(self, invented):
        def statement(grid, output):
            height, width = grid.shape
            return (
                np.array_equal(output[:height, :width], grid)
                and output.shape[0] % height == output.shape[1] % width == 0
            )

        holds(invented, "tiled", statement)

    def test_enlarged_repeats_every_cell(self, invented):
        def statement(grid, output):
            small, large = sorted((grid, output), key=np.size)
            factor = large.shape[0] // small.shape[0]
            return all(
                large[y, x] == small[y // factor, x // factor] for y, x in np.ndindex(large.shape)
            )

        holds(invented, "enlarged", statement)

    def test_self_tiled_is_the_grid_or_black_in_every_part(self, invented):
        def statement(grid, output):
            side = len(grid)
            return all(
                np.array_equal(part, grid) or not part.any()
                for rows in np.split(output, side)
                for part in np.split(rows, side, axis=1)
            )

        holds(invented, "self_tiled", statement)

    def test_cropped_is_a_window_of_the_input_but_for_other_objects(self, invented):
        def statement(grid, output):
            height, width = output.shape
            windows = [
                grid[y : y + height, x : x + width]
                for y in range(grid.shape[0] - height + 1)
                for x in range(grid.shape[1] - width + 1)
            ]
            full = output[[0, -1]].any(1).all() and output[:, [0, -1]].any(0).all()
            return full and any(((output == window) | (output == 0)).all() for window in windows)

        holds(invented, "cropped", statement)

    def test_combined_depends_on_two_cells(self, invented):
        for task in invented["combined"]:
            table = {}
            for pair in task.demonstrations:
                grid, output = pair
                if grid.shape[1] == output.shape[1]:
                    grid, output = grid.T, output.T
                width = output.shape[1]
                for y, x in np.ndindex(output.shape):
                    two = int(grid[y, x]), int(grid[y, x - width])
                    assert table.setdefault(two, int(output[y, x])) == output[y, x]

    def test_part_is_a_window_of_the_input(self, invented):
        def statement(grid, output):
            height, width = output.shape
            return any(
                np.array_equal(grid[y : y + height, x : x + width], output)
                for y in (0, 1, height)
                for x in (0, 1, width)
            )

        holds(invented, "part", statement)

    def test_most_is_the_most_or_the_least_frequent_colour(self, invented):
        def statement(grid, output):
            counts = {colour: (grid == colour).sum() for colour in set(grid.flat)}
            mine = counts.pop(output[0, 0])
            others = list(counts.values())
            return (output == output[0, 0]).all() and (mine > max(others) or mine < min(others))

        holds(invented, "most", statement)

    def test_different_occurs_once_and_the_other_part_twice(self, invented):
        def statement(grid, output):
            parts = np.split(grid, 3, axis=int(grid.shape[0] == output.shape[0]))
            same = [np.array_equal(part, output) for part in parts]
            others = [part for part, is_same in zip(parts, same, strict=True) if not is_same]
            return sum(same) == 1 and np.array_equal(*others)

        holds(invented, "different", statement)

    def test_counted_is_the_number_of_objects(self, invented):
        def statement(grid, output):
            cells = (grid > 0).sum()
            _, objects = ndimage.label(grid, np.ones((3, 3)))
            return (output > 0).sum() in (cells, objects) and len(output) == 1

        holds(invented, "counted", statement)

    def test_condensed_has_no_line_that_the_input_lacks(self, invented):
        def statement(grid, output):
            def without_twins(lines):
                kept = [line for line in lines if any(line)]
                return kept[:1] + [after for before, after in pairwise(kept) if after != before]

            rows = without_twins(grid.tolist())
            columns = without_twins(list(zip(*rows, strict=True)))
            small = [list(line) for line in zip(*columns, strict=True)]
            want = without_twins(output.tolist())
            want = without_twins(list(zip(*want, strict=True)))
            return small == [list(line) for line in zip(*want, strict=True)]

        holds(invented, "condensed", statement)
