"""Grids as pictures: SVG in ARC's ten colours, with digits for who cannot tell these apart.

Digits are markers, which the page defines once and a grid puts at its cells; CSS shows or hides
them. So they are sharp in print, and a grid takes some hundred bytes.
"""

from collections.abc import Iterator

import numpy as np
from markupsafe import Markup

# Of ARC's own pages: black, blue, red, green, yellow, grey, magenta, orange, light blue, maroon.
PALETTE = (
    "#000000",
    "#0074d9",
    "#ff4136",
    "#2ecc40",
    "#ffdc00",
    "#aaaaaa",
    "#f012be",
    "#ff851b",
    "#7fdbff",
    "#870c25",
)
_BLACK = 0  # has no digit: no other colour is as dark, and most grids are full of it
_WHITE_DIGITS = (1, 9)  # on the others a black digit has more contrast
_LARGEST_CELL, _SMALLEST_CELL = 18, 6  # pixels
_SIDE, _NARROW_SIDE = 110, 100  # pixels of a grid that has to shrink; on a phone, three in a line


def digits() -> Markup:
    """Define the digits that all grids of a page show."""
    drawn = [
        f'<marker id="digit-{colour}" markerUnits="userSpaceOnUse" markerWidth="1" '
        'markerHeight="1">'
        f'<text x=".5" y=".76" fill="{"#fff" if colour in _WHITE_DIGITS else "#000"}">{colour}'
        "</text></marker>"
        for colour in range(len(PALETTE))
        if colour != _BLACK
    ]
    return Markup(f'<svg class="defined" aria-hidden="true"><defs>{"".join(drawn)}</defs></svg>')


def to_svg(grid: np.ndarray) -> Markup:
    """Draw a grid ``(H, W)`` of colours as ``<svg>``; its label has the digits, row by row."""
    height, width = grid.shape
    rows = " ".join("".join(map(str, row)) for row in grid.tolist())
    cells, marks = [], []
    for colour in np.unique(grid).tolist():
        runs = list(_runs(grid == colour))
        shape = "".join(f"M{left} {row}h{length}v1H{left}z" for row, left, length in runs)
        cells.append(f'<path fill="{PALETTE[colour]}" d="{shape}"/>')
        if colour != _BLACK:
            corners = "".join(f"L{left} {row}{'h1' * (n - 1)}" for row, left, n in runs)
            marks.append(f'<path marker-mid="url(#digit-{colour})" d="M0 0{corners}L0 0"/>')
    lines = "".join(f"M0 {row}h{width}" for row in range(1, height))
    lines += "".join(f"M{column} 0v{height}" for column in range(1, width))
    return Markup(
        f'<svg class="grid" role="img" aria-label="{size(grid)} cells: {rows}" '
        f'viewBox="0 0 {width} {height}" style="--w:{width};--h:{height}">{"".join(cells)}'
        f'<path class="lines" d="{lines}"/><g class="digits">{"".join(marks)}</g></svg>'
    )


def _runs(mask: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield row, first column and length of each run of cells in a row."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    for (row, start), (_, end) in zip(starts.tolist(), ends.tolist(), strict=True):
        yield row, start, end - start


def size(grid: np.ndarray) -> str:
    """Write the size of a grid: ``7 × 9`` for seven rows and nine columns."""
    return f"{grid.shape[0]} × {grid.shape[1]}"


def cell_pixels(side: int, narrow: bool = False) -> int:
    """Choose how many pixels a cell has where the longest side of any grid has ``side`` cells."""
    pixels = (_NARROW_SIDE if narrow else _SIDE) // side
    return min(_LARGEST_CELL, max(_SMALLEST_CELL, pixels))
