"""The test images under every shift of params.yaml, as every stage after `prepare` sees them."""

import json
from collections.abc import Sequence

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.data.splits import balanced_subset
from tttlab.errors import UserError
from tttlab.shifts.shift import Shift, list_shifts
from tttlab.workflow import places

UNCORRUPTED = "test"  # the shift's name where the test images are themselves shifted


def open_test(
    params: Params, count: int | None = None, severities: Sequence[int] | None = None
) -> tuple[ImageSet, list[Shift]]:
    """Open the test images, and their shifts with the clean one first.

    Args:
        params: all settings.
        count: images per shift, at most, balanced by class, the fewer among the more; None: ``shifts.images``.
        severities: of the shifts that have any; None: ``shifts.severities``, and all of the distributed sets.
    """
    wish = params.shifts
    limit = min((number for number in (count, wish.images) if number is not None), default=None)
    test = choose(params, ImageSet.load(places.OUTPUTS / "data" / "test"), limit)
    shifts = list_shifts(wish.corruptions, severities or wish.severities)
    if wish.clean == "validation":
        source = ImageSet.load(places.OUTPUTS / "data" / "labeled_validation")
        shifts[:1] = [Shift(images=choose(params, source, limit)), Shift(UNCORRUPTED, 0, test)]
    sets = open_sets(params, limit)
    return test, shifts + [
        each for each in sets if not (each.severity and severities) or each.severity in severities
    ]


def open_sets(params: Params, limit: int | None) -> list[Shift]:
    """Open the images that come shifted."""
    folder = places.OUTPUTS / "data" / "shifted"
    try:
        entries = json.loads((folder / "shifts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: expected the list of shifted sets, found none; run the stage prepare first"
        ) from error
    return [
        Shift(
            entry["corruption"],
            entry["severity"],
            choose(params, ImageSet.load(folder / entry["folder"]), limit),
        )
        for entry in entries
    ]


def choose(params: Params, images: ImageSet, count: int | None) -> ImageSet:
    """Choose some images of a set, the same for every stage; their pixels stay where they are."""
    return images.view(
        balanced_subset(images.image_ids, images.labels, count, params.seed, "shifts")
    )
