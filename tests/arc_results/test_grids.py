import re
from xml.etree import ElementTree

import numpy as np
import pytest

from tttlab.arc_results.grids import PALETTE, cell_pixels, digits, size, to_svg


def painted(svg):
    """Paint an SVG of a grid by its rectangles, cell by cell; -1 where nothing is painted."""
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(int, root.get("viewBox").split())
    cells = np.full((height, width), -1)
    for path in root.findall("path[@fill]"):
        for rectangle in re.findall(r"M(\d+) (\d+)h(\d+)v1H(\d+)z", path.get("d")):
            left, row, length, back = map(int, rectangle)
            assert back == left
            assert (cells[row, left : left + length] == -1).all()
            cells[row, left : left + length] = PALETTE.index(path.get("fill"))
    return cells


def labelled(svg):
    """Put down the digits that are drawn at the corners of cells; 0 where there is none."""
    root = ElementTree.fromstring(svg)
    cells = np.zeros(painted(svg).shape, int)
    for path in root.findall("g/path"):
        colour = int(re.fullmatch(r"url\(#digit-(\d)\)", path.get("marker-mid"))[1])
        inner = path.get("d").removeprefix("M0 0").removesuffix("L0 0")  # the ends have no marker
        for left, row, more in re.findall(r"L(\d+) (\d+)((?:h1)*)", inner):
            start = int(left)
            cells[int(row), start : start + 1 + len(more) // 2] += colour
    return cells


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (30, 30)])
def test_every_cell_has_its_colour_and_every_colour_but_black_its_digit(shape):
    grid = np.random.default_rng(0).integers(10, size=shape).astype(np.int8)
    svg = to_svg(grid)
    np.testing.assert_array_equal(painted(svg), grid)
    np.testing.assert_array_equal(labelled(svg), grid)


def test_long_runs_in_two_rows():
    grid = np.array([[0, 4, 4, 4, 0], [4, 4, 0, 4, 4]])
    svg = to_svg(grid)
    np.testing.assert_array_equal(painted(svg), grid)
    np.testing.assert_array_equal(labelled(svg), grid)
    assert 'aria-label="2 × 5 cells: 04440 44044"' in svg


def test_the_digits_differ_in_more_than_colour():
    markers = ElementTree.fromstring(digits()).findall("defs/marker")
    assert {marker.get("id"): marker.find("text").text for marker in markers} == {
        f"digit-{colour}": str(colour) for colour in range(1, 10)
    }


def test_a_digit_is_readable_on_its_cell():
    """Contrast by WCAG 2: at least 3:1, for a digit that is as bold as large text."""

    def luminance(colour):
        parts = [int(colour[1 + 2 * i : 3 + 2 * i], 16) / 255 for i in range(3)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    for marker in ElementTree.fromstring(digits()).findall("defs/marker"):
        text = marker.find("text")
        ink = {"#fff": 1.0, "#000": 0.0}[text.get("fill")]
        cell = luminance(PALETTE[int(text.text)])
        lighter, darker = max(ink, cell), min(ink, cell)
        assert (lighter + 0.05) / (darker + 0.05) >= 3


def test_a_size_is_rows_times_columns():
    assert size(np.zeros((7, 9))) == "7 × 9"


def test_cells_shrink_to_six_pixels_and_no_further():
    assert [cell_pixels(side) for side in (3, 10, 15, 30)] == [18, 11, 7, 6]
    assert all(cell_pixels(side, narrow=True) >= 6 for side in range(1, 31))
    assert 3 * 10 * cell_pixels(10, narrow=True) + 2 * 16 <= 390 - 2 * 20  # three on a phone
