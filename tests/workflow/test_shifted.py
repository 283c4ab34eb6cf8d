"""The shifts that the stages after `prepare` see: their order, and the choice of their images."""

import types

import numpy as np
import pytest
from PIL import Image

from tttlab.config.images import Shifts
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import InPlace, Place, pixel_hash
from tttlab.errors import UserError
from tttlab.shifts.corruptions import corrupt_all
from tttlab.shifts.shift import Shift
from tttlab.workflow import places
from tttlab.workflow.set_files import write_shifted
from tttlab.workflow.shifted import open_test


def image_set(count, prefix, seed=0, labels=None):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(count) % 3 if labels is None else labels
    image_ids = tuple(f"{prefix}/{number:03d}" for number in range(count))
    return ImageSet(pixels, labels, image_ids, ("a", "b", "c"))


SETS = {
    "test": image_set(60, "test"),
    "labeled_validation": image_set(45, "validation", seed=1),
    # Like CIFAR-10-C, this set has the names and labels of the test images. The others do not.
    "c": image_set(60, "test", seed=2),
    "photos": image_set(36, "photos", seed=3),
    "unknown": image_set(40, "unknown", seed=4, labels=np.full(40, -1)),
}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """A function that opens the sets that `prepare` wrote, with changed settings."""
    monkeypatch.setattr(places, "OUTPUTS", tmp_path)
    for name in ("test", "labeled_validation"):
        SETS[name].save(tmp_path / "data" / name)
    sets = [
        Shift("z/fog", 3, SETS["c"]),
        Shift("a b/by night", 0, SETS["photos"]),
        Shift("a b/unknown", 0, SETS["unknown"]),
    ]
    write_shifted(sets, tmp_path / "data" / "shifted")

    def opened(count=None, seed=0, **options):
        default = {"corruptions": ("snow", "fog"), "severities": (5, 1)}
        shifts = Shifts(**{"images": None, "sets": {}} | default | options)
        return open_test(types.SimpleNamespace(seed=seed, shifts=shifts), count)

    return opened


def test_the_clean_test_images_come_first_then_their_corruptions_then_the_sets(opened):
    test, shifts = opened()
    assert [shift.name for shift in shifts] == [
        "clean",
        "snow-5",
        "snow-1",
        "fog-5",
        "fog-1",
        "z/fog-3",
        "a b/by night",
        "a b/unknown",
    ]
    assert [shift.severity for shift in shifts] == [0, 5, 1, 5, 1, 3, 0, 0]
    assert [shift.name for shift in shifts if shift.clean] == ["clean"]
    assert all(shift.of(test) is test for shift in shifts[:5])
    np.testing.assert_array_equal(shifts[0].apply(shifts[0].of(test), 0), SETS["test"].pixels)
    for shift, name in zip(shifts[5:], ("c", "photos", "unknown"), strict=True):
        assert shift.of(test).image_ids == SETS[name].image_ids
        np.testing.assert_array_equal(shift.apply(shift.of(test), 0), SETS[name].pixels)
        np.testing.assert_array_equal(shift.of(test).labels, SETS[name].labels)


def test_test_images_that_are_shifted_themselves_leave_clean_to_validation_images(opened):
    test, shifts = opened(clean="validation", corruptions=("fog",), severities=(2,))
    assert [shift.name for shift in shifts[:3]] == ["clean", "test", "fog-2"]
    clean, uncorrupted, foggy = shifts[:3]
    assert clean.clean
    assert not uncorrupted.clean
    np.testing.assert_array_equal(clean.apply(clean.of(test), 0), SETS["labeled_validation"].pixels)
    assert clean.of(test).image_ids == SETS["labeled_validation"].image_ids
    np.testing.assert_array_equal(uncorrupted.apply(uncorrupted.of(test), 0), SETS["test"].pixels)
    fog = corrupt_all(SETS["test"].pixels, SETS["test"].image_ids, "fog", 2, 0)
    np.testing.assert_array_equal(foggy.apply(foggy.of(test), 0), fog)
    assert len(shifts) == 6


def test_without_corruptions_or_sets_the_test_images_are_still_tested_on(opened, tmp_path):
    (tmp_path / "data/shifted/shifts.json").write_text("[]")
    _, shifts = opened(clean="validation", corruptions=())
    assert [shift.name for shift in shifts] == ["clean", "test"]


def names(opened, *arguments, **options):
    test, shifts = opened(*arguments, **options)
    return {shift.name: shift.of(test).image_ids for shift in shifts}


@pytest.mark.parametrize("clean", ["test", "validation"])
def test_fewer_images_are_among_the_more_under_every_shift(opened, clean):
    few, more, most = (names(opened, count, images=30, clean=clean) for count in (6, 15, None))
    every = names(opened, clean=clean)
    assert most == names(opened, 100, images=30, clean=clean)  # never more than shifts.images
    for name in every:
        assert [len(image_ids[name]) for image_ids in (few, more, most)] == [6, 15, 30]
        assert set(few[name]) < set(more[name]) < set(most[name]) < set(every[name])
    sizes = {60, 36, 40} if clean == "test" else {60, 36, 40, 45}
    assert {len(image_ids) for image_ids in every.values()} == sizes


def test_a_count_alone_is_a_limit_too(opened):
    assert {len(image_ids) for image_ids in names(opened, 9).values()} == {9}
    assert names(opened, 9) == names(opened, 9, images=60)


def test_as_many_of_every_class_are_taken_where_classes_are_known(opened):
    test, shifts = opened(12)
    for shift in shifts[:-1]:
        assert np.bincount(shift.of(test).labels).tolist() == [4, 4, 4]
    assert shifts[-1].of(test).labels.tolist() == [-1] * 12


def test_images_with_the_names_of_test_images_are_those_that_are_chosen_of_them(opened):
    image_ids = names(opened, 12)
    assert image_ids["z/fog-3"] == image_ids["clean"]
    assert names(opened, 12, seed=1)["clean"] != image_ids["clean"]


def test_images_read_in_place_are_chosen_without_a_look(opened, tmp_path):
    images = SETS["photos"]
    for number, pixels in enumerate(images.pixels):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    files = [Place(str(tmp_path / f"{number}.png")) for number in range(len(images))]
    pixels = InPlace(files, [*map(pixel_hash, images.pixels)], 16)
    unpacked = ImageSet(pixels, images.labels, images.image_ids, images.classes)
    unpacked.save(tmp_path / "data/shifted/a b%2Fby night")
    (tmp_path / "0.png").unlink()  # so that reading all images would fail
    test, shifts = opened(9)
    subset = shifts[-2].of(test)
    assert not subset.packed
    rows = [images.image_ids.index(name) for name in subset.image_ids]
    assert 0 not in rows
    np.testing.assert_array_equal(shifts[-2].apply(subset, 0), images.pixels[rows])


@pytest.mark.parametrize("text", [None, "", "[{"])
def test_sets_that_were_not_prepared_are_named(opened, tmp_path, text):
    file = tmp_path / "data/shifted/shifts.json"
    file.unlink() if text is None else file.write_text(text)
    message = "data/shifted: expected the list of shifted sets, found none; run the stage prepare"
    with pytest.raises(UserError, match=message):
        opened()
