"""The figure of solved tasks along the steps of test-time training."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, PercentFormatter

from tttlab.evaluation.results import CONTROL
from tttlab.reporting.plots import Style, drawn_runs, legend, markers, panels, styled

MEASURES = {"pass2": "solved (pass@2)", "pass1": "pass@1", "one_view": "pass@1 from one view"}


@styled
def curves(curve: pd.DataFrame, styles: Mapping[str, Style], focus: str, title: str) -> Figure:
    """Draw the share of tasks that are right by the number of steps, a panel per measure.

    Args:
        curve: Rows of ``tables/curve.csv``.
        styles: From `run_styles`.
        focus: The run whose 95 % interval is shaded.
        title: Above all panels.
    """
    figure, grid = panels(
        len(MEASURES), title, height=2.3, names=list(MEASURES.values()), sharey=True, sharex=True
    )
    acting = drawn_runs(curve, styles)
    runs = [*([CONTROL] if CONTROL in styles else []), *acting]
    for axes, measure in zip(grid, MEASURES, strict=True):
        for run in runs:
            style, rows = styles[run], curve[curve["run"] == run].sort_values("steps")
            if run == CONTROL:
                value = rows[measure].iloc[-1]
                axes.axhline(value, color=style.color, linestyle=(0, (4, 2)), linewidth=1.1)
                continue
            axes.plot(rows["steps"], rows[measure], color=style.color)
            markers(axes, rows["steps"], rows[measure], style)
            if run == focus:
                low, high = rows[f"{measure}_low"], rows[f"{measure}_high"]
                axes.fill_between(rows["steps"], low, high, color=style.color, alpha=0.12, lw=0)
        steps = sorted(curve.loc[curve["run"].isin(acting), "steps"].unique())
        positive = [step for step in steps if step > 0]
        axes.set_xscale("symlog", base=2, linthresh=min(positive, default=1), linscale=0.7)
        axes.set_xticks(steps, [f"{step:,}" for step in steps])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylim(bottom=0)
    grid[len(grid) // 2].set_xlabel("steps of test-time training")
    grid[0].set_ylabel("share of tasks")
    legend(figure, [_handle(styles[run], run) for run in runs], runs)
    return figure


def _handle(style: Style, run: str) -> Line2D:
    line = (0, (4, 2)) if run == CONTROL else "-"
    return Line2D([], [], color=style.color, marker=style.marker or "", linestyle=line)
