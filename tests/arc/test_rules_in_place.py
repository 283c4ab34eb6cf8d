"""Rules that keep the size: what each says is true of every pair, told by other means than it."""

from collections import deque

import numpy as np
import pytest
from scipy import ndimage

from tests.arc.inventions import holds, invented_by_rule


@pytest.fixture(scope="module")
def invented():
    """Several tasks of every rule, by its name."""
    return invented_by_rule()


def neighbours(row, column, shape):
    """List the four neighbours inside a grid."""
    steps = ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1))
    return [(y, x) for y, x in steps if 0 <= y < shape[0] and 0 <= x < shape[1]]


def from_outside(grid):
    """Find the black cells that are reached from the edge over black ones, side by side."""
    height, width = grid.shape
    edge = [
        (y, x)
        for y in range(height)
        for x in range(width)
        if (y in (0, height - 1) or x in (0, width - 1)) and grid[y, x] == 0
    ]
    found, waiting = set(edge), deque(edge)
    while waiting:
        for cell in neighbours(*waiting.popleft(), grid.shape):
            if grid[cell] == 0 and cell not in found:
                found.add(cell)
                waiting.append(cell)
    return found


class TestInPlace:
    def test_recolour_is_one_map_of_colours_for_the_whole_task(self, invented):
        for task in invented["recolour"]:
            seen = {}
            for pair in task.demonstrations:
                for old, new in zip(pair.input.flat, pair.output.flat, strict=True):
                    assert seen.setdefault(int(old), int(new)) == new

    def test_move_is_one_shift_for_the_whole_task(self, invented):
        def shifted(grid, down, right, wrap):
            height, width = grid.shape
            moved = np.zeros_like(grid)
            for y, x in np.ndindex(height, width):
                to = (y + down, x + right)
                if wrap:
                    moved[to[0] % height, to[1] % width] = grid[y, x]
                elif 0 <= to[0] < height and 0 <= to[1] < width:
                    moved[to] = grid[y, x]
            return moved

        for task in invented["move"]:
            ways = [
                (down, right, wrap)
                for down in range(-2, 3)
                for right in range(-2, 3)
                for wrap in (False, True)
                if all(
                    np.array_equal(shifted(pair.input, down, right, wrap), pair.output)
                    for pair in task.demonstrations
                )
            ]
            assert ways

    def test_fall_keeps_a_lines_colours_in_order_and_leaves_no_gap(self, invented):
        def fallen(grid):
            lines = []
            for column in grid.T.tolist():
                kept = [colour for colour in column if colour]
                lines.append([0] * (len(column) - len(kept)) + kept)
            return np.array(lines).T

        for task in invented["fall"]:
            assert any(
                all(
                    np.array_equal(
                        fallen(np.rot90(pair.input, turns)), np.rot90(pair.output, turns)
                    )
                    for pair in task.demonstrations
                )
                for turns in range(4)
            )

    def test_rays_reach_the_edge_from_a_cell(self, invented):
        def statement(grid, output):
            for y, x in np.argwhere(output != grid):
                sources = [
                    (row, column)
                    for row, column in np.argwhere(grid)
                    if row == y or column == x or abs(row - y) == abs(column - x)
                ]
                if grid[y, x] or not sources:
                    return False
            return True

        holds(invented, "rays", statement)

    def test_connect_paints_between_two_cells_of_a_colour(self, invented):
        def between(line, place):
            before, after = line[:place], line[place + 1 :]
            left = next((colour for colour in reversed(before) if colour), 0)
            right = next((colour for colour in after if colour), 0)
            return left and left == right

        def statement(grid, output):
            return all(
                grid[y, x] == 0 and (between(list(grid[y]), x) or between(list(grid[:, x]), y))
                for y, x in np.argwhere(grid != output)
            )

        holds(invented, "connect", statement)

    def test_grow_paints_black_neighbours_only(self, invented):
        def statement(grid, output):
            for y, x in np.argwhere(grid != output):
                near = grid[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
                if grid[y, x] or not near.any():
                    return False
            return True

        holds(invented, "grow", statement)

    def test_fill_paints_all_that_is_enclosed_or_all_that_is_not(self, invented):
        def statement(grid, output):
            painted = {tuple(cell) for cell in np.argwhere(grid != output).tolist()}
            black = {tuple(cell) for cell in np.argwhere(grid == 0).tolist()}
            outside = from_outside(grid)
            return painted in (black - outside, outside)

        holds(invented, "fill", statement)

    def test_hollow_changes_full_rectangles_only(self, invented):
        holds(invented, "hollow", lambda grid, output: (grid[grid != output] > 0).all())

    def test_clean_changes_single_cells_only_and_all_of_them(self, invented):
        def single(grid, y, x):
            near = grid[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            return (near > 0).sum() == 1

        def statement(grid, output):
            cells = np.argwhere(grid)
            return all((output[y, x] != grid[y, x]) == single(grid, y, x) for y, x in cells)

        holds(invented, "clean", statement)

    def test_by_size_treats_objects_of_a_size_alike(self, invented):
        def statement(grid, output):
            labels, number = ndimage.label(grid, np.ones((3, 3)))
            colours = {}
            for label in range(1, number + 1):
                given = set(output[labels == label].tolist())
                colours.setdefault((labels == label).sum(), set()).update(given)
            return (
                all(len(given) == 1 for given in colours.values()) and not output[grid == 0].any()
            )

        holds(invented, "by_size", statement)

    def test_alternate_changes_every_second_row_column_or_a_chessboard(self, invented):
        def statement(grid, output):
            rows, columns = np.nonzero(grid != output)
            return any(
                len(set((line % 2).tolist())) == 1 for line in (rows, columns, rows + columns)
            )

        holds(invented, "alternate", statement)

    def test_mirror_in_place_flips_the_box_of_an_object(self, invented):
        def statement(grid, output):
            labels, number = ndimage.label(grid, np.ones((3, 3)))
            wants = []
            for axis in (0, 1):
                want = np.zeros_like(grid)
                for label in range(1, number + 1):
                    places = np.argwhere(labels == label)
                    ends = places.min(0) + places.max(0)
                    for place in places:
                        to = place.copy()
                        to[axis] = ends[axis] - place[axis]
                        want[tuple(to)] = grid[tuple(place)]
                wants.append(want)
            return any(np.array_equal(output, want) for want in wants)

        holds(invented, "mirror_in_place", statement)

    def test_touch_recolours_by_the_edge(self, invented):
        for task in invented["touch"]:
            kinds = set()
            for pair in task.demonstrations:
                labels, number = ndimage.label(pair.input, np.ones((3, 3)))
                for label in range(1, number + 1):
                    places = np.argwhere(labels == label)
                    last = np.array(pair.input.shape) - 1
                    edge = bool((places == 0).any() or (places == last).any())
                    changed = (pair.input != pair.output)[labels == label]
                    assert changed.all() or not changed.any()
                    kinds.add((edge, bool(changed.all())))
            assert kinds <= {(True, True), (False, False)} or kinds <= {
                (True, False),
                (False, True),
            }

    def test_complete_is_symmetric(self, invented):
        def statement(_grid, output):
            return np.array_equal(output, output[::-1]) or np.array_equal(output, output[:, ::-1])

        holds(invented, "complete", statement)

    def test_repeat_has_a_period_of_two_or_three(self, invented):
        def statement(_grid, output):
            return any(
                np.array_equal(grid[period:], grid[:-period])
                for grid in (output, output.T)
                for period in (2, 3)
                if period < len(grid)
            )

        holds(invented, "repeat", statement)

    def test_cross_paints_where_a_full_row_meets_a_full_column(self, invented):
        def statement(_grid, output):
            rows = [y for y in range(output.shape[0]) if output[y].all()]
            columns = [x for x in range(output.shape[1]) if output[:, x].all()]
            met = {int(output[y, x]) for y in rows for x in columns}
            return len(met) == 1 and (output == met.pop()).sum() == len(rows) * len(columns)

        holds(invented, "cross", statement)

    def test_ranked_gives_the_longest_bar_a_colour_of_its_own(self, invented):
        def statement(grid, output):
            return (((grid > 0) == (output > 0)).all() and len(set(output[output > 0])) > 1) or (
                grid > 0
            ).any(0).sum() <= 1

        holds(invented, "ranked", statement)

    def test_frame_changes_the_rim_alone_to_one_colour(self, invented):
        def statement(grid, output):
            rim = np.concatenate([output[0], output[-1], output[:, 0], output[:, -1]])
            return len(set(rim.tolist())) == 1 and np.array_equal(
                grid[1:-1, 1:-1], output[1:-1, 1:-1]
            )

        holds(invented, "frame", statement)

    def test_flood_leaves_objects_of_one_colour(self, invented):
        def statement(_grid, output):
            labels, number = ndimage.label(output, np.ones((3, 3)))
            return all(len(set(output[labels == label])) == 1 for label in range(1, number + 1))

        holds(invented, "flood", statement)
