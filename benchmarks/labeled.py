"""The test images whose labels are known: what a benchmark of accuracy may count."""

from dataclasses import replace

import numpy as np

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.errors import UserError
from tttlab.shifts.shift import Shift
from tttlab.workflow.shifted import open_test


def open_labeled(params: Params, count: int | None) -> tuple[ImageSet, list[Shift]]:
    """Open the test images and their shifts as `open_test` does, without images of unknown label.

    Shifts of which nothing remains are left out.

    Raises:
        UserError: no label is known.
    """
    test, shifts = open_test(params, count)
    shifts = [
        shift if shift.images is None else replace(shift, images=known(shift.images))
        for shift in shifts
    ]
    test = known(test)
    shifts = [shift for shift in shifts if len(shift.of(test))]
    if not shifts:
        raise UserError("data.test: expected labels, found none, and so no accuracy to measure")
    return test, shifts


def known(images: ImageSet) -> ImageSet:
    """Leave out the images whose label is unknown."""
    return images.view(np.flatnonzero(np.asarray(images.labels) >= 0))
