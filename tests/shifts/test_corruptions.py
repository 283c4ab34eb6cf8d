"""Corruptions against closed forms and on real images; every image has its own random stream."""

import colorsys
import io
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits, load_sample_image

from tests.helpers.photographs import of_every_class
from tttlab.config.values import BENCHMARK, CORRUPTIONS, HELD_OUT, SEVERITIES
from tttlab.errors import UserError
from tttlab.seeding import numpy_generator
from tttlab.shifts.corruptions import TABLE, corrupt, corrupt_all
from tttlab.shifts.corruptions.blur import disc_kernel
from tttlab.shifts.corruptions.canvas import clouds, length_scale, line_kernel

ROOT = Path(__file__).resolve().parents[2]
NAMES = CORRUPTIONS + HELD_OUT
FIXED = {
    "defocus_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
    "gaussian_blur",
    "saturate",
}


def generator(*key):
    return numpy_generator(0, "test", *key)


def flat(value, side=256):
    return np.full((side, side, 3), value, np.uint8)


def noise_image(height=32, width=32):
    return generator("image").integers(0, 256, (height, width, 3), dtype=np.uint8)


def strength(name, severity):
    return TABLE[name].strengths[severity - 1]


def rmse(corrupted, clean):
    """Root mean square error of each image, of the range 0-1, averaged over the images."""
    squared = ((corrupted.astype(np.float64) - clean) / 255) ** 2
    return np.sqrt(squared.mean(axis=(1, 2, 3))).mean()


def difference(corrupted, expected):
    return np.abs(corrupted.astype(np.float64) - expected).max()


@pytest.fixture(scope="module")
def digits():
    grey = np.clip(load_digits().images[:128] * 16, 0, 255).astype(np.uint8)
    large = [cv2.resize(image, (32, 32), interpolation=cv2.INTER_CUBIC) for image in grey]
    return np.stack([cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) for image in large])


@pytest.fixture(scope="module")
def photographs():
    return of_every_class(13)


# --- on real images -------------------------------------------------------------------------------


def test_names_are_the_fifteen_and_the_four():
    assert len(BENCHMARK) == 15
    assert set(BENCHMARK) <= set(CORRUPTIONS)
    assert len(HELD_OUT) == 4
    assert not set(CORRUPTIONS) & set(HELD_OUT)
    assert BENCHMARK[0] == "gaussian_noise"
    assert BENCHMARK[-1] == "jpeg_compression"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["digits", "photographs"])
def test_damage_grows_with_severity(source, name, request):
    images = request.getfixturevalue(source)
    ids = [str(index) for index in range(len(images))]
    damage = [
        rmse(corrupt_all(images, ids, name, severity, seed=0), images) for severity in SEVERITIES
    ]
    assert len(images) >= 64
    assert damage[0] > 0.005  # more than one grey level: something happens
    assert np.all(np.diff(damage) > 0), damage
    assert damage[4] > 1.3 * damage[0]
    assert damage[4] < 0.45  # black against white is 1: something is left


@pytest.mark.parametrize(
    "name",
    [
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "gaussian_blur",
        "elastic_transform",
        "pixelate",
    ],
)
def test_lengths_damage_small_and_large_photographs_alike(name):
    crops = [
        load_sample_image(file)[top : top + 320, left : left + 320]
        for file in ("china.jpg", "flower.jpg")
        for top, left in ((0, 0), (0, 160), (100, 60), (100, 300))
    ]
    damage = []
    for side in (32, 224):
        images = np.stack(
            [cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA) for crop in crops]
        )
        corrupted = corrupt_all(images, list("01234567"), name, 5, seed=0)
        damage.append(rmse(corrupted, images))
    assert 2 / 3 < damage[1] / damage[0] < 3 / 2


