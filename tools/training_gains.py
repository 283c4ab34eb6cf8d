"""Draw the table of docs/when_it_helps.md: what training adds, and the best control beside it.

`make pictures` writes docs/pictures/training_gains.png. The page's own table is all it reads, and a
digest of what was drawn stands in the file: by it a test sees that the picture is today's.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tools.pictures import FOLDER, save
from tttlab.errors import UserError, one_line
from tttlab.reporting import plots

PAGE = Path("docs/when_it_helps.md")
PICTURE = FOLDER / "training_gains.png"
HEAD = ["images, network", "method", "by training", "whole gain", "best control"]
_NUMBER = re.compile(r"[+−-]?\d+\.\d+")
_INTERVAL = re.compile(r"\[[^\]]*\]")
_BEHIND = re.compile(r" \((in depth|same study|every method|below)\)$")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


@dataclass(frozen=True)
class Row:
    """A row of the table; every number is in points of accuracy.

    Attributes:
        images: On which images, with which network.
        method: What was trained on every image.
        training: What its steps added: one number, or several of as many networks.
        interval: The 95 % interval of that number; empty where there are several.
        gain: The whole gain, with normalisation and views.
        control: The best run that trains nothing and costs no more.
        control_gain: Its whole gain.
    """

    images: str
    method: str
    training: tuple[float, ...]
    interval: tuple[float, ...]
    gain: tuple[float, ...]
    control: str
    control_gain: tuple[float, ...]


@one_line()
def main() -> None:
    """Write the picture."""
    rows = read_rows(PAGE.read_text(encoding="utf-8"))
    save(draw(rows), PICTURE, "light")
    with Image.open(PICTURE) as picture:
        about = PngInfo()
        about.add_text("digest", digest(rows))
        picture.save(PICTURE, optimize=True, pnginfo=about)


def digest(rows: list[Row]) -> str:
    """Name the rows by what they say."""
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def read_rows(text: str) -> list[Row]:
    """Read the table from the page's Markdown.

    Raises:
        UserError: The page has no table with this head.
    """
    lines = text.splitlines()
    head = "| " + " | ".join(HEAD) + " |"
    if head not in lines:
        raise UserError(f"{PAGE}: expected a table with the head {head!r}, found none")
    rows, images = [], ""
    for line in lines[lines.index(head) + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        images = plain(cells[0]) or images
        rows.append(read_row(images, *cells[1:]))
    return rows


def read_row(images: str, method: str, training: str, gain: str, control: str) -> Row:
    """Read the cells of one row."""
    training_numbers = numbers(_INTERVAL.sub("", training))
    return Row(
        images,
        plain(method),
        training_numbers,
        numbers("".join(_INTERVAL.findall(training))),
        training_numbers if gain == "the same" else numbers(gain),
        plain(_NUMBER.split(control)[0]).rstrip(", "),
        numbers(control),
    )


def numbers(text: str) -> tuple[float, ...]:
    """Read every number with a decimal point."""
    return tuple(float(number.replace("−", "-")) for number in _NUMBER.findall(text))


def plain(text: str) -> str:
    """Leave out links, marks of code, and what stands in brackets behind."""
    return _BEHIND.sub("", _LINK.sub(r"\1", text).replace("`", "").strip())


@plots.styled
def draw(rows: list[Row]) -> Figure:
    """Draw what the steps added, and beside it the whole gain with the best control."""
    heads = [n for n, row in enumerate(rows) if n == 0 or rows[n - 1].images != row.images]
    places = [n + sum(head <= n for head in heads) for n in range(len(rows))]
    figure = Figure(figsize=(7.6, 0.235 * (len(rows) + len(heads)) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, row in zip(places, rows, strict=True):
        draw_training(left, place, row)
        draw_gains(right, place, row)
    for head in heads:
        name_group(left, places[head] - 1, rows[head].images)
    for axes in (left, right):
        axes.axvline(0, color=plots.MUTED, linewidth=0.8, zorder=0)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("points of accuracy")
    left.set_yticks(places, [row.method for row in rows])
    left.set_ylim(places[-1] + 0.6, -0.6)
    left.set_title("what the steps of training added")
    right.set_title("the whole gain, and the best control")
    keys = {
        "with its 95 % interval, or several networks": point(plots.GAIN, "o"),
        "best control that costs no more": point(plots.INK, "D", "none"),
    }
    figure.legend(list(keys.values()), list(keys), loc="outside lower center", ncols=2)
    return figure


def name_group(axes: Axes, place: float, images: str) -> None:
    """Write on which images and network the rows below are; it may reach over both axes."""
    axes.annotate(
        images,
        (0, place),
        xycoords=("axes fraction", "data"),
        xytext=(-125, 0),
        textcoords="offset points",
        va="center",
        fontweight="bold",
        fontsize=8,
        annotation_clip=False,
        bbox={"facecolor": plots.PAPER, "edgecolor": "none", "pad": 0.5},
    ).set_in_layout(False)


def draw_training(axes: Axes, place: int, row: Row) -> None:
    """Draw what the steps added: a point with its interval, or a line with several points."""
    ends = row.interval or row.training
    axes.plot([min(ends), max(ends)], [place, place], color=plots.GAIN, linewidth=2, alpha=0.45)
    axes.plot(row.training, [place] * len(row.training), "o", color=plots.GAIN, markersize=4.5)


def draw_gains(axes: Axes, place: int, row: Row) -> None:
    """Draw the whole gain, and the best control as a diamond with its name."""
    for values, color, up in ((row.gain, plots.GAIN, 0.14), (row.control_gain, plots.INK, -0.14)):
        if len(values) > 1:
            height = place + up
            ends = [min(values), max(values)]
            axes.plot(ends, [height, height], color=color, linewidth=2, alpha=0.45)
    axes.plot(row.gain, [place + 0.14] * len(row.gain), "o", color=plots.GAIN, markersize=4.5)
    marks = {"color": plots.INK, "markerfacecolor": "none", "markersize": 5}
    axes.plot(row.control_gain, [place - 0.14] * len(row.control_gain), "D", **marks)
    far = max(row.control_gain + row.gain)
    axes.annotate(
        row.control,
        (far, place),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        color=plots.MUTED,
    )


def point(color: str, marker: str, face: str | None = None) -> Line2D:
    """Make the key of one kind of point."""
    return Line2D(
        [], [], color=color, marker=marker, markerfacecolor=face or color, linestyle="none"
    )


if __name__ == "__main__":
    main()
