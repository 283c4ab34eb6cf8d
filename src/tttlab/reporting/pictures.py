"""Pictures of test images: one under each corruption, and examples of turned predictions."""

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
from tttlab.reporting.words import in_lines
from tttlab.seeding import numpy_generator

if TYPE_CHECKING:
    from tttlab.data.image_sets import ImageSet
    from tttlab.shifts.shift import Shift

FLIPS = 6  # examples of each direction
EXAMPLES = 4  # images of a set that comes shifted
# Largest side in pixels. Larger pictures look the same at their size, but make a heavy page.
_THUMBNAIL = 64
# Largest side in pixels of a PNG, whose every pixel is seen. A larger JPEG is a fifth of its size.
_LOSSLESS = 32
_TITLE = 12  # characters in a line above a picture


@dataclass(frozen=True)
class Flip:
    """A shifted image whose prediction became right or wrong by adapting.

    Attributes:
        image: ``data:`` address of the picture.
        title: Names of the image and its shift.
        truth: Name of its class.
        before: The source's prediction: name of the class and confidence (a fraction).
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
    """Examples of one run on one model, with the number of flips of each direction."""

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
    """Draw random examples of both directions from ``outputs/predictions/<model>/<run>.parquet``.

    All flips of shifted images with one training seed's network are equally likely. The random
    stream is keyed by (seed, model, run, direction).

    Args:
        outputs: The folder of outputs.
        model: Name of the model.
        run: Name of the run.
        test: The test set.
        shifts: What was done to the test set, or shown in its place.
        seed: The seed of params.yaml, on which the corruptions and the draw depend.
        training_seed: Of the network: the first of ``seeds`` in params.yaml, as in other stages.
        at_most: Examples of each direction.

    Returns:
        None without predictions or labels.
    """
    path = outputs / "predictions" / model / f"{run}.parquet"
    if not path.is_file():
        return None
    table = pd.read_parquet(path)
    labeled = (table["shift"] != "clean") & (table["label"] >= 0)
    table = table[labeled & (table["seed"] == training_seed)]
    if table.empty:
        return None
    before = table["source_prediction"] == table["label"]
    after = table["adapted_prediction"] == table["label"]
    by_name, examples, counts = {shift.name: shift for shift in shifts}, [], []
    for name, flipped in (("wrong to right", ~before & after), ("right to wrong", before & ~after)):
        rows = table[flipped].sort_values(["image_id", "shift"])
        order = numpy_generator(seed, "flips", model, run, name).permutation(len(rows))[:at_most]
        drawn = rows.iloc[order].itertuples()
        examples.append(tuple(_flip(row, by_name[row.shift], test, seed) for row in drawn))
        counts.append(len(rows))
    return Flips(model, run, *examples, counts=tuple(counts))


def _flip(row: tuple, shift: "Shift", test: "ImageSet", seed: int) -> Flip:
    images = shift.of(test)
    pixels = shift.apply(images.take([images.image_ids.index(row.image_id)]), seed)[0]

    def name(label: int) -> str:
        return images.classes[label] if 0 <= label < len(images.classes) else str(label)

    return Flip(
        image=data_address(thumbnail(pixels)),
        title=f"{row.image_id}, {shift_name(row.corruption)} {row.severity or ''}".rstrip(),
        truth=name(row.label),
        before=(name(row.source_prediction), row.source_confidence),
        after=(name(row.adapted_prediction), row.adapted_confidence),
        gate_open=bool(getattr(row, "gate_open", True)),
    )


def shift_pictures(
    images: "ImageSet",
    corruptions: Sequence[str],
    severities: Sequence[int],
    seed: int,
    strength: str = "own",
) -> dict[str, list[np.ndarray]]:
    """Show one test image per corruption: clean, then at each severity, exactly as `adapt` sees it.

    Args:
        images: The test set.
        corruptions: Their names.
        severities: 1 to 5.
        seed: The seed of params.yaml, on which the corruptions depend.
        strength: Whose strengths they have.
    """
    from tttlab.shifts.shift import list_shifts

    indices = np.linspace(0, len(images) - 1, len(corruptions)).astype(int)
    pictures = {}
    for index, name in zip(indices, corruptions, strict=True):
        image = images.take([index])
        shifts = list_shifts([name], severities, strength)
        pictures[name] = [thumbnail(shift.apply(image, seed)[0]) for shift in shifts]
    return pictures


def set_pictures(shifts: Sequence["Shift"], at_most: int = EXAMPLES) -> dict[str, list[np.ndarray]]:
    """Show a few images of every shift that has images of its own."""
    return {
        shift.name: [thumbnail(pixels) for pixels in shift.images.pixels[:at_most]]
        for shift in shifts
        if shift.images is not None and not shift.clean
    }


@styled
def draw_pictures(
    pictures: Mapping[str, Sequence[np.ndarray]], rows: Sequence[str], title: str
) -> Figure:
    """Draw shifted images: a column per corruption, a row per severity.

    Args:
        pictures: Per corruption, one (S, S, 3) uint8 image per row.
        rows: Labels of the rows, such as ``clean, 1, …, 5``.
        title: Above all.
    """
    columns = min(len(pictures), 15)
    blocks = -(-len(pictures) // columns)
    above = 0.1 + 0.12 * max(2, *(_wrapped(name).count("\n") + 1 for name in pictures))
    figure = blank(
        max(3.0, 0.64 * columns + 0.5), blocks * (0.62 * len(rows) + above + 0.1) + 0.4, title
    )
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    grid = figure.subplots(blocks * len(rows), columns, squeeze=False)
    for axes in grid.ravel():
        axes.axis("off")
    for number, (name, images) in enumerate(pictures.items()):
        block, column = divmod(number, columns)
        panels = grid[block * len(rows) : (block + 1) * len(rows), column]
        panels[0].set_title(_wrapped(name), loc="center", fontsize=7)
        # A small set has fewer images than rows.
        for axes, image, row in zip(panels, images, rows, strict=False):
            axes.imshow(image, interpolation="none")
            if column == 0:
                options = {"ha": "right", "va": "center", "color": MUTED}
                axes.text(-0.12, 0.5, row, transform=axes.transAxes, **options)
    return figure


def _wrapped(name: str) -> str:
    """Break a shift's name into short lines; different names stay different."""
    of_set, slash, rest = shift_name(name).rpartition("/")
    if not slash:
        return rest.replace(" ", "\n")
    return "\n".join([*in_lines(of_set, _TITLE), *in_lines(rest, _TITLE)])


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Shrink a picture (S, S, 3) uint8 to at most 64 pixels a side."""
    from PIL import Image

    if max(image.shape[:2]) <= _THUMBNAIL:
        return image
    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(picture)


def data_address(image: np.ndarray) -> str:
    """Write a picture (S, S, 3) uint8 as a ``data:`` address for a page."""
    from PIL import Image

    kind = "png" if max(image.shape[:2]) <= _LOSSLESS else "jpeg"
    options = {"quality": 85} if kind == "jpeg" else {}
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
