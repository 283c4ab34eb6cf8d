"""Versions of the test set: names, whose images they are, and what is done to them."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import InPlace, Place, pixel_hash
from tttlab.shifts.corruptions import corrupt_all
from tttlab.shifts.shift import Shift, list_shifts


def image_set(count, prefix="test", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    names = tuple(f"{prefix}/{number}" for number in range(count))
    return ImageSet(pixels, np.arange(count) % 2, names, ("a", "b"))


@pytest.mark.parametrize(
    ("shift", "name", "clean"),
    [
        (Shift(), "clean", True),
        (Shift(images=image_set(1)), "clean", True),
        (Shift("fog", 3), "fog-3", False),
        (Shift("cifar10_c/fog", 3, image_set(1)), "cifar10_c/fog-3", False),
        (Shift("photos/by night", 0, image_set(1)), "photos/by night", False),
        (Shift("test", 0, image_set(1)), "test", False),
    ],
)
def test_names_tell_the_severity_where_there_is_one(shift, name, clean):
    assert (shift.name, shift.clean) == (name, clean)


def test_shifts_are_the_clean_one_and_every_pair_in_order():
    names = [shift.name for shift in list_shifts(["snow", "fog"], [5, 1])]
    assert names == ["clean", "snow-5", "snow-1", "fog-5", "fog-1"]
    assert [shift.name for shift in list_shifts([], [5])] == ["clean"]


def test_images_of_its_own_take_the_place_of_the_test_images():
    test, shifted = image_set(3), image_set(2, "own", seed=1)
    assert Shift().of(test) is Shift("fog", 3).of(test) is test
    assert Shift("photos/night", 0, shifted).of(test) is shifted
    assert Shift(images=shifted).of(test) is shifted


def test_images_of_its_own_are_left_as_they_are_whatever_the_shift_is_called():
    images = image_set(2, "own", seed=1)
    for shift in (
        Shift(images=images),
        Shift("photos/night", 0, images),
        Shift("cifar10_c/fog", 3, images),
        Shift("fog", 5, images),
    ):
        np.testing.assert_array_equal(shift.apply(images, 7), images.pixels)
    np.testing.assert_array_equal(Shift().apply(images, 7), images.pixels)


def test_test_images_are_corrupted_each_from_its_own_stream():
    test = image_set(4)
    whole = Shift("gaussian_noise", 3).apply(test, 7)
    expected = corrupt_all(test.pixels, test.image_ids, "gaussian_noise", 3, 7)
    np.testing.assert_array_equal(whole, expected)
    assert (whole != test.pixels).any(axis=(1, 2, 3)).all()
    part = Shift("gaussian_noise", 3).apply(test.take([2, 0]), 7)
    np.testing.assert_array_equal(part, whole[[2, 0]])
    assert (Shift("gaussian_noise", 3).apply(test, 8) != whole).any(axis=(1, 2, 3)).all()
    assert (Shift("gaussian_noise", 5).apply(test, 7) != whole).any(axis=(1, 2, 3)).all()


def test_corruptions_have_the_strength_that_is_asked_for():
    test = image_set(2)
    test = replace(test, pixels=test.pixels.repeat(2, 1).repeat(2, 2))  # CIFAR-10-C has 32 pixels
    expected = corrupt_all(test.pixels, test.image_ids, "contrast", 3, 7, "cifar10_c")
    published = Shift("contrast", 3, strength="cifar10_c")
    np.testing.assert_array_equal(published.apply(test, 7), expected)
    assert (expected != Shift("contrast", 3).apply(test, 7)).any()


def test_images_read_in_place_are_shifted_as_packed_ones_are(tmp_path):
    packed = image_set(3)
    for number, pixels in enumerate(packed.pixels):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    places = [Place(str(tmp_path / f"{number}.png")) for number in range(3)]
    in_place = InPlace(places, [*map(pixel_hash, packed.pixels)], 16)
    lazy = ImageSet(in_place, packed.labels, packed.image_ids, packed.classes)
    for shift in (Shift(), Shift("fog", 2), Shift("photos/night", 0, lazy)):
        pixels = shift.apply(lazy, 7)
        assert isinstance(pixels, np.ndarray)
        np.testing.assert_array_equal(pixels, shift.apply(packed, 7))
