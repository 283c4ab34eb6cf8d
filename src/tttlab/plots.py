"""Figures from tables: what is drawn, in one style, as PNG and as SVG that follows the page's light or dark theme.

Figures are made without pyplot, so nothing is kept open and no display is needed. A run has the same colour and marker
in all of them; the source network without adaptation is always in the colour of the text.
"""

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CONTROL = "none"  # the run that leaves the network as it is

# Chosen so that any two stay at least 15 CIELAB units apart for readers with protanopia, deuteranopia and tritanopia,
# at a contrast of 3:1 or more with the page. DARK are the counterparts for a dark page.
LIGHT = ("#1b6fd0", "#d95f0e", "#0a9b70", "#b83a8f", "#664a10", "#3b2a80")
DARK = ("#4795f5", "#f0602c", "#35cf9a", "#d46aa8", "#efd957", "#cfe6f7")
MARKERS = ("o", "s", "D", "^", "v", "P")

# Exactly these colours are replaced by the page's own when a figure becomes SVG, so nothing else may use them.
INK, MUTED, GRID = "#1b1b20", "#66666f", "#dedee4"
_STYLE = {
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
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


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
    styles = {run: Style(i % size, MARKERS[(i + i // size) % len(MARKERS)]) for i, run in enumerate(others)}
    return {run: styles.get(run, Style(None, "")) for run in runs}


@matplotlib.rc_context(_STYLE)
def gain_per_corruption(table: pd.DataFrame, styles: Mapping[str, Style], title: str) -> Figure:
    """Draw the gain with its interval per corruption, a panel per run.

    Args:
        table: Rows of one model with columns run, corruption, gain, gain_low, gain_high (fractions), in the order of
            drawing; the last corruption is set apart, for the mean.
        styles: From `run_styles`; the panels are its runs, but for the control, whose gain is zero.
        title: Above all panels.
    """
    runs = [run for run in styles if run != CONTROL and run in set(table["run"])]
    names = list(dict.fromkeys(table["corruption"]))
    places = np.arange(len(names)) + (np.arange(len(names)) == len(names) - 1) * 0.5
    columns = min(len(runs), 6)
    lines = -(-len(runs) // columns)
    figure = _figure(width=9, height=0.5 + lines * (0.6 + 0.21 * len(names)), title=title)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(runs) :]:
        axes.remove()
    for run, axes in zip(runs, panels, strict=False):
        rows = table[table["run"] == run].set_index("corruption").reindex(names)
        _intervals(axes, places, 100 * rows[["gain_low", "gain", "gain_high"]].to_numpy(), styles[run])
        axes.set_title(run, color=styles[run].color, fontweight="bold")
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.axvline(0, color=INK, linewidth=0.8)
    panels[0].set_yticks(places, [name.replace("_", " ") for name in names], color=INK)
    for axes in panels[::columns]:
        axes.get_yticklabels()[-1].set_fontweight("bold")
    panels[0].set_ylim(places[-1] + 0.6, -0.6)
    figure.supxlabel("gain, percentage points (line: 95 % interval; filled: the interval leaves zero out)", **_small())
    return figure


def _intervals(axes: Axes, places: np.ndarray, values: np.ndarray, style: Style) -> None:
    """Draw (N, 3) low, middle and high as lines with a marker: filled where zero lies outside, hollow elsewhere."""
    low, middle, high = values.T
    axes.hlines(places, low, high, color=style.color, linewidth=1.3)
    clear = (low > 0) | (high < 0)
    faces = np.where(clear, style.color, "#ffffff")
    axes.scatter(middle, places, s=17, marker=style.marker, c=faces, edgecolors=style.color, linewidths=1.1, zorder=3)


@matplotlib.rc_context(_STYLE)
def accuracy_by_severity(table: pd.DataFrame, styles: Mapping[str, Style], title: str) -> Figure:
    """Draw accuracy along the severity, a panel per model, the source network and every run in it.

    Args:
        table: Columns model, run, severity (0 is clean), accuracy_source, accuracy_adapted (fractions).
        styles: From `run_styles`.
        title: Above all panels.
    """
    models = list(dict.fromkeys(table["model"]))
    figure = _figure(width=max(5.0, min(9.0, 4.5 * len(models))), height=3.4, title=title)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for model, axes in zip(models, panels, strict=True):
        rows = table[table["model"] == model]
        source = rows[rows["run"] == rows["run"].iloc[0]]
        options = {"color": INK, "linestyle": (0, (4, 2)), "label": "source, not adapted", "zorder": 4}
        axes.plot(source["severity"], 100 * source["accuracy_source"], **options)
        for run, style in styles.items():
            line = rows[rows["run"] == run]
            if run != CONTROL and len(line):
                options = {"color": style.color, "marker": style.marker, "label": run}
                axes.plot(line["severity"], 100 * line["accuracy_adapted"], **options)
        axes.set_title(model, fontweight="bold")
        axes.set_xticks(sorted(rows["severity"].unique()))
        axes.xaxis.set_major_formatter(lambda value, _: "clean" if value == 0 else f"{value:g}")
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("severity")
    panels[0].set_ylabel("accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=8)
    return figure


@matplotlib.rc_context(_STYLE)
def loss_along_steps(curves: Mapping[tuple[str, str], Sequence[float]], styles: Mapping[str, Style], title: str) -> Figure:
    """Draw the mean loss before each step and after the last, a panel per run and model; the scales differ.

    Args:
        curves: Losses by (run, model).
        styles: From `run_styles`.
        title: Above all panels.
    """
    columns = min(len(curves), 4)
    rows = -(-len(curves) // columns)
    figure = _figure(width=max(4.5, 2.3 * columns), height=0.9 + 1.7 * rows, title=title)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for ((run, model), losses), axes in zip(curves.items(), panels, strict=False):
        steps = np.arange(len(losses))
        axes.plot(steps, losses, color=styles[run].color, marker=styles[run].marker if len(losses) <= 40 else "")
        axes.set_title(f"{run} · {model}", color=styles[run].color)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        axes.yaxis.get_major_locator().set_params(nbins=4)
        axes.margins(y=0.15)
    for axes in panels[len(curves) :]:
        axes.remove()
    figure.supxlabel("steps taken", **_small())
    figure.supylabel("mean loss over the images", **_small())
    return figure


@matplotlib.rc_context(_STYLE)
def examples(pictures: Mapping[str, Sequence[np.ndarray]], rows: Sequence[str], title: str) -> Figure:
    """Draw shifted images: a column per corruption, a row per severity.

    Args:
        pictures: Per corruption, one (S, S, 3) uint8 image per row.
        rows: What the rows are, such as ``clean, 1, …, 5``.
        title: Above all.
    """
    columns = min(len(pictures), 15)
    blocks = -(-len(pictures) // columns)
    figure = _figure(width=max(3.0, 0.64 * columns + 0.5), height=blocks * (0.62 * len(rows) + 0.45) + 0.4, title=title)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    grid = figure.subplots(blocks * len(rows), columns, squeeze=False)
    for axes in grid.ravel():
        axes.axis("off")
    for number, (name, images) in enumerate(pictures.items()):
        block, column = divmod(number, columns)
        panels = grid[block * len(rows) : (block + 1) * len(rows), column]
        panels[0].set_title(name.replace("_", "\n"), loc="center", fontsize=7)
        for axes, image, row in zip(panels, images, rows, strict=True):
            axes.imshow(image, interpolation="none")
            if column == 0:
                axes.text(-0.12, 0.5, row, ha="right", va="center", transform=axes.transAxes, color=MUTED)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure on white, for where a picture stands alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Write a figure as an ``<svg>`` element for a page that sets ``--muted``, ``--grid``, ``--paper``, ``--run-0``….

    Args:
        figure: From one of the functions above.
        name: Unlike those of the page's other figures, so that their inner references do not meet.
        label: What a screen reader says.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub("<svg[^>]*>", lambda match: re.sub(r' (width|height)="[^"]*"', "", match[0]), text, count=1)
    page = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)", "#ffffff": "var(--paper)"}
    page |= {color: f"var(--run-{number})" for number, color in enumerate(LIGHT)}
    text = re.sub("|".join(page), lambda match: page[match[0]], text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).strip()


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.005, ha="left", fontweight="bold")
    return figure


def _small() -> dict[str, object]:
    return {"fontsize": 8, "color": MUTED}