# --- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(16, 16), (17, 40), (64, 48)])
def test_any_shape_and_the_input_is_untouched(name, shape):
    image = noise_image(*shape)
    before = image.copy()
    image.flags.writeable = False
    for severity in SEVERITIES:
        corrupted = corrupt(image, name, severity, generator())
        assert corrupted.shape == (*shape, 3)
        assert corrupted.dtype == np.uint8
        assert not np.shares_memory(corrupted, image)
        assert np.any(corrupted != image)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_is_the_only_randomness(name, digits):
    first = corrupt(digits[0], name, 3, generator(1))
    np.random.default_rng().random()
    cv2.setRNGSeed(7)
    np.testing.assert_array_equal(corrupt(digits[0], name, 3, generator(1)), first)
    second = corrupt(digits[0], name, 3, generator(2))
    assert np.array_equal(second, first) == (name in FIXED)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_depends_neither_on_order_nor_on_its_neighbours(name, digits):
    images, ids = digits[:6], list("abcdef")
    together = corrupt_all(images, ids, name, 4, seed=3)
    backwards = corrupt_all(images[::-1], ids[::-1], name, 4, seed=3)
    np.testing.assert_array_equal(backwards[::-1], together)
    part = corrupt_all(images[2:4], ids[2:4], name, 4, seed=3)
    np.testing.assert_array_equal(part, together[2:4])
    stream = numpy_generator(3, "corruption", "e", name, 4)
    np.testing.assert_array_equal(corrupt(images[4], name, 4, stream), together[4])


def test_streams_differ_by_image_seed_and_severity():
    image = flat(128, side=16)
    pixels = np.stack([image, image])
    base = corrupt_all(pixels, ["a", "b"], "gaussian_noise", 2, seed=0)
    reseeded = corrupt_all(pixels, ["a", "b"], "gaussian_noise", 2, seed=1)
    stronger = corrupt_all(pixels, ["a", "b"], "gaussian_noise", 3, seed=0)
    images = (*base, reseeded[0], stronger[0])
    signs = [np.sign(noisy.astype(int) - 128).ravel() for noisy in images]
    correlation = np.corrcoef(signs) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(image.size)


def test_numpy_scalars_open_the_same_stream():
    pixels = flat(128, side=16)[None]
    plain = corrupt_all(pixels, ["7"], "gaussian_noise", 2, seed=0)
    scalars = corrupt_all(pixels, np.array(["7"]), "gaussian_noise", np.int64(2), seed=np.int64(0))
    np.testing.assert_array_equal(scalars, plain)


def test_threads_do_not_disturb_each_other(digits, monkeypatch):
    import albumentations

    def corrupt_image(index):
        return corrupt_all(digits[index : index + 1], [str(index)], "spatter", 3, seed=0)

    alone = [corrupt_image(0), corrupt_image(1)]
    draw = albumentations.Spatter.get_params_dependent_on_data
    barrier = threading.Barrier(2, timeout=10)

    def draw_together(*args, **kwargs):
        barrier.wait()  # both threads have set their random state; now both draw
        return draw(*args, **kwargs)

    monkeypatch.setattr(albumentations.Spatter, "get_params_dependent_on_data", draw_together)
    with ThreadPoolExecutor(2) as pool:
        np.testing.assert_array_equal(list(pool.map(corrupt_image, range(2))), alone)


def test_a_mapped_or_mirrored_array_gives_the_same_picture(tmp_path, digits):
    np.save(tmp_path / "pixels.npy", digits[:3])
    mapped = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    mirrored = np.ascontiguousarray(digits[0][:, ::-1])[:, ::-1]
    for name in NAMES:
        expected = corrupt_all(digits[:3], list("abc"), name, 2, seed=0)
        np.testing.assert_array_equal(corrupt_all(mapped, list("abc"), name, 2, seed=0), expected)
        single = corrupt(mirrored, name, 2, numpy_generator(0, "corruption", "a", name, 2))
        np.testing.assert_array_equal(single, expected[0])


def test_the_names_cost_no_heavy_import():
    heavy = ("torch", "albumentations", "scipy")
    code = (
        "import sys, tttlab.shifts.corruptions; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("gausian_noise", 1, "did you mean 'gaussian_noise'?"),
        ("fog", 0, "expected 1, 2, 3, 4 or 5, found 0"),
        ("fog", 6, "found 6"),
        ("fog", "3", "found '3'"),
    ],
)
def test_a_wrong_shift_is_one_clear_line(name, severity, message):
    for call in (
        lambda: corrupt(flat(0, 16), name, severity, generator()),
        lambda: corrupt_all(np.empty((0, 16, 16, 3), np.uint8), [], name, severity, seed=0),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 4), (15, 32, 3), (2, 32, 32, 3)])
