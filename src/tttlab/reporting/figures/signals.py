"""Figures of the gain along a signal, and of confidence against accuracy."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from tttlab.evaluation.calibration import NUM_BINS
from tttlab.reporting.plots import (
    GRID,
    INK,
    MUTED,
    PAPER,
    Style,
    drawn_runs,
    legend,
    markers,
    panels,
    small,
    styled,
)

_ESTIMATES = {
    "estimated_accuracy": ("o", INK, "difference of confidences"),
    "estimated_accuracy_atc": ("D", PAPER, "average thresholded confidence"),
}
_LINE_BELOW = 15  # points between a panel and its title, for a line
_WITHOUT_DEGREES = 3  # the severity whose size a natural shift has


@styled
def gain_along(
    table: pd.DataFrame,
    signal: str,
    styles: Mapping[str, Style],
    title: str,
    label: str,
    notes: Mapping[str, str],
) -> Figure:
    """Draw the gain of every shift against a signal, a panel per run.

    A point is larger at a higher severity; a natural shift, which has none, is as large as one in
    the middle.

    Args:
        table: Rows of one model with columns run, shift, severity, gain (fraction) and the signal;
            if its interval is known, also ``<signal>_low`` and ``<signal>_high``.
        signal: Column of the horizontal axis.
        styles: From `run_styles`.
        title: Above all panels.
        label: Of the horizontal axis.
        notes: A line beneath a run's name, such as its rank correlation.
    """
    runs = drawn_runs(table, styles)
    titled = {"names": runs, "colors": [styles[run].color for run in runs]}
    shared = {"sharex": True, "sharey": True}
    pad = _LINE_BELOW if notes else None
    figure, all_axes = panels(len(runs), title, columns=5, height=2.1, pad=pad, **titled, **shared)
    for run, axes in zip(runs, all_axes, strict=True):
        rows, style = table[table["run"] == run], styles[run]
        gains = 100 * rows["gain"]
        if f"{signal}_low" in rows:
            ends = rows[f"{signal}_low"], rows[f"{signal}_high"]
            axes.hlines(gains, *ends, color=style.color, linewidth=0.9, alpha=0.45)
        filled = rows["shift"] != "clean"
        degrees = rows["severity"].where(~filled | (rows["severity"] > 0), _WITHOUT_DEGREES)
        sizes = 7 + 3 * degrees
        markers(axes, rows[signal], gains, style, filled=filled, size=sizes)
        axes.axhline(0, color=INK, linewidth=0.8, zorder=0)
        _beneath_title(axes, notes.get(run, ""), MUTED)
        axes.xaxis.get_major_locator().set_params(nbins=5)
    # Most shifts are near the source and a few are far. The panels share the axis.
    if (table[signal] > 0).all() and table[signal].max() > 5 * table[signal].min():
        all_axes[0].set_xscale("log")
        all_axes[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        all_axes[0].xaxis.set_major_formatter("{x:g}")
        all_axes[0].xaxis.set_minor_formatter("")
    all_axes[0].set_ylabel("gain, points")
    figure.supxlabel(label, **small())
    return figure


@styled
def estimated_accuracy(table: pd.DataFrame, title: str) -> Figure:
    """Draw the estimated against the true accuracy, a panel per model, a point per shift.

    Args:
        table: Columns model, metric, shift, accuracy (true) and value (estimated), both fractions.
        title: Above all panels.
    """
    models = list(dict.fromkeys(table["model"]))
    shared = {"sharex": True, "sharey": True}
    figure, all_axes = panels(len(models), title, columns=3, height=2.7, names=models, **shared)
    values = 100 * table[["accuracy", "value"]].to_numpy()
    low, high = max(0.0, np.nanmin(values) - 4), min(102.0, np.nanmax(values) + 4)
    metrics = [metric for metric in _ESTIMATES if metric in set(table["metric"])]
    for model, axes in zip(models, all_axes, strict=True):
        axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8, zorder=0)
        for metric in metrics:
            rows = table[(table["model"] == model) & (table["metric"] == metric)]
            marker, face, _ = _ESTIMATES[metric]
            options = {"s": 12, "marker": marker, "c": face, "edgecolors": INK, "linewidths": 0.9}
            axes.scatter(100 * rows["accuracy"], 100 * rows["value"], **options)
        axes.set(xlim=(low, high), ylim=(low, high), xlabel="true accuracy, %")
    all_axes[0].set_ylabel("estimated without test labels, %")
    handles, labels = [], []
    for metric in metrics:
        marker, face, label = _ESTIMATES[metric]
        options = {"marker": marker, "markerfacecolor": face, "color": INK, "linestyle": ""}
        handles.append(Line2D([], [], **options))
        labels.append(label)
    diagonal = Line2D([], [], color=MUTED, linewidth=0.8)
    legend(figure, [*handles, diagonal], [*labels, "estimate is true"])
    return figure


@styled
def reliability(
    table: pd.DataFrame,
    styles: Mapping[str, Style],
    title: str,
    errors: Mapping[str, tuple[str, str]],
) -> Figure:
    """Draw accuracy against confidence in bins, source and adapted, with the bins' sizes beneath.

    Args:
        table: Rows of one model with columns run, with (``source`` | ``adapted``), bin, confidence,
            accuracy, n.
        styles: From `run_styles`.
        title: Above all panels.
        errors: Expected calibration error per run as text, before and after.
    """
    runs = drawn_runs(table, styles)
    titled = {"names": runs, "colors": [styles[run].color for run in runs]}
    shared = {"sharex": True, "sharey": True}
    figure, all_axes = panels(
        len(runs), title, columns=5, height=2.4, pad=_LINE_BELOW, **titled, **shared
    )
    ticks = range(0, 101, 25)
    for run, axes in zip(runs, all_axes, strict=True):
        axes.plot([0, 100], [0, 100], color=MUTED, linewidth=0.8, zorder=0)
        rows = table[table["run"] == run]
        for side, style in (("source", Style(None, "o")), ("adapted", styles[run])):
            _bins(axes, rows[rows["with"] == side], style, filled=side == "adapted")
        _beneath_title(axes, "ECE {} → {} %".format(*errors[run]), INK)
        axes.set(xlim=(-3, 103), ylim=(-26, 103), yticks=ticks, xticks=ticks)
        axes.axhline(0, color=GRID, linewidth=0.8)
    all_axes[0].set_ylabel("accuracy, %")
    label = "confidence, % (beneath: how full the bins are; line: source, bars: adapted)"
    figure.supxlabel(label, **small())
    return figure


def _beneath_title(axes: Axes, text: str, color: str) -> None:
    options = {"textcoords": "offset points", "fontsize": 7.5, "color": color}
    axes.annotate(text, (0, 1), (0, 4), "axes fraction", **options)


def _bins(axes: Axes, rows: pd.DataFrame, style: Style, filled: bool) -> None:
    """Draw the bins of one side: larger points for fuller bins, and their sizes below zero."""
    rows = rows.sort_values("bin")
    share = rows["n"] / max(1, rows["n"].max())
    full = rows[rows["n"] > 0]
    x, y = 100 * full["confidence"], 100 * full["accuracy"]
    axes.plot(x, y, color=style.color, linewidth=0.9, alpha=0.7)
    markers(axes, x, y, style, filled=filled, size=5 + 30 * np.sqrt(share[full.index]))
    centres, width = 100 * (rows["bin"] + 0.5) / NUM_BINS, 100 / NUM_BINS
    if filled:
        axes.bar(centres, -22 * share, width=0.8 * width, color=style.color, linewidth=0)
    else:
        axes.step(centres - width / 2, -22 * share, where="post", color=style.color, linewidth=0.8)
