"""One style for all figures, written as PNG and as SVG that follows the page's light or dark theme.

Figures are made without pyplot, so nothing is kept open and no display is needed. A run has the same colour and marker
in all of them; the source network without adaptation is always in the colour of the text.
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

# Chosen so that any two stay at least 15 CIELAB units apart for readers with protanopia, deuteranopia and tritanopia,
# at a contrast of 3:1 or more with the page. DARK are the counterparts for a dark page.
LIGHT = ("#1b6fd0", "#d95f0e", "#0a9b70", "#b83a8f", "#664a10", "#3b2a80")
DARK = ("#4795f5", "#f0602c", "#35cf9a", "#d46aa8", "#efd957", "#cfe6f7")
MARKERS = ("o", "s", "D", "^", "v", "P")

# Exactly these colours are replaced by the page's own when a figure becomes SVG, so nothing else may use them.
INK, MUTED, GRID, PAPER = "#1b1b20", "#66666f", "#dedee4", "#ffffff"
# The ends of the diverging scale, whose middle is the page: text in INK stays readable on them, in both themes.
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


@dataclass(frozen=True)
class Style:
    """How a run is drawn: its number in the palette (None: the colour of the text) and its marker."""

    number: int | None
    marker: str

    @property
    def color(self) -> str:
        """The colour on a light page."""
        return INK if self.number is None else LIGHT[self.number]

    @property
    def css(self) -> str:
        """The colour as a page names it, which then follows the theme."""
        return "currentColor" if self.number is None else f"var(--run-{self.number})"


def run_styles(runs: Sequence[str]) -> dict[str, Style]:
    """Give every run its colour and marker, by its place in params.yaml; no two runs of up to 36 get the same pair."""
    others = [run for run in runs if run != CONTROL]
    size = len(LIGHT)
    styles = {
        run: Style(i % size, MARKERS[(i + i // size) % len(MARKERS)])
        for i, run in enumerate(others)
    }
    return {run: styles.get(run, Style(None, "")) for run in runs}


def drawn_runs(table: Any, styles: Mapping[str, Style]) -> list[str]:
    """List the runs of a table that a figure has panels for: in the order of the styles, without the control."""
    present = set(table["run"]) if len(table) else set()
    return [run for run in styles if run != CONTROL and run in present]


# --- parts of figures ----------------------------------------------------------------------------------------------


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
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """Make a figure of equal panels, at most ``columns`` beside each other and nine inches wide.

    Args:
        count: Number of panels.
        title: Above all of them.
        columns: Most panels in a line.
        height: Of one panel, inches.
        extra: Height for titles, labels and legends, inches.
        options: For ``Figure.subplots``.
    """
    columns = min(count, columns)
    lines = -(-count // columns)
    width = max(4.2, 0.6 + columns * min(3.2, 8.4 / columns))
    figure = blank(width, extra + lines * height, title)
    grid = figure.subplots(lines, columns, squeeze=False, **options).ravel()
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def small() -> dict[str, Any]:
    """Give the style of a label that belongs to a whole figure."""
    return {"fontsize": 8, "color": MUTED}


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put one legend below all panels, in as many columns as its labels leave room for."""
    widths, room = [36 + 4.5 * len(label) for label in labels], 72 * figure.get_figwidth()  # points
    columns = len(labels) if sum(widths) <= room else max(1, int(room // max(widths)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def markers(axes: Axes, x: Any, y: Any, style: Style, filled: Any = True, size: Any = 17.0) -> None:
    """Draw markers of a run, filled or hollow: ``filled`` and ``size`` are one for all or one for each."""
    faces = np.where(np.broadcast_to(filled, np.shape(x)), style.color, PAPER)
    axes.scatter(
        x,
        y,
        s=size,
        marker=style.marker or "o",
        c=faces,
        edgecolors=style.color,
        linewidths=1.0,
        zorder=3,
    )


# --- files ---------------------------------------------------------------------------------------------------------


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure on white, for where a picture stands alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Write a figure as an ``<svg>`` element for a page that sets ``--muted``, ``--grid``, ``--paper``, ``--run-0``….

    The title is left to the page, where it can wrap. The element has its natural width in points as ``--width``, so that
    the page can show all figures at one size of text.

    Args:
        figure: From one of the `figures` modules.
        name: Unlike those of the page's other figures, so that their inner references do not meet.
        label: What a screen reader says.
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
    text = re.sub(
        "<svg[^>]*>", lambda match: re.sub(r' (width|height)="[^"]*"', "", match[0]), text, count=1
    )
    # A hundredth of a point is finer than any screen; only in attributes, or it would cut the numbers at the axes too.
    text = re.sub('="[^"]*"', lambda match: re.sub(r"(\d\.\d\d)\d+", r"\1", match[0]), text)
    text = re.sub(r"\n\s*", "\n", text)
    page = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}
    page |= {GAIN: "var(--gain)", LOSS: "var(--loss)"}
    page |= {color: f"var(--run-{number})" for number, color in enumerate(LIGHT)}
    text = re.sub("|".join(page), lambda match: page[match[0]], text)
    width = f"--width:{72 * figure.get_figwidth():.0f}"
    return text.replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(label)}" style="{width}"', 1
    ).strip()
