"""The shifts and the number of images that the curves along the steps follow."""

from types import SimpleNamespace

import pytest

from tests.helpers.evaluated import blobs, write_sets
from tttlab.config.images import Shifts
from tttlab.workflow import curves, places


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """A function that follows a run without tuning: shift → the image ids that were adapted to."""
    monkeypatch.setattr(places, "OUTPUTS", tmp_path)
    monkeypatch.setattr(curves, "build_run", lambda *_: SimpleNamespace(task=None))
    blobs(30).save(tmp_path / "data" / "test")
    blobs(30, "validation", seed=1).save(tmp_path / "data" / "labeled_validation")
    write_sets(tmp_path / "data" / "shifted", {"photos/night": blobs(24, "night", seed=2)})

    def follow(curve_severities, trains=True, images=9, **options):
        default = {"corruptions": ("fog", "snow"), "severities": (1, 3, 5)}
        shifts = Shifts(**{"images": None, "sets": {}} | default | options)
        curve = SimpleNamespace(images=images, severities=curve_severities, candidates=0)
        loop = SimpleNamespace(steps=2)
        adapt = SimpleNamespace(curve=curve)
        settings = SimpleNamespace(trains=trains, loop=loop, protocol="episodic")
        run = SimpleNamespace(
            params=SimpleNamespace(seed=0, adapt=adapt, shifts=shifts),
            tuned={"tuned": False, "settings": {}, "default": {}, "candidates": []},
            piece=("r", "m", 0),
            source=None,
            ready=SimpleNamespace(settings=settings),
        )
        seen = {}
        for curve in curves.list_curves(run, None):
            experiment = curve.sweep.experiment
            seen |= {
                shift.name: shift.of(experiment.images).image_ids for shift in curve.sweep.shifts
            }
            seen["steps"] = experiment.record
        return seen

    return follow


def test_clean_images_the_severities_asked_for_and_what_has_none_are_followed(follow):
    seen = follow((5, 1))
    assert seen.pop("steps") == [0, 2]
    assert list(seen) == ["clean", "fog-5", "fog-1", "snow-5", "snow-1", "photos/night"]
    assert {len(image_ids) for image_ids in seen.values()} == {9}
    assert seen["clean"] == seen["fog-5"]
    assert {name.partition("/")[0] for name in seen["photos/night"]} == {"night"}


def test_as_few_images_as_there_are_and_the_same_as_adapt_sees(follow):
    few, more = (follow((5,), images=images) for images in (6, 100))
    assert set(few["clean"]) < set(more["clean"])
    assert (len(more["clean"]), len(more["photos/night"])) == (30, 24)


def test_clean_images_may_be_those_of_validation(follow):
    seen = follow((5,), clean="validation", corruptions=("fog",))
    assert list(seen) == ["clean", "test", "fog-5", "photos/night", "steps"]
    assert seen["clean"][0].startswith("validation/")


def test_a_run_that_neither_trains_nor_was_tuned_is_not_followed(follow):
    assert follow((5,), trains=False) == {}
    assert follow((5,), images=0) == {}


def test_there_is_a_shift_to_follow_whatever_severities_are_tested_on(follow, tmp_path):
    (tmp_path / "data/shifted/shifts.json").write_text("[]")
    assert set(follow((5,), severities=(1, 3))) - {"clean", "steps"}