def test_an_image_of_another_shape_is_refused(shape):
    with pytest.raises(UserError, match="expected RGB, uint8"):
        corrupt(np.zeros(shape, np.uint8), "fog", 1, generator())


def test_an_image_of_floats_is_refused():
    with pytest.raises(UserError, match="found float64"):
        corrupt(np.zeros((32, 32, 3)), "fog", 1, generator())


# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_noise_has_the_deviation_of_the_table(severity):
    values = corrupt(flat(128), "gaussian_noise", severity, generator()).astype(np.float64)
    expected = np.sqrt((255 * strength("gaussian_noise", severity)) ** 2 + 1 / 12)  # 1/12: rounding
    assert values.mean() == pytest.approx(128, abs=0.4)
    assert values.std() == pytest.approx(expected, rel=0.015)
    neighbours = np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.02


@pytest.mark.parametrize("severity", SEVERITIES)
def test_shot_noise_counts_photons_in_linear_light(severity):
    photon = strength("shot_noise", severity)
    light = (100 / 255) ** 2.2
    linear = (corrupt(flat(100), "shot_noise", severity, generator()) / 255) ** 2.2
    assert linear.mean() == pytest.approx(light, rel=0.02)
    # Poisson: in photons, the variance is the mean.
    assert linear.var() == pytest.approx(photon * light, rel=0.04)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_hits_its_share_of_pixels(severity):
    values = corrupt(flat(128), "impulse_noise", severity, generator())
    hit = int(256 * 256 * strength("impulse_noise", severity))
    assert np.count_nonzero((values == 255).all(axis=2)) == hit // 2
    assert np.count_nonzero((values == 0).all(axis=2)) == hit - hit // 2
    assert np.count_nonzero(values != 128) == 3 * hit


@pytest.mark.parametrize("severity", SEVERITIES)
def test_speckle_noise_is_uniform_and_proportional(severity):
    spread = strength("speckle_noise", severity)
    for value in (60, 120):
        values = corrupt(flat(value), "speckle_noise", severity, generator()).astype(np.float64)
        assert values.min() >= value * (1 - spread) - 1
        assert values.max() <= value * (1 + spread)
        assert values.mean() == pytest.approx(value - 0.5, abs=0.3)  # albumentations rounds down
        assert values.std() == pytest.approx(np.sqrt((value * spread) ** 2 / 3 + 1 / 12), rel=0.02)


# --- blur -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 128])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_blur_equals_scipy(severity, side):
    image = noise_image(side, side)
    sigma = strength("gaussian_blur", severity) * np.sqrt(side / 32)
    expected = ndimage.gaussian_filter(
        image.astype(float), (sigma, sigma, 0), mode="mirror", radius=int(3.5 * sigma)
    )
    assert difference(corrupt(image, "gaussian_blur", severity, generator()), expected) <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_convolves_with_the_disc(severity):
    image = noise_image(32, 40)
    kernel = disc_kernel(strength("defocus_blur", severity))
    expected = ndimage.convolve(image.astype(float), kernel[..., None], mode="mirror")
    assert difference(corrupt(image, "defocus_blur", severity, generator()), expected) <= 1


