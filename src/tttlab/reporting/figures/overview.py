"""The figure that the report opens with: the gain of every run, and what training adds to it."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from tttlab.evaluation.results import is_known
from tttlab.reporting.plots import INK, MUTED, PAPER, Style, blank, drawn_runs, styled
from tttlab.reporting.words import in_lines, points

WIDTH = 3.8  # inches: two fit side by side on a laptop, one fits on a phone
HATCH = "//////"
_NAME = 28  # characters of a run's name in a line
_LINE, _BAR, _BELOW, _GAP = 0.16, 0.15, 0.13, 0.1  # heights in inches


class Row(NamedTuple):
    """Where one run stands, in inches from the top."""

    run: str
    lines: list[str]
    top: float
    bar: float
    below: float


@styled
def overview(
    table: pd.DataFrame, styles: Mapping[str, Style], title: str, limits: tuple[float, float]
) -> Figure:
    """Draw the gain of every run of one model as a bar with its interval.

    The part that training adds is hatched. Below the bar stand the gain with the gate, hollow, and
    the change on clean images, a cross.

    Args:
        table: A row per run with columns run, gain, gain_low, gain_high, training, clean, gated,
            gated_low, gated_high (fractions; NaN where unknown).
        styles: From `run_styles`; the rows are its runs without the control.
        title: Above the figure.
        limits: Ends of the axis in percentage points, alike for all models.
    """
    rows = place(drawn_runs(table, styles))
    height = rows[-1].below + _BELOW + _GAP
    keys = legend_of(table)
    figure = blank(WIDTH, height + 0.62 + 0.17 * -(-len(keys) // 2), title)
    axes = figure.subplots()
    draw_rows(axes, table, styles, rows, limits)
    axes.set_ylim(height, 0)
    axes.set_xlabel("gain, percentage points")
    figure.legend(
        keys.values(),
        keys,
        loc="outside lower center",
        ncols=2,
        fontsize=7.5,
        handler_map={tuple: HandlerTuple(ndivide=1, pad=0)},
    )
    return figure


def place(runs: list[str]) -> list[Row]:
    """Stack the runs: the name, in as many lines as it needs, the bar, and the marks below it."""
    rows, y = [], 0.0
    for run in runs:
        lines = in_lines(run, _NAME)
        bar = y + _LINE * len(lines) + 0.04
        rows.append(Row(run, lines, y, bar, bar + _BAR))
        y = bar + _BAR + _BELOW + _GAP
    return rows


def limits_of(tables: Mapping[str, pd.DataFrame]) -> tuple[float, float]:
    """Find ends of the axis, in points, between which everything on all tables lies."""
    columns = ["gain", "gain_low", "gain_high", "clean", "gated", "gated_low", "gated_high"]
    values = [0.0]
    for table in tables.values():
        values += [*table[columns].to_numpy(dtype=float).ravel()]
        values += [*(table["gain"] - table["training"])]  # the gain before the first step
    low, high = 100 * np.nanmin(values), 100 * np.nanmax(values)
    pad = 0.04 * max(high - low, 1.0)
    return low - pad, high + pad


def draw_rows(
    axes: Axes,
    table: pd.DataFrame,
    styles: Mapping[str, Style],
    rows: list[Row],
    limits: tuple[float, float],
) -> None:
    """Draw all runs on axes whose vertical unit is an inch, downwards."""
    axes.set_xlim(*limits)
    entries = table.set_index("run")
    for row in rows:
        _name(axes, row, entries.loc[row.run], styles[row.run])
        axes.vlines([0], [row.bar - 0.03], [row.below + _BELOW], color=INK, linewidth=0.8)
        _bar(axes, row, entries.loc[row.run], styles[row.run])
        _below(axes, row, entries.loc[row.run], styles[row.run])
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def _name(axes: Axes, row: Row, entry: pd.Series, style: Style) -> None:
    """Write the run's name to the left, and its gain to the right."""
    across = axes.get_yaxis_transform()
    options = {"transform": across, "va": "top", "fontsize": 8.5}
    for number, text in enumerate(row.lines):
        y = row.top + number * _LINE
        axes.text(0, y, text, color=style.color, fontweight="bold", **options)
    training = f" ({points(entry['training'])} by training)" if is_known(entry["training"]) else ""
    options |= {"ha": "right", "color": INK}
    axes.text(1, row.top, f"{points(entry['gain'])}{training}", **options)


def _bar(axes: Axes, row: Row, entry: pd.Series, style: Style) -> None:
    """Draw the gain before the first step as a full bar, what training adds to it hatched."""
    gain, training = 100 * entry["gain"], 100 * entry["training"]
    if not is_known(gain):
        return
    before = gain - training if is_known(training) else gain
    full = {"facecolor": style.color, "edgecolor": style.color, "linewidth": 0.8}
    axes.add_patch(Rectangle((0, row.bar), before, _BAR, alpha=0.5, **full))
    if is_known(training):
        hatched = {"facecolor": PAPER, "edgecolor": style.color, "linewidth": 0.8, "hatch": HATCH}
        axes.add_patch(Rectangle((before, row.bar), training, _BAR, **hatched))
    _interval(axes, row.bar + _BAR / 2, entry, "gain", INK, filled=True)


def _below(axes: Axes, row: Row, entry: pd.Series, style: Style) -> None:
    middle = row.below + 0.08
    if is_known(entry["gated"]):
        _interval(axes, middle, entry, "gated", style.color, filled=False)
    if is_known(entry["clean"]):
        axes.plot([100 * entry["clean"]], [middle], **_CLEAN)


_CLEAN = {"marker": "x", "color": MUTED, "linestyle": "", "markersize": 4, "zorder": 5}


def _interval(
    axes: Axes, y: float, entry: pd.Series, name: str, color: str, *, filled: bool
) -> None:
    low, middle, high = (100 * entry[key] for key in (f"{name}_low", name, f"{name}_high"))
    if is_known(low) and is_known(high):
        axes.hlines([y], [low], [high], color=color, linewidth=1.3, zorder=4)
    face = color if filled else PAPER
    dot = {"marker": "o", "markersize": 4, "markerfacecolor": face, "color": color}
    axes.plot([middle], [y], zorder=5, **dot)


def legend_of(table: pd.DataFrame) -> dict[str, object]:
    """Explain what stands on the figure, and nothing that does not."""
    line, hollow = {"color": INK, "marker": "o", "markersize": 4}, {"markerfacecolor": PAPER}
    full = Patch(facecolor=MUTED, alpha=0.5)
    keys: dict[str, object] = {"gain": full}
    if table["training"].notna().any():
        hatched = Patch(facecolor=PAPER, edgecolor=MUTED, hatch=HATCH)
        keys = {"gain before the first step": full, "what training adds": hatched}
    keys["95 % interval"] = Line2D([], [], **line)
    if table["gated"].notna().any():
        keys["with the gate"] = Line2D([], [], **line | hollow)
    if table["clean"].notna().any():
        keys["change on clean images"] = Line2D([], [], **_CLEAN)
    return keys
