"""The test images themselves: one under each corruption, and some whose prediction adaptation turned."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tttlab.evaluation.results import shift_name
from tttlab.reporting.plots import MUTED, blank, styled
from tttlab.seeding import numpy_generator

if TYPE_CHECKING:
    from tttlab.data.image_sets import ImageSet
    from tttlab.shifts.shift import Shift

FLIPS = 6  # examples of each direction
EXAMPLES = 4  # images of a set that comes shifted
_THUMBNAIL = (
    64  # pixels; larger pictures would make a heavy page and look no different at their size
)
_LOSSLESS = (
    32  # pixels; up to this side every pixel is seen, beyond it a JPEG is a fifth of the size
)


@dataclass(frozen=True)
class Flip:
    """A shifted image whose prediction became right or wrong by adapting.

    Attributes:
        image: ``data:`` address of the picture.
        title: Which image under which shift.
        truth: Name of its class.
        before: Name and confidence (a fraction) of the source's prediction.
        after: The same with adaptation.
        gate_open: Whether the run's gate would have adapted to it.
    """

    image: str
    title: str
    truth: str
    before: tuple[str, float]
    after: tuple[str, float]
    gate_open: bool


@dataclass(frozen=True)
class Flips:
    """Examples of one run on one model, and of how many they were drawn."""

    model: str
    run: str
    wrong_to_right: tuple[Flip, ...]
    right_to_wrong: tuple[Flip, ...]
    counts: tuple[int, int]


def read_flips(
    outputs: Path,
    model: str,
    run: str,
    test: "ImageSet",
    shifts: Sequence["Shift"],
    seed: int,
    *,
    training_seed: int,
    at_most: int = FLIPS,
) -> Flips | None:
    """Draw examples of both directions from ``outputs/predictions/<model>/<run>.parquet``, at random.

    Every flipped prediction of a shifted image, with one training seed's network, is as likely as any other to be drawn,
    from a stream keyed by (seed, model, run, direction).

    Args:
        outputs: The folder of outputs.
        model: Its name.
        run: Its name.
        test: The test set.
        shifts: What was done to it, or shown in its place.
        seed: The seed of params.yaml, on which the corruptions and the draw depend.
        training_seed: Whose network: the first of ``seeds`` in params.yaml, as in every other stage.
        at_most: Examples of each direction.

    Returns:
        None where there are no predictions, or no labels.
    """
    path = outputs / "predictions" / model / f"{run}.parquet"
    if not path.is_file():
        return None
    table = pd.read_parquet(path)
    table = table[
        (table["shift"] != "clean") & (table["label"] >= 0) & (table["seed"] == training_seed)
    ]
    if table.empty:
        return None
    before, after = (table[f"{who}_prediction"] == table["label"] for who in ("source", "adapted"))
    by_name, drawn, counts = {shift.name: shift for shift in shifts}, [], []
    for name, chosen in (("wrong to right", ~before & after), ("right to wrong", before & ~after)):
        rows = table[chosen].sort_values(["image_id", "shift"])
        order = numpy_generator(seed, "flips", model, run, name).permutation(len(rows))[:at_most]
        drawn.append(
            tuple(
                _flip(row, by_name[row.shift], test, seed) for row in rows.iloc[order].itertuples()
            )
        )
        counts.append(len(rows))
    return Flips(model, run, *drawn, counts=tuple(counts))


def _flip(row: tuple, shift: "Shift", test: "ImageSet", seed: int) -> Flip:
    images = shift.of(test)
    pixels = shift.apply(images.take([images.image_ids.index(row.image_id)]), seed)[0]
    title = f"{row.image_id}, {shift_name(row.corruption)} {row.severity or ''}".rstrip()

    def name(label: int) -> str:
        return images.classes[label] if 0 <= label < len(images.classes) else str(label)

    before, after = (
        (name(getattr(row, f"{who}_prediction")), getattr(row, f"{who}_confidence"))
        for who in ("source", "adapted")
    )
    return Flip(
        data_address(thumbnail(pixels)),
        title,
        name(row.label),
        before,
        after,
        bool(getattr(row, "gate_open", True)),
    )


def shift_pictures(
    images: "ImageSet", corruptions: Sequence[str], severities: Sequence[int], seed: int
) -> dict[str, list[np.ndarray]]:
    """Show one test image per corruption: clean, then at each severity, exactly as `adapt` sees it.

    Args:
        images: The test set.
        corruptions: Their names.
        severities: 1 to 5.
        seed: The seed of params.yaml, on which the corruptions depend.
    """
    from tttlab.shifts.shift import Shift

    places = np.linspace(0, len(images) - 1, len(corruptions)).astype(int)
    pictures = {}
    for place, name in zip(places, corruptions, strict=True):
        one = images.take([place])
        shifts = [Shift(), *(Shift(name, severity) for severity in severities)]
        pictures[name] = [thumbnail(shift.apply(one, seed)[0]) for shift in shifts]
    return pictures


def set_pictures(shifts: Sequence["Shift"], at_most: int = EXAMPLES) -> dict[str, list[np.ndarray]]:
    """Show a few images of every shift that comes with its own."""
    own = {
        shift.name: shift.images for shift in shifts if shift.images is not None and not shift.clean
    }
    return {
        name: [thumbnail(pixels) for pixels in images.pixels[:at_most]]
        for name, images in own.items()
    }


@styled
def draw_pictures(
    pictures: Mapping[str, Sequence[np.ndarray]], rows: Sequence[str], title: str
) -> Figure:
    """Draw shifted images: a column per corruption, a row per severity.

    Args:
        pictures: Per corruption, one (S, S, 3) uint8 image per row.
        rows: What the rows are, such as ``clean, 1, …, 5``.
        title: Above all.
    """
    columns = min(len(pictures), 15)
    blocks = -(-len(pictures) // columns)
    figure = blank(max(3.0, 0.64 * columns + 0.5), blocks * (0.62 * len(rows) + 0.45) + 0.4, title)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    grid = figure.subplots(blocks * len(rows), columns, squeeze=False)
    for axes in grid.ravel():
        axes.axis("off")
    for number, (name, images) in enumerate(pictures.items()):
        block, column = divmod(number, columns)
        panels = grid[block * len(rows) : (block + 1) * len(rows), column]
        panels[0].set_title(_wrapped(name), loc="center", fontsize=7)
        for axes, image, row in zip(
            panels, images, rows, strict=False
        ):  # a small set has fewer images than rows
            axes.imshow(image, interpolation="none")
            if column == 0:
                axes.text(
                    -0.12, 0.5, row, ha="right", va="center", transform=axes.transAxes, color=MUTED
                )
    return figure


def _wrapped(name: str) -> str:
    """Break a name of a shift into short lines, so that no two names become one."""
    return shift_name(name).replace("_", "_\n").replace(" ", "\n").replace("/", "\n")


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Make a picture small enough for a page: (S, S, 3) uint8, at most 64 pixels a side."""
    from PIL import Image

    if max(image.shape[:2]) <= _THUMBNAIL:
        return image
    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(picture)


def data_address(image: np.ndarray) -> str:
    """Write a picture (S, S, 3) uint8 as a ``data:`` address that a page can hold."""
    from PIL import Image

    kind = "png" if max(image.shape[:2]) <= _LOSSLESS else "jpeg"
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(
        buffer, format=kind, **({"quality": 85} if kind == "jpeg" else {})
    )
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