def test_the_disc_is_a_disc():
    np.testing.assert_array_equal(disc_kernel(0.5), [[0, 0, 0], [0, 1, 0], [0, 0, 0]])
    for radius in (3.3, 6.0):
        kernel = disc_kernel(radius)
        across = np.arange(len(kernel)) - len(kernel) // 2
        assert kernel.sum() == pytest.approx(1, abs=1e-5)
        centre = kernel[len(kernel) // 2, len(kernel) // 2]
        assert centre == pytest.approx(1 / (np.pi * radius**2), rel=0.03)
        variance = (kernel * across**2).sum()
        width_of_a_pixel = 1 / 12
        assert variance == pytest.approx(radius**2 / 4 + width_of_a_pixel, rel=0.03)


@pytest.mark.parametrize("angle", [0, 0.4, np.pi / 2, 2.5])
@pytest.mark.parametrize("length", [1.4, 4.0, 10.6])
def test_the_line_has_its_length_and_angle(length, angle):
    kernel = line_kernel(length, angle).astype(np.float64)
    across = np.arange(len(kernel)) - len(kernel) // 2
    down, right = np.meshgrid(across, across, indexing="ij")
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    assert (kernel * right).sum() == pytest.approx(0, abs=1e-5)
    assert (kernel * down).sum() == pytest.approx(0, abs=1e-5)
    # A uniform line has variance L²/12; dividing a point between two pixels adds at most 1/4 along
    # each axis.
    for axis, share in ((right, np.cos(angle) ** 2), (down, np.sin(angle) ** 2)):
        extra = (kernel * axis**2).sum() - share * length**2 / 12
        assert -0.02 * length < extra < 0.26
    covariance = (kernel * right * down).sum()
    expected = np.cos(angle) * np.sin(angle) * length**2 / 12
    assert covariance == pytest.approx(expected, abs=0.04 * length)


def test_motion_blur_convolves_with_a_line_of_the_drawn_angle():
    image = noise_image()
    angle = generator("angle").uniform(0, np.pi)
    kernel = line_kernel(strength("motion_blur", 4), angle)
    expected = ndimage.correlate(image.astype(float), kernel[..., None], mode="mirror")
    assert difference(corrupt(image, "motion_blur", 4, generator("angle")), expected) <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur_pulls_a_ramp_towards_its_middle(severity):
    ramp = np.broadcast_to(np.arange(32)[None, :, None] * 8, (32, 32, 3)).astype(np.uint8)
    length = strength("zoom_blur", severity)
    factors = np.linspace(1, (16 + length) / 16, int(length) + 2)
    expected = 8 * (15.5 + (np.arange(32) - 15.5) * np.mean(1 / factors))
    assert difference(corrupt(ramp, "zoom_blur", severity, generator())[16, :, 0], expected) <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_blur_scatters_no_further_than_its_reach_and_to_no_side(severity):
    point = np.zeros((33, 33, 3), np.uint8)
    point[13:20, 13:20] = 255
    reach = strength("glass_blur", severity) * length_scale(point)
    total = np.zeros((33, 33))
    for draw in range(200):
        total += corrupt(point, "glass_blur", severity, generator(draw))[..., 0]
    total /= total.sum()
    across = np.arange(33) - 16
    assert abs((total * across).sum()) < 0.05
    assert abs((total * across[:, None]).sum()) < 0.05
    lit = np.abs(across)[total.sum(axis=0) > 0].max()
    assert lit <= 3 + np.ceil(reach) + 2  # 2: radius of the final blur


# --- weather --------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(
    ("name", "colour", "largest"),
    [("fog", (220, 222, 226), 0.95), ("frost", (226, 236, 245), 0.9)],
)
def test_fog_and_frost_are_veils_of_the_opacity_of_the_table(name, colour, largest, severity):
    opacity = corrupt(flat(0, 64), name, severity, generator()) / np.array(colour)
    assert opacity.mean() == pytest.approx(strength(name, severity), abs=0.015)
    assert opacity.max() <= largest + 0.003
    assert np.ptp(opacity, axis=2).max() < 0.01  # the same in every channel
    assert opacity[..., 0].std() > 0.04  # no even grey
    on_white = corrupt(flat(255, 64), name, severity, generator())
    assert difference(on_white, 255 * (1 - opacity) + np.array(colour) * opacity) <= 2


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_is_haze_and_flakes_along_a_steep_way(severity):
    share = strength("snow", severity)
    runs = np.zeros(2)
    for draw in range(20):
        opacity = corrupt(flat(0, 64), "snow", severity, generator(draw))[..., 0] / 245
        assert opacity.min() == pytest.approx(share, abs=0.003)
        flakes = opacity - share
        runs += [(flakes[1:] * flakes[:-1]).sum(), (flakes[:, 1:] * flakes[:, :-1]).sum()]
        # Blur makes a flake larger.
        assert 0.5 * share < (flakes > 0.1).mean() < 6 * share
    assert runs[0] > 1.1 * runs[1]


@pytest.mark.parametrize("severity", SEVERITIES)
def test_spatter_paints_mud_of_the_opacity_of_the_table(severity):
    peaks, means = [], []
    for draw in range(20):
        mud = corrupt(flat(0, 32), "spatter", severity, generator(draw)) / np.array([110, 82, 52])
        peaks.append(mud.max())
        means.append(mud.mean())
    assert np.mean(peaks) == pytest.approx(strength("spatter", severity), abs=0.02)
    assert 0.3 < np.mean(means) / strength("spatter", severity) < 0.5


