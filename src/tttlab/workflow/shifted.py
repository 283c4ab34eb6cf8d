"""The test images and their shifts, as all stages after `prepare` see them."""

import json
from collections.abc import Sequence

from tttlab.config.params import Params
from tttlab.config.values import UNCORRUPTED
from tttlab.data.image_sets import ImageSet
from tttlab.data.splits import balanced_subset
from tttlab.errors import UserError
from tttlab.shifts.shift import Shift, list_shifts
from tttlab.workflow import places


def open_test(
    params: Params, count: int | None = None, severities: Sequence[int] | None = None
) -> tuple[ImageSet, list[Shift]]:
    """Open the test images and their shifts, the clean one first.

    Args:
        params: all settings.
        count: maximum of images per shift, balanced by class; larger choices contain smaller
            ones. None: ``shifts.images``.
        severities: of the shifts that have any. None: ``shifts.severities``, and all severities
            of the shifted sets.
    """
    options = params.shifts
    limit = min((number for number in (count, options.images) if number is not None), default=None)
    test = choose_images(params, ImageSet.load(places.OUTPUTS / "data" / "test"), limit)
    shifts = list_shifts(options.corruptions, severities or options.severities, options.strength)
    if options.clean == "validation":
        source = ImageSet.load(places.OUTPUTS / "data" / "labeled_validation")
        shifts[:1] = [
            Shift(images=choose_images(params, source, limit)),
            Shift(UNCORRUPTED, 0, test),
        ]
    for shift in open_sets(params, limit):
        if not (shift.severity and severities) or shift.severity in severities:
            shifts.append(shift)
    return test, shifts


def open_sets(params: Params, limit: int | None) -> list[Shift]:
    """Open the shifted sets."""
    folder = places.OUTPUTS / "data" / "shifted"
    try:
        entries = json.loads((folder / "shifts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: expected the list of shifted sets, found none; run the stage prepare first"
        ) from error
    shifts = []
    for entry in entries:
        images = choose_images(params, ImageSet.load(folder / entry["folder"]), limit)
        shifts.append(Shift(entry["corruption"], entry["severity"], images))
    return shifts


def choose_images(params: Params, images: ImageSet, count: int | None) -> ImageSet:
    """Choose images of a set, the same for every stage; their pixels are not loaded."""
    rows = balanced_subset(images.image_ids, images.labels, count, params.seed, "shifts")
    return images.view(rows)
