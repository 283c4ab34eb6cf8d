"""Figures of accuracy and loss along the training steps."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tttlab.reporting.plots import (
    INK,
    MUTED,
    TITLE_LINE,
    Style,
    blank,
    characters,
    drawn_runs,
    legend,
    panels,
    small,
    styled,
)
from tttlab.reporting.words import in_lines

_COLUMNS = 4  # runs beside each other
_LEGEND = {
    "shifted, setting in use": {"color": INK, "linewidth": 1.6},
    "clean, setting in use": {"color": INK, "linewidth": 1.2, "linestyle": (0, (1, 1.3))},
    "default": {"color": MUTED, "linewidth": 1.1, "linestyle": (0, (4, 2))},
    "other candidates": {"color": MUTED, "linewidth": 0.8, "alpha": 0.45},
    "step in use": {
        "color": INK,
        "marker": "o",
        "linestyle": "",
        "markersize": 6,
        "markerfacecolor": "none",
    },
}


@styled
def step_curves(table: pd.DataFrame, styles: Mapping[str, Style], title: str) -> Figure:
    """Draw accuracy along the steps, the loss, and accuracy along the time, a column per run.

    Without labels only the loss is drawn.

    Args:
        table: Rows of one model with columns run, setting (``tuned``, ``default``,
            ``candidate-0``…), step, accuracy, clean_accuracy (fractions), loss, milliseconds and
            used (bool).
        styles: From `run_styles`.
        title: Above all panels.
    """
    runs = drawn_runs(table, styles)
    labeled = table["accuracy"].notna().any()
    kinds = ["accuracy", "loss", "time"] if labeled else ["loss"]
    columns, blocks = min(len(runs), _COLUMNS), -(-len(runs) // _COLUMNS)
    heights = [{"accuracy": 1.75, "loss": 1.15, "time": 1.75}[kind] for kind in kinds] * blocks
    width = max(4.2, 0.6 + columns * min(3.2, 8.4 / columns))
    titles = {run: in_lines(run, characters((width - 0.6) / columns)) for run in runs}
    above = 0.35 + TITLE_LINE * (max(map(len, titles.values())) - 1)
    figure = blank(width, 0.8 + sum(heights) + above * blocks, title)
    grid = figure.subplots(len(kinds) * blocks, columns, squeeze=False, height_ratios=heights)
    for number in range(blocks * columns):
        block, column = divmod(number, columns)
        column_axes = grid[block * len(kinds) : (block + 1) * len(kinds), column]
        if number >= len(runs):
            for axes in column_axes:
                axes.remove()
            continue
        run, axes_by_kind = runs[number], dict(zip(kinds, column_axes, strict=True))
        _column(axes_by_kind, table[table["run"] == run], styles[run])
        text = "\n".join(titles[run])
        column_axes[0].set_title(text, color=styles[run].color, fontweight="bold")
        if column == 0:
            for kind, axes in axes_by_kind.items():
                axes.set_ylabel("loss" if kind == "loss" else "accuracy, %")
    looks = {name: look for name, look in _LEGEND.items() if labeled or "clean" not in name}
    legend(figure, [Line2D([], [], **look) for look in looks.values()], list(looks))
    return figure


def _column(axes_by_kind: Mapping[str, Axes], rows: pd.DataFrame, style: Style) -> None:
    """Draw one run's panels, with the setting in use on top."""
    in_use = "tuned" if (rows["setting"] == "tuned").any() else "default"
    order = {"default": 0, "tuned": 1}
    settings = sorted(rows["setting"].unique(), key=lambda name: order.get(name, -1))
    for kind, axes in axes_by_kind.items():
        x = "milliseconds" if kind == "time" else "step"
        y, scale = ("loss", 1) if kind == "loss" else ("accuracy", 100)
        for setting in settings:
            line = rows[rows["setting"] == setting]
            if setting != in_use:
                look = _LEGEND["default" if setting == "default" else "other candidates"]
                axes.plot(line[x], scale * line[y], **look)
                continue
            axes.plot(line[x], scale * line[y], color=style.color, linewidth=1.7, zorder=3)
            if kind != "loss":
                look = {**_LEGEND["clean, setting in use"], "color": style.color}
                axes.plot(line[x], 100 * line["clean_accuracy"], **look)
            used = line[line["used"]]
            look = {**_LEGEND["step in use"], "color": style.color, "markersize": 7}
            axes.plot(used[x], scale * used[y], zorder=4, **look)
        _focus(axes, rows, kind, scale)
        axes.set_xlabel({"accuracy": "", "loss": "steps", "time": "milliseconds per image"}[kind])
        if x == "step":
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)


def _focus(axes: Axes, rows: pd.DataFrame, kind: str, scale: float) -> None:
    """Fit the range to the setting in use and the default; other candidates may leave the panel."""
    rows = rows[rows["setting"].isin(["tuned", "default"])]
    columns = ["loss"] if kind == "loss" else ["accuracy", "clean_accuracy"]
    values = scale * rows[columns].to_numpy(dtype=float)
    if np.isfinite(values).any():
        low, high = np.nanmin(values), np.nanmax(values)
        pad = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - pad, high + pad)


@styled
def loss_along_steps(
    curves: Mapping[tuple[str, str], Sequence[float]], styles: Mapping[str, Style], title: str
) -> Figure:
    """Draw the mean loss before each step and after the last, a panel per run and model.

    Every panel has a scale of its own.

    Args:
        curves: Losses by (run, model).
        styles: From `run_styles`.
        title: Above all panels.
    """
    names = [f"{run} · {model}" for run, model in curves]
    colors = [styles[run].color for run, _ in curves]
    figure, all_axes = panels(len(curves), title, columns=4, names=names, colors=colors)
    for ((run, _), losses), axes in zip(curves.items(), all_axes, strict=True):
        marker = styles[run].marker if len(losses) <= 40 else ""
        axes.plot(np.arange(len(losses)), losses, color=styles[run].color, marker=marker)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        axes.yaxis.get_major_locator().set_params(nbins=4)
        axes.margins(y=0.15)
    figure.supxlabel("steps taken", **small())
    figure.supylabel("mean loss over the images", **small())
    return figure
