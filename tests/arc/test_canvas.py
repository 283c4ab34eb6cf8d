"""Grids on canvases: by hand, and against loops over pixels."""

import numpy as np
import pytest
import torch

from tests.arc.tiny import SIDE, grid
from tttlab.arc.canvas import BACKGROUND, BORDER, UNASKED, Canvas, Placement, sizes
from tttlab.arc.tasks import EMPTY, padded, unpadded


def place(scale, top, left):
    return Placement(*(torch.tensor([value]) for value in (scale, top, left)))


def as_grids(*grids):
    return torch.from_numpy(padded(grids, SIDE))


def test_a_canvas_by_hand():
    canvas = Canvas(side=6, patch=1, largest_scale=1)
    inputs = canvas.draw_inputs(as_grids(grid("12", "34")), place(1, 1, 2))[0]
    b = BACKGROUND
    assert inputs.tolist() == [
        [b, b, b, b, b, b],
        [b, b, 1, 2, b, b],
        [b, b, 3, 4, b, b],
        [b, b, b, b, b, b],
        [b, b, b, b, b, b],
        [b, b, b, b, b, b],
    ]
    targets = canvas.draw_targets(as_grids(grid("567")), place(1, 1, 2))[0]
    u, e = UNASKED, BORDER
    assert targets.tolist() == [
        [u, u, u, u, u, u],
        [u, u, 5, 6, 7, e],
        [u, u, e, e, e, e],
        [u, u, u, u, u, u],
        [u, u, u, u, u, u],
        [u, u, u, u, u, u],
    ]


def slow_targets(cells, canvas, scale, top, left):
    """Draw an output with its border pixel by pixel."""
    drawn = np.full((canvas.side, canvas.side), UNASKED)
    height, width = cells.shape
    for row in range(height + 1):
        for column in range(width + 1):
            inside = row < height and column < width
            symbol = cells[row, column] if inside else BORDER
            for y in range(top + row * scale, top + (row + 1) * scale):
                for x in range(left + column * scale, left + (column + 1) * scale):
                    drawn[y, x] = symbol
    return drawn


def random_grids(count, seed=0):
    generator = np.random.default_rng(seed)
    shapes = generator.integers(1, SIDE + 1, (count, 2))
    return [generator.integers(0, 10, shape).astype(np.int8) for shape in shapes]


def test_drawing_equals_drawing_pixel_by_pixel():
    canvas, grids = Canvas(side=16, patch=2, largest_scale=3), random_grids(40)
    cells = as_grids(*grids)
    height, width = sizes(cells)
    assert list(zip(height.tolist(), width.tolist(), strict=True)) == [g.shape for g in grids]
    draws = torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    placement = canvas.draw_placement(height, width, draws)
    assert set(placement.scale.tolist()) == {1, 2, 3}
    targets = canvas.draw_targets(cells, placement)
    inputs = canvas.draw_inputs(cells, placement)
    for number, cells_of_one in enumerate(grids):
        where = [int(values[number]) for values in placement]
        slow = slow_targets(cells_of_one, canvas, *where)
        np.testing.assert_array_equal(targets[number], slow)
        without_border = np.where((slow == BORDER) | (slow == UNASKED), BACKGROUND, slow)
        np.testing.assert_array_equal(inputs[number], without_border)


def test_every_place_at_which_grid_and_border_fit_is_drawn_and_no_other():
    canvas = Canvas(side=6, patch=1, largest_scale=2)
    draws = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    length = torch.full((4000,), 2)
    drawn = set(map(tuple, torch.stack(canvas.draw_placement(length, length, draws), 1).tolist()))
    # Two cells and a border take 3 pixels at scale 1, which leaves 0 to 3; all 6 at scale 2.
    expected = {(1, top, left) for top in range(4) for left in range(4)} | {(2, 0, 0)}
    assert drawn == expected


def test_patches_are_cut_row_by_row_and_put_back():
    canvas = Canvas(side=4, patch=2, largest_scale=1)
    pixels = torch.arange(16).view(1, 4, 4)
    patches = canvas.patches(pixels)
    assert patches[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(canvas.pixels(patches), pixels)
    several = torch.stack([patches, -patches], dim=-1)  # (N, L, p², K)
    assert torch.equal(canvas.pixels(several)[..., 1], -pixels)


def test_tokens_without_input_or_target_are_left_out():
    canvas = Canvas(side=6, patch=1, largest_scale=1)
    cells = as_grids(grid("12", "34"), grid("1"))
    placement = Placement(*(torch.tensor(values) for values in ((1, 1), (0, 2), (0, 3))))
    inputs, targets = canvas.draw_inputs(cells, placement), canvas.draw_targets(cells, placement)
    tokens, asked = canvas.tokenise(inputs, torch.tensor([7, 8]), targets)
    assert tokens.symbols.shape == (2, 9, 1)  # 3 × 3 with the border
    assert sorted(tokens.positions[0].tolist()) == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    seen = dict(zip(tokens.positions[1].tolist(), asked[1, :, 0].tolist(), strict=True))
    asked_for = {place: symbol for place, symbol in seen.items() if symbol != UNASKED}
    assert asked_for == {15: 1, 16: BORDER, 21: BORDER, 22: BORDER}
    assert tokens.visible.sum(1).tolist() == [4, 1]
    assert tokens.auxiliary.tolist() == [7, 8]


def test_reading_averages_over_the_pixels_of_a_cell():
    canvas = Canvas(side=9, patch=1, largest_scale=2)
    probabilities = torch.rand(1, 9, 9, 3, generator=torch.Generator().manual_seed(0)).double()
    read = canvas.read(probabilities, place(2, 1, 3), side=4)
    for row in range(4):
        for column in range(4):
            part = probabilities[0, 1 + 2 * row : 3 + 2 * row, 3 + 2 * column : 5 + 2 * column]
            expected = part.sum((0, 1)) / 4  # pixels beyond the canvas count as zero
            torch.testing.assert_close(read[0, row, column], expected)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (4, 3)])
def test_padding_and_back(shape):
    cells = np.arange(np.prod(shape)).reshape(shape).astype(np.int8) % 10
    array = padded([cells], SIDE)[0]
    assert (array == EMPTY).sum() == SIDE * SIDE - cells.size
    np.testing.assert_array_equal(unpadded(array), cells)
