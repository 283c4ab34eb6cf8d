"""One style for all figures, written as PNG and as SVG that follows the page's theme.

Figures are made without pyplot, so nothing is kept open and no display is needed. A run has the
same colour and marker in all figures; the source network is always in the colour of the text.
"""

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tttlab.evaluation.results import CONTROL
from tttlab.reporting.words import in_lines

# Any two are at least 15 CIELAB units apart, also for readers with protanopia, deuteranopia or
# tritanopia, and contrast with the page at 3:1 or more. DARK has the counterparts on a dark page.
LIGHT = ("#1b6fd0", "#d95f0e", "#0a9b70", "#b83a8f", "#664a10", "#3b2a80")
DARK = ("#4795f5", "#f0602c", "#35cf9a", "#d46aa8", "#efd957", "#cfe6f7")
MARKERS = ("o", "s", "D", "^", "v", "P")

# In an SVG these colours are replaced by the page's own, so nothing else may use them.
INK, MUTED, GRID, PAPER = "#1b1b20", "#66666f", "#dedee4", "#ffffff"
# The ends of the diverging scale, whose middle is the page. INK is readable on them in both themes.
GAIN, LOSS = "#58a6ec", "#f0883e"
DARK_GAIN, DARK_LOSS = "#2463b0", "#a34a12"
STYLE = {
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.axisbelow": True,
    "figure.titlesize": 10,
    "font.size": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a folder's name may hold dollars
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}
styled = matplotlib.rc_context(STYLE)
TITLE_LINE = 0.15  # inches


@dataclass(frozen=True)
class Style:
    """A run's number in the palette (None: the colour of the text) and its marker."""

    number: int | None
    marker: str

    @property
    def color(self) -> str:
        """The colour on a light page."""
        return INK if self.number is None else LIGHT[self.number]

    @property
    def css(self) -> str:
        """The colour as a CSS value that follows the page's theme."""
        return "currentColor" if self.number is None else f"var(--run-{self.number})"


def run_styles(runs: Sequence[str]) -> dict[str, Style]:
    """Give every run a colour and marker by its position in params.yaml; up to 36 are distinct."""
    acting = [run for run in runs if run != CONTROL]
    size = len(LIGHT)
    styles = {
        run: Style(i % size, MARKERS[(i + i // size) % len(MARKERS)])
        for i, run in enumerate(acting)
    }
    return {run: styles.get(run, Style(None, "")) for run in runs}


def drawn_runs(table: Any, styles: Mapping[str, Style]) -> list[str]:
    """List the runs of a table in the order of the styles, without the control."""
    present = set(table["run"]) if len(table) else set()
    return [run for run in styles if run != CONTROL and run in present]


# --- parts of figures ----------------------------------------------------------------------------


def blank(width: float, height: float, title: str) -> Figure:
    """Make an empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.005, ha="left", fontweight="bold")
    return figure


def panels(
    count: int,
    title: str,
    *,
    columns: int = 5,
    height: float = 1.7,
    extra: float = 0.8,
    left: float = 0.6,
    names: Sequence[str] = (),
    colors: Sequence[str] = (),
    pad: float | None = None,
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """Make a figure of equal panels, nine inches wide at most, or more with a wide ``left``.

    Args:
        count: Number of panels.
        title: Above all panels.
        columns: Largest number of panels in a line.
        height: Of one panel, inches.
        extra: Height for titles, labels and legends, inches.
        left: Width for the labels at the left, inches.
        names: Titles of the panels; a long one gets more lines, and the figure more height.
        colors: Of the titles; none: the colour of the text.
        pad: Points between a panel and its title; None: few.
        options: For ``Figure.subplots``.
    """
    columns = min(count, columns)
    lines = -(-count // columns)
    width = max(4.2, left + columns * min(3.2, 8.4 / columns))
    titles = [in_lines(name, characters((width - left) / columns)) for name in names]
    height += TITLE_LINE * (max(map(len, titles), default=1) - 1)
    figure = blank(width, extra + lines * height, title)
    grid = figure.subplots(lines, columns, squeeze=False, **options).ravel()
    for axes in grid[count:]:
        axes.remove()
    for axes, parts, color in zip(grid, titles, colors or [INK] * len(titles), strict=False):
        axes.set_title("\n".join(parts), color=color, fontweight="bold", pad=pad)
    return figure, list(grid[:count])


def characters(width: float) -> int:
    """Count the characters of a bold title that fit into a width in inches."""
    return max(12, int(72 * width / 6.3))


def small() -> dict[str, Any]:
    """Give the style of a label of a whole figure."""
    return {"fontsize": 8, "color": MUTED}


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put one legend below all panels, in as many columns as fit."""
    room = 72 * figure.get_figwidth()
    broken = [in_lines(label, int((room - 36) / 4.5)) for label in labels]
    widths = [36 + 4.5 * max(map(len, lines)) for lines in broken]  # points
    labels = ["\n".join(lines) for lines in broken]
    rows = -(-len(labels) // max(1, int(room // max(widths))))
    figure.set_figheight(figure.get_figheight() + 0.16 * max(0, rows - 2))
    columns = len(labels) if sum(widths) <= room else max(1, int(room // max(widths)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def markers(axes: Axes, x: Any, y: Any, style: Style, filled: Any = True, size: Any = 17.0) -> None:
    """Draw markers of a run, filled or hollow; ``filled`` and ``size`` may differ by marker."""
    faces = np.where(np.broadcast_to(filled, np.shape(x)), style.color, PAPER)
    options = {"c": faces, "edgecolors": style.color, "linewidths": 1.0, "zorder": 3}
    axes.scatter(x, y, s=size, marker=style.marker or "o", **options)


# --- files ---------------------------------------------------------------------------------------


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure on a white background, for use outside the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    title = figure.get_suptitle()
    figure.suptitle("\n".join(in_lines(title, characters(figure.get_figwidth()))))
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
    figure.suptitle(title)


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Write a figure as an ``<svg>`` element.

    The page sets its colours ``--muted``, ``--grid``, ``--paper``, ``--run-0``…. The title is left
    out: the page shows it, where it can wrap. ``--width`` is the element's natural width in points,
    with which the page shows all figures at one size of text.

    Args:
        figure: From one of the `figures` modules.
        name: Unique on the page, to keep the inner references of figures apart.
        label: For screen readers.
    """
    buffer, title = io.StringIO(), figure.get_suptitle()
    figure.suptitle("")
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    figure.suptitle(title)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    head, tail = text.split(">", 1)
    text = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + tail
    # Round to a hundredth of a point, which no screen shows. Only attributes: the numbers at the
    # axes are text.
    text = re.sub('="[^"]*"', lambda match: re.sub(r"(\d\.\d\d)\d+", r"\1", match[0]), text)
    text = re.sub(r"\n\s*", "\n", text)
    page = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}
    page |= {GAIN: "var(--gain)", LOSS: "var(--loss)"}
    page |= {color: f"var(--run-{number})" for number, color in enumerate(LIGHT)}
    text = re.sub("|".join(page), lambda match: page[match[0]], text)
    width = f"--width:{72 * figure.get_figwidth():.0f}"
    start = f'<svg role="img" aria-label="{html.escape(label)}" style="{width}"'
    return text.replace("<svg", start, 1).strip()
