"""The simulated coverage as small multiples: a panel per population and number of seeds."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLES = {  # colour, marker
    "reported": ("#1b6fd0", "o"),
    "t over images": ("#66666f", "s"),
    "Satterthwaite": ("#66666f", "s"),
    "percentile bootstrap": ("#d95f0e", "^"),
    "percentile, images and seeds": ("#d95f0e", "^"),
    "BCa bootstrap": ("#8a5fbf", "D"),
    "percentile, images": ("#8a5fbf", "D"),
}
LOWEST = 0.8  # a coverage below is written as a number at the axis' lower end


def draw(table: pd.DataFrame, data_sets: int) -> Figure:
    """Draw one seed above, several seeds below."""
    figure = Figure(figsize=(15, 8.2), layout="constrained")
    halves = figure.subfigures(2, 1)
    for half, (several, part) in zip(halves, table.groupby(table["seeds"] > 1), strict=True):
        keys = ["seeds", "population"] if several else ["population"]
        panels = list(part.groupby(keys, sort=False))
        grid = half.subplots(1, len(panels), sharey=True)
        for axes, (_, rows) in zip(grid, panels, strict=True):
            panel(axes, rows, several)
        grid[0].set_ylabel("coverage of the true gain")
        handles, labels = grid[0].get_legend_handles_labels()
        half.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    title = (
        f"Coverage of nominal 95 % intervals; {data_sets:,} simulated data sets each, "
        "with Monte-Carlo error; band: 93–97 %"
    )
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def panel(axes: Axes, rows: pd.DataFrame, several: bool) -> None:
    """Draw the methods side by side over the cases of one panel."""
    keys = ["images", "seed_effect"] if several else ["images", "shifts"]
    cases = list(rows[keys].drop_duplicates().sort_values(keys).itertuples(index=False, name=None))
    axes.axhspan(0.93, 0.97, color="#1b6fd0", alpha=0.1, linewidth=0)
    axes.axhline(0.95, color="#66666f", linewidth=0.6)
    for number, (method, part) in enumerate(rows.groupby("method", sort=False)):
        colour, marker = STYLES[method]
        part = part.set_index(keys).loc[cases]
        positions = [case + 0.21 * (number - 1.5) for case in range(len(cases))]
        clipped = part["coverage"].clip(lower=LOWEST)
        bars = [(clipped - part["low"]).clip(lower=0), (part["high"] - clipped).clip(lower=0)]
        inside = part["coverage"] >= LOWEST
        axes.errorbar(
            positions,
            clipped.where(inside),
            yerr=bars,
            fmt=marker,
            color=colour,
            markersize=4.5,
            linewidth=1,
            label=method,
        )
        for x, coverage in zip(positions, part["coverage"], strict=True):
            if coverage < LOWEST:
                axes.plot(x, LOWEST, marker="v", color=colour, markersize=4.5)
                axes.annotate(
                    f"{100 * coverage:.0f}",
                    (x, LOWEST),
                    xytext=(0, 5),
                    textcoords="offset points",
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=6.5,
                    color=colour,
                )
    first = rows.iloc[0]
    seeds = f"{first['seeds']} training seeds" if several else "one network"
    rate = 100 * rows["flip_rate"].mean()
    axes.set_title(
        f"{first['population']}, {seeds}\ngain {100 * first['gain']:.1f} points, {rate:.2g} % flip",
        fontsize=9,
    )
    axes.set_xticks(range(len(cases)), labels(rows, cases, several), fontsize=7.5)
    with_seeds = "images; standard deviation of the gain over seeds, points"
    axes.set_xlabel(with_seeds if several else "images × shifts", fontsize=8)
    axes.set_ylim(LOWEST - 0.008, 1.008)
    percentages = [80, 85, 90, 95, 100]
    axes.set_yticks(
        [value / 100 for value in percentages], [f"{value} %" for value in percentages], fontsize=8
    )
    axes.spines[["top", "right"]].set_visible(False)


def labels(rows: pd.DataFrame, cases: list[tuple], several: bool) -> list[str]:
    """Name the cases on the axis."""
    if not several:
        return [f"{images}\n× {shifts}" for images, shifts in cases]
    keys = ["images", "seed_effect"]
    spread = rows.drop_duplicates(keys).set_index(keys)["seed_sd"]
    return [f"{images}\n{100 * spread[images, effect]:.2g}" for images, effect in cases]
