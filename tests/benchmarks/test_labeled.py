"""Images whose label is unknown are no wrong answers."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import labeled
from tests.helpers import trainings
from tttlab.errors import UserError
from tttlab.shifts.shift import Shift

TEST = trainings.image_set(6)
HALF = replace(TEST, labels=np.where(np.arange(6) < 4, TEST.labels, -1))
NONE = replace(TEST, labels=np.full(6, -1))


def opened(monkeypatch, test, *sets):
    shifts = [Shift(), Shift("fog", 3), *(Shift("set", 0, images) for images in sets)]
    monkeypatch.setattr(labeled, "open_test", lambda *_: (test, shifts))
    return labeled.open_labeled(None, None)


def test_only_images_of_known_label_are_opened(monkeypatch):
    test, shifts = opened(monkeypatch, TEST, HALF, NONE)
    assert [len(shift.of(test)) for shift in shifts] == [6, 6, 4]
    test, shifts = opened(monkeypatch, NONE, HALF)
    assert [(shift.name, len(shift.of(test))) for shift in shifts] == [("set", 4)]
    assert shifts[0].of(test).image_ids == TEST.image_ids[:4]


def test_without_labels_there_is_nothing_to_measure(monkeypatch):
    with pytest.raises(UserError, match=r"data\.test: expected labels, found none"):
        opened(monkeypatch, NONE)
