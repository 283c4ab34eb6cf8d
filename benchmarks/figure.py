"""A figure of the benchmarks: every row as bars, every sweep as a curve."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"floor": "#66666f", "ours": "#1b6fd0", "peer": "#d95f0e"}
SIDES = {"floor": "floor: shared weights", "ours": "ours", "peer": "a deep copy per image"}
LABELS = {
    "images": "images N (1 view, 1 step)",
    "views": "views V (32 images, 4 steps)",
    "steps": "steps S (32 images, 4 views)",
    "parameters": "adapted parameters, thousands",
}


def draw(rows: pd.DataFrame, scaling: pd.DataFrame, machine: dict) -> Figure:
    """Draw rows as bars of milliseconds per image, and every sweep as a curve."""
    figure = Figure(figsize=(12, 3 + 0.34 * len(rows)), layout="constrained")
    table, sweeps = figure.subfigures(2, 1, height_ratios=[0.34 * len(rows) + 0.6, 2.6])
    bars(table.subplots(), rows)
    panels = sweeps.subplots(1, 4)
    for axes, (name, part) in zip(panels, scaling.groupby("sweep", sort=False), strict=True):
        grow(axes, name, part)
    figure.suptitle(
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    return figure


def bars(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw three bars per row, with the two ratios behind them."""
    per_image = 1e3 / rows["images"]
    for offset, (side, colour) in enumerate(COLOURS.items()):
        axes.barh(
            [number + 0.27 * (offset - 1) for number in range(len(rows))],
            rows[f"{side}_seconds"] * per_image,
            height=0.25,
            color=colour,
            label=SIDES[side],
        )
    for number, row in enumerate(rows.itertuples()):
        end = max(row.ours_seconds, row.peer_seconds, row.floor_seconds) * 1e3 / row.images
        axes.text(
            end,
            number,
            f"  ours ÷ floor {row.ours_over_floor:.2f}, copies ÷ ours {row.peer_over_ours:.2f}",
            va="center",
            fontsize=7.5,
        )
    names = [f"{row.name} {row.precision}" for row in rows.itertuples(index=False)]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(right=1.3 * axes.get_xlim()[1])
    axes.set_xlabel("milliseconds per image, median")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


def grow(axes: Axes, name: str, part: pd.DataFrame) -> None:
    """Draw one sweep, with a line of proportional cost for comparison."""
    axes.plot(part["value"], part["seconds"], "o-", color=COLOURS["ours"], markersize=3)
    if name == "parameters":
        axes.set_ylim(bottom=0)
    else:
        axes.set_xscale("log")
        axes.set_yscale("log")
        last = part.iloc[-1]
        proportional = last["seconds"] * part["value"] / last["value"]
        axes.plot(part["value"], proportional, ":", color=COLOURS["floor"], linewidth=1)
    axes.set_xlabel(LABELS[name], fontsize=8)
    axes.set_ylabel("seconds" if name == "images" else "", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