def test_clouds_fill_the_range_and_do_not_wrap_around():
    fields = np.stack([clouds((32, 48), 4, 0.6, generator(draw)) for draw in range(200)])
    assert np.all(fields.min(axis=(1, 2)) == 0)
    assert np.all(fields.max(axis=(1, 2)) == 1)
    fields = fields - fields.mean(axis=(1, 2), keepdims=True)

    def correlation(a, b):
        return (a * b).mean() / np.sqrt((a**2).mean() * (b**2).mean())

    assert correlation(fields[:, :, 0], fields[:, :, 1]) > 0.8
    assert correlation(fields[:, 0], fields[:, 1]) > 0.8
    assert correlation(fields[:, :, 0], fields[:, :, -1]) < 0.1
    assert correlation(fields[:, 0], fields[:, -1]) < 0.1


# --- digital --------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_adds_a_constant(severity):
    image = noise_image()
    expected = np.clip(image + 255 * strength("brightness", severity), 0, 255)
    assert difference(corrupt(image, "brightness", severity, generator()), expected) <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_keeps_its_share_of_the_distance_to_the_mean_grey(severity):
    image = noise_image()
    factor = strength("contrast", severity)
    mean = (image @ np.array([0.299, 0.587, 0.114])).mean()
    expected = mean + factor * (image - mean)
    assert difference(corrupt(image, "contrast", severity, generator()), expected) <= 1.1


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("colour", [(100, 80, 60), (40, 44, 200), (200, 200, 200), (0, 0, 0)])
def test_saturate_equals_colorsys(colour, severity):
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    amount = strength("saturate", severity)
    saturation = min(1, saturation * (1 + amount) + 0.1 * amount)
    expected = np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 255
    image = np.full((16, 16, 3), colour, np.uint8)
    assert difference(corrupt(image, "saturate", severity, generator()), expected) <= 1


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_elastic_transform_moves_by_its_root_mean_square(severity):
    ramp = np.zeros((128, 128, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(128) * 2, np.arange(128)[:, None] * 2
    moved = np.stack(
        [corrupt(ramp, "elastic_transform", severity, generator(draw)) for draw in range(40)]
    )
    inner = slice(28, 100)  # outside, mirrored edges and the blur's border change the field
    shift = (moved[:, inner, inner, :2].astype(float) - ramp[inner, inner, :2]) / 2
    # Lengths on 128 pixels are twice those on 32.
    expected = strength("elastic_transform", severity) * 2
    assert np.sqrt((shift**2).mean(axis=(0, 1, 2))) == pytest.approx([expected, expected], rel=0.12)


def test_pixelate_shows_the_mean_of_each_block():
    image = noise_image()
    assert strength("pixelate", 5) == 2
    means = image.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    expected = means.repeat(2, axis=0).repeat(2, axis=1)
    assert difference(corrupt(image, "pixelate", 5, generator()), expected) <= 0.5


@pytest.mark.parametrize(("severity", "cells"), [(1, 29), (2, 26), (3, 23), (4, 20), (5, 16)])
def test_pixelate_has_one_colour_per_block(severity, cells):
    blocks = corrupt(noise_image(), "pixelate", severity, generator())
    assert len(np.unique(blocks, axis=0)) == cells
    assert len(np.unique(blocks, axis=1)[0]) == cells


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_equals_pillow_at_that_quality(severity):
    image = load_sample_image("china.jpg")[100:164, 200:296]
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=strength("jpeg_compression", severity))
    expected = np.asarray(Image.open(buffer)).astype(float)
    corrupted = corrupt(image, "jpeg_compression", severity, generator())
    assert np.abs(corrupted - expected).mean() < 0.5


@pytest.mark.parametrize(("side", "expected"), [(16, 1), (32, 1), (128, 2), (288, 3)])
def test_lengths_grow_with_the_root_of_the_shorter_side(side, expected):
    assert length_scale(np.empty((side, 3 * side, 3))) == pytest.approx(expected)
