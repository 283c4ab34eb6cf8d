"""Figures of accuracy and gain: by corruption, by severity, against cost."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

from tttlab.evaluation.results import CONTROL, shift_name
from tttlab.reporting.plots import (
    GAIN,
    INK,
    LOSS,
    MUTED,
    Style,
    blank,
    drawn_runs,
    legend,
    markers,
    panels,
    small,
    styled,
)
from tttlab.reporting.words import in_lines, points

_LONGEST = 17  # characters of the longest of our own corruptions
_LABEL = 26  # characters of a name in one line


@styled
def heat_map(
    table: pd.DataFrame, styles: Mapping[str, Style], title: str, largest: float
) -> Figure:
    """Draw the gain of every run under every corruption as coloured cells with numbers.

    Blue is a gain, orange with an outline a loss, so that they differ in grey too. The colour's
    strength is the square root of the size; else one large gain would hide all others.

    Args:
        table: Rows of one model with columns run, corruption, accuracy_source, gain (fractions) and
            significant (bool), in the order of drawing. The last corruption is set apart, for the
            mean. The control's accuracies are shown above the map.
        styles: From `run_styles`; the rows are its runs without the control.
        title: Above the map.
        largest: Absolute gain (fraction) of the full colour; maps with the same one are comparable.
    """
    runs, names = drawn_runs(table, styles), list(dict.fromkeys(table["corruption"]))
    xs = dict(zip(names, _set_apart(len(names)), strict=True))
    # Labels of three lines would run into each other.
    longest = max(_LABEL, max(len(shift_name(name)) for name in names) // 2 + 8)
    labels = [in_lines(shift_name(name), longest) for name in names]
    # Names of folders may be longer than ours. The labels lean upwards and to the right.
    excess = [max(0, max(map(len, lines)) - _LONGEST) for lines in labels]
    ends = (0.5 * x + 0.07 * more for x, more in zip(xs.values(), excess, strict=True))
    width = max(0.5 * len(names), *ends)
    broken = [in_lines(run, _LABEL) for run in runs]
    row = max(0.3, 0.15 * max(map(len, broken)))
    left = max(1.0, 0.085 * max(len(text) for lines in broken for text in lines))
    figure = blank(left + width, 1.25 + 0.05 * max(excess) + row * len(runs), title)
    axes = figure.subplots()
    for y, run in enumerate(runs):
        for row in table[table["run"] == run].itertuples():
            _cell(axes, xs[row.corruption], y, row.gain, largest, row.significant)
    source = table[table["run"] == CONTROL].set_index("corruption")["accuracy_source"]
    options = {"ha": "center", "va": "center", "color": MUTED, "fontsize": 8}
    for name, x in xs.items():
        axes.text(x, -1.08, f"{100 * source[name]:.1f}", **options)
    axes.set_yticks([-1.08, *range(len(runs))], ["source, %", *map("\n".join, broken)])
    for label, run in zip(axes.get_yticklabels()[1:], runs, strict=True):
        label.set(color=styles[run].color, fontweight="bold")
    axes.xaxis.tick_top()
    options = {"rotation": 35, "ha": "left", "rotation_mode": "anchor", "color": INK}
    axes.set_xticks(list(xs.values()), ["\n".join(lines) for lines in labels], **options)
    axes.get_xticklabels()[-1].set_fontweight("bold")
    axes.set(xlim=(-0.5, len(names)), ylim=(len(runs) - 0.5, -1.5))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure


def _set_apart(count: int) -> np.ndarray:
    """Place columns at 0, 1, …, with a gap before the last."""
    return np.arange(count) + (np.arange(count) == count - 1) * 0.5


def _cell(axes: Axes, x: float, y: float, gain: float, largest: float, significant: bool) -> None:
    if np.isnan(gain):
        return
    strength = float(np.sqrt(min(1.0, abs(gain) / largest))) if largest else 0.0
    corner, color = (x - 0.47, y - 0.44), LOSS if gain < 0 else GAIN
    axes.add_patch(Rectangle(corner, 0.94, 0.88, facecolor=color, alpha=strength, linewidth=0))
    if gain < 0:
        corner, outline = (x - 0.44, y - 0.4), {"edgecolor": LOSS, "linewidth": 1.2}
        axes.add_patch(Rectangle(corner, 0.88, 0.8, facecolor="none", **outline))
    weight, alpha = ("bold", 1) if significant else ("normal", 0.72)
    options = {"ha": "center", "va": "center", "fontsize": 8, "fontweight": weight}
    axes.text(x, y, points(gain), alpha=alpha, **options)


@styled
def gain_per_corruption(table: pd.DataFrame, styles: Mapping[str, Style], title: str) -> Figure:
    """Draw the gain with its interval per corruption, a panel per run.

    Args:
        table: Rows of one model with columns run, corruption, gain, gain_low, gain_high
            (fractions), in the order of drawing. The last corruption is set apart, for the mean.
        styles: From `run_styles`; the panels are its runs without the control, whose gain is zero.
        title: Above all panels.
    """
    runs, names = drawn_runs(table, styles), list(dict.fromkeys(table["corruption"]))
    ys = _set_apart(len(names))
    labels = [in_lines(shift_name(name), _LABEL) for name in names]
    line = 0.21 + 0.13 * (max(map(len, labels)) - 1)
    excess = max(0, max(len(text) for lines in labels for text in lines) - _LONGEST)
    columns, left = 4 if excess else 6, 1.0 + 0.07 * excess
    height, shared = 0.6 + line * len(names), {"sharex": True, "sharey": True}
    titled = {"names": runs, "colors": [styles[run].color for run in runs]}
    figure, all_axes = panels(
        len(runs), title, columns=columns, height=height, extra=0.5, left=left, **titled, **shared
    )
    for run, axes in zip(runs, all_axes, strict=True):
        rows = table[table["run"] == run].set_index("corruption").reindex(names)
        values = 100 * rows[["gain_low", "gain", "gain_high"]].to_numpy()
        _intervals(axes, ys, values, styles[run])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.axvline(0, color=INK, linewidth=0.8)
    all_axes[0].set_yticks(ys, ["\n".join(lines) for lines in labels], color=INK)
    for axes in all_axes[::columns]:
        axes.get_yticklabels()[-1].set_fontweight("bold")
    all_axes[0].set_ylim(ys[-1] + 0.6, -0.6)
    figure.supxlabel(
        "gain, percentage points (line: 95 % interval; filled: the interval leaves zero out)",
        **small(),
    )
    return figure


def _intervals(axes: Axes, ys: np.ndarray, values: np.ndarray, style: Style) -> None:
    """Draw (N, 3) low, middle and high as lines with markers, filled if zero lies outside."""
    low, middle, high = values.T
    axes.hlines(ys, low, high, color=style.color, linewidth=1.3)
    markers(axes, middle, ys, style, filled=(low > 0) | (high < 0))


@styled
def accuracy_by_severity(table: pd.DataFrame, styles: Mapping[str, Style], title: str) -> Figure:
    """Draw accuracy along the severity for the source network and every run, a panel per model.

    Args:
        table: Columns model, run, severity (0 is clean), accuracy_source and accuracy_adapted
            (fractions).
        styles: From `run_styles`.
        title: Above all panels.
    """
    models = list(dict.fromkeys(table["model"]))
    figure, all_axes = panels(len(models), title, columns=2, height=2.6, names=models, sharey=True)
    for model, axes in zip(models, all_axes, strict=True):
        rows = table[table["model"] == model]
        source = rows[rows["run"] == CONTROL]
        options = {"color": INK, "linestyle": (0, (4, 2)), "label": "source, not adapted"}
        axes.plot(source["severity"], 100 * source["accuracy_source"], zorder=4, **options)
        for run, style in styles.items():
            line = rows[rows["run"] == run]
            if run != CONTROL and len(line):
                options = {"color": style.color, "marker": style.marker, "label": run}
                axes.plot(line["severity"], 100 * line["accuracy_adapted"], **options)
        axes.set_xticks(sorted(rows["severity"].unique()))
        axes.xaxis.set_major_formatter(lambda value, _: "clean" if value == 0 else f"{value:g}")
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("severity")
    all_axes[0].set_ylabel("accuracy, %")
    handles = {}
    for axes in all_axes:
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    legend(figure, list(handles.values()), list(handles))
    return figure


@styled
def gain_and_cost(table: pd.DataFrame, styles: Mapping[str, Style], title: str) -> Figure:
    """Draw each run's gain against its cost, with the Pareto front, a panel per model.

    Args:
        table: Columns model, run, gated (bool), milliseconds, gain, gain_low, gain_high
            (fractions).
        styles: From `run_styles`.
        title: Above all panels.
    """
    models = list(dict.fromkeys(table["model"]))
    shared = {"sharex": True, "sharey": True}
    figure, all_axes = panels(len(models), title, columns=2, height=2.6, names=models, **shared)
    handles = {}
    for model, axes in zip(models, all_axes, strict=True):
        rows = table[table["model"] == model]
        front = np.array(pareto_front(rows["milliseconds"], rows["gain"]))
        best = rows.iloc[front].sort_values("milliseconds")
        options = {"where": "post", "color": MUTED, "linewidth": 1, "zorder": 1}
        (line,) = axes.step(best["milliseconds"], 100 * best["gain"], **options)
        for row in rows.itertuples():
            style, low, high = styles[row.run], 100 * row.gain_low, 100 * row.gain_high
            axes.vlines(row.milliseconds, low, high, color=style.color, linewidth=1.2, alpha=0.8)
            x, y = [row.milliseconds], [100 * row.gain]
            markers(axes, x, y, style, filled=not row.gated, size=30)
            label = f"{row.run} with gate" if row.gated else row.run
            handles.setdefault(label, axes.collections[-1])
        axes.axhline(0, color=INK, linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("milliseconds per image")
    all_axes[0].set_ylabel("gain, percentage points")
    legend(figure, [*handles.values(), line], [*handles, "no run is cheaper and better"])
    return figure


def pareto_front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """List the indices of pairs that no other pair dominates.

    One pair dominates another if its cost is at most as high and its gain at least as high, and
    the two are not equal.
    """
    pairs = list(zip(costs, gains, strict=True))
    return [
        index
        for index, (cost, gain) in enumerate(pairs)
        if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in pairs)
    ]
