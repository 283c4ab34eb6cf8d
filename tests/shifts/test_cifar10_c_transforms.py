"""Every corruption of CIFAR-10-C against a closed form or an independent slow path."""

import colorsys
import io

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits, load_sample_image

from tttlab.config.values import BENCHMARK, HELD_OUT, SEVERITIES
from tttlab.errors import UserError
from tttlab.seeding import numpy_generator
from tttlab.shifts.corruptions import TABLES, corrupt, corrupt_all
from tttlab.shifts.corruptions.cifar10_c import weather
from tttlab.shifts.corruptions.cifar10_c.blur import Disc, Glass, disc_kernel, glass
from tttlab.shifts.corruptions.cifar10_c.digital import Elastic, elastic
from tttlab.shifts.corruptions.cifar10_c.filters import smear
from tttlab.shifts.shift import list_shifts

NAMES = (*BENCHMARK, *HELD_OUT)
FIXED = {
    *("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"),
    *("gaussian_blur", "saturate"),
}
# The published strengths of the others are not ordered by the damage they do; on digits, eight
# pixels wide at first, nor are those of pixelate.
ORDERED = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "defocus_blur"),
    *("gaussian_blur", "zoom_blur", "snow", "fog", "brightness", "contrast"),
    "jpeg_compression",
)


def generator(*key):
    return numpy_generator(0, "test", *key)


def flat(value):
    return np.full((32, 32, 3), value, np.uint8)


def noise_image():
    return generator("image").integers(0, 256, (32, 32, 3), dtype=np.uint8)


def strength(name, severity):
    return TABLES["cifar10_c"][name].strengths[severity - 1]


def corrupted(image, name, severity, *key):
    return corrupt(image, name, severity, generator(*key), "cifar10_c").astype(float)


def draws(image, name, severity, count=20):
    return np.stack([corrupted(image, name, severity, draw) for draw in range(count)])


def largest(one, other):
    return np.abs(one.astype(float) - other).max()


@pytest.fixture(scope="module")
def digits():
    grey = np.clip(load_digits().images[:32] * 16, 0, 255).astype(np.uint8)
    large = [cv2.resize(image, (32, 32), interpolation=cv2.INTER_CUBIC) for image in grey]
    return np.stack([cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) for image in large])


# --- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_untouched_and_the_generator_the_only_randomness(name):
    image = noise_image()
    before = image.copy()
    image.flags.writeable = False
    for severity in SEVERITIES:
        first = corrupt(image, name, severity, generator(1), "cifar10_c")
        assert first.shape == (32, 32, 3)
        assert first.dtype == np.uint8
        assert not np.shares_memory(first, image)
        np.random.default_rng().random()
        cv2.setRNGSeed(7)
        np.testing.assert_array_equal(
            corrupt(image, name, severity, generator(1), "cifar10_c"), first
        )
        second = corrupt(image, name, severity, generator(2), "cifar10_c")
        assert np.array_equal(second, first) == (name in FIXED)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_the_others_and_a_shift_has_its_strength(name, digits):
    ids = list("abcd")
    together = corrupt_all(digits[:4], ids, name, 4, 3, "cifar10_c")
    alone = corrupt_all(digits[2:3], ids[2:3], name, 4, 3, "cifar10_c")
    np.testing.assert_array_equal(alone[0], together[2])
    _, shift = list_shifts([name], [4], "cifar10_c")
    assert shift.name == f"{name}-4"
    assert not np.array_equal(together, corrupt_all(digits[:4], ids, name, 4, 3))
    assert list_shifts([name], [4])[1].strength == "own"


@pytest.mark.parametrize("name", ORDERED)
def test_damage_grows_with_severity(name, digits):
    ids = [str(index) for index in range(len(digits))]
    every = [corrupt_all(digits, ids, name, level, 0, "cifar10_c") for level in SEVERITIES]
    damage = [((images - digits.astype(float)) ** 2).mean() for images in every]
    assert damage[0] > 0
    assert np.all(np.diff(damage) > 0), damage


@pytest.mark.parametrize("name", ["fog", "pixelate"])
@pytest.mark.parametrize("shape", [(16, 16), (32, 48), (64, 64)])
def test_other_sizes_are_refused_in_a_line(name, shape):
    found = rf"found {shape[0]} × {shape[1]}; resize it, or take the strength own$"
    with pytest.raises(UserError, match=r"expected 32 × 32 pixels, .*" + found):
        corrupt(np.zeros((*shape, 3), np.uint8), name, 1, generator(), "cifar10_c")
    with pytest.raises(UserError, match=found):
        corrupt_all(np.zeros((0, *shape, 3), np.uint8), [], name, 1, 0, "cifar10_c")


def test_an_unknown_strength_is_refused_in_a_line():
    with pytest.raises(UserError, match="found 'cifar10c'; did you mean 'cifar10_c'"):
        corrupt(flat(0), "fog", 1, generator(), "cifar10c")


def test_both_strengths_have_the_same_types_in_the_same_order():
    assert tuple(TABLES["own"]) == tuple(TABLES["cifar10_c"]) == NAMES
    assert all(len(kind.strengths) == 5 for kind in TABLES["cifar10_c"].values())


# --- noise: fractions are cut off, which costs half a level and adds a variance of 1/12 -----------


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_its_variance(severity):
    expected = {
        "gaussian_noise": strength("gaussian_noise", severity) * 255,
        "shot_noise": 255 * np.sqrt(100 / 255 / strength("shot_noise", severity)),
        "speckle_noise": strength("speckle_noise", severity) * 100,
    }
    for name, deviation in expected.items():
        values = draws(flat(100), name, severity)
        assert values.mean() == pytest.approx(99.5, abs=0.5)
        assert values.std() == pytest.approx(np.sqrt(deviation**2 + 1 / 12), rel=0.02)
        for axis in (1, 2, 3):
            one, other = np.take(values, 0, axis), np.take(values, 1, axis)
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.12


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_hits_its_share_of_the_values_of_every_channel(severity):
    values, share = draws(flat(100), "impulse_noise", severity), strength("impulse_noise", severity)
    assert set(np.unique(values)) == {0, 100, 255}
    spread = np.sqrt(share * (1 - share) / values.size)
    assert (values != 100).mean() == pytest.approx(share, abs=4 * spread)
    assert (values == 255).sum() == pytest.approx((values == 0).sum(), rel=0.15)
    assert ((values != 100).sum(axis=3) == 3).mean() < 0.002


# --- blur -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_blur_equals_a_sum_over_neighbours(severity):
    image, sigma = noise_image(), strength("gaussian_blur", severity)
    reach = int(4 * sigma + 0.5)
    across = np.arange(-reach, reach + 1)
    weights = np.exp(-(across**2) / (2 * sigma**2))
    padded = np.pad(image / weights.sum() ** 2, [(reach, reach)] * 2 + [(0, 0)], mode="edge")
    expected = sum(
        weights[reach + down] * weights[reach + right] * np.roll(padded, (-down, -right), (0, 1))
        for down in across
        for right in across
    )[reach:-reach, reach:-reach]
    assert largest(corrupted(image, "gaussian_blur", severity), expected) < 1.001


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_convolves_with_a_soft_disc(severity):
    image, disc = noise_image(), strength("defocus_blur", severity)
    kernel = disc_kernel(disc).astype(float)
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    across = np.arange(5) - 2
    # Variances add up: of a point, a cross or a square, and of three weights of a Gaussian.
    hard = {0.3: 0, 0.4: 0, 0.5: 0, 1: 2 / 5, 1.5: 2 / 3}[disc.radius]
    side = np.exp(-1 / (2 * disc.softness**2))
    assert (kernel * across**2).sum() == pytest.approx(hard + 2 * side / (1 + 2 * side), abs=1e-5)
    np.testing.assert_allclose(kernel, kernel.T, atol=1e-7)
    np.testing.assert_allclose(kernel, kernel[::-1], atol=1e-7)
    expected = ndimage.convolve(image.astype(float), kernel[..., None], mode="mirror")
    assert largest(corrupted(image, "defocus_blur", severity), expected) < 1.01
    assert np.all(corrupted(flat(255), "defocus_blur", severity) == 255)


def test_the_largest_disc_is_a_square_of_nine_pixels():
    np.testing.assert_allclose(disc_kernel(Disc(1.5, 0.1))[1:-1, 1:-1], 1 / 9, atol=1e-6)


@pytest.mark.parametrize("times", [1, 2])
def test_glass_takes_every_pixel_from_above_or_the_left(times):
    image, expected, stream = noise_image(), noise_image(), generator("glass")
    for _ in range(times):
        up, left = stream.integers(0, 2, (2, 30, 30))
        for row in range(31, 1, -1):
            for column in range(31, 1, -1):
                source = row - up[row - 2, column - 2], column - left[row - 2, column - 2]
                expected[row, column] = expected[source]
    # So narrow a Gaussian is a point.
    assert largest(glass(image, Glass(0.05, times), generator("glass")), expected) <= 1


@pytest.mark.parametrize(("angle", "way"), [(0, (0, 1)), (90, (1, 0)), (45, None), (-90, (-1, 0))])
def test_smear_is_half_a_gaussian_to_one_side(angle, way):
    point = np.zeros((32, 32, 3), np.uint8)
    point[16, 16] = 255
    weights = np.exp(-(np.arange(13) ** 2) / (2 * 1.5**2))
    smeared = smear(point, 6, 1.5, angle)[..., 0] / 255
    assert smeared.sum() == pytest.approx(1, abs=13 / 255)
    # What a pixel shows lies ahead of it: the point is seen behind itself.
    steps = np.arange(6)
    if way is None:
        cast = np.ceil(steps * np.sqrt(0.5) - 0.5).astype(int)
        assert np.count_nonzero(smeared) == np.count_nonzero(np.diag(smeared))
        seen = np.bincount(cast, weights[:6] / weights.sum())[:3]
        np.testing.assert_allclose(smeared[16 - np.arange(3), 16 - np.arange(3)], seen, atol=0.01)
    else:
        seen = smeared[16 - way[0] * steps, 16 - way[1] * steps]
        np.testing.assert_allclose(seen, weights[:6] / weights.sum(), atol=1 / 255)


def test_motion_blur_repeats_edges_and_leans_at_most_45_degrees():
    ramp = np.broadcast_to(np.arange(32)[:, None, None] * 8, (32, 32, 3)).astype(np.uint8)
    along = np.arange(19)
    weights = np.exp(-(along**2) / (2 * 2.5**2))
    furthest = 8 * np.sqrt(0.5) * (along * weights).sum() / weights.sum()
    moves = draws(ramp, "motion_blur", 5, 100)[:, 16, 16, 0] - 128
    assert np.abs(moves).max() < furthest + 2
    assert moves.min() < -0.7 * furthest
    assert moves.max() > 0.7 * furthest
    assert np.all(corrupted(flat(255), "motion_blur", 5) == 255)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur_is_the_mean_of_magnified_middles(severity):
    image = noise_image()
    factors = 1 + 0.01 * np.arange(strength("zoom_blur", severity)) + 1e-9
    total = image.astype(float)
    for factor in factors:
        kept = int(np.ceil(32 / factor))
        first = (32 - kept) // 2
        middle = image[first : first + kept, first : first + kept].astype(float)
        large = ndimage.zoom(middle, (factor, factor, 1), order=1)
        first = (len(large) - 32) // 2
        total += large[first : first + 32, first : first + 32]
    assert factors[-1] == pytest.approx((1.06, 1.11, 1.15, 1.2, 1.25)[severity - 1])
    expected = total / (len(factors) + 1)
    assert largest(corrupted(image, "zoom_blur", severity), expected) < 1.001


# --- weather --------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_whitens_and_falls_the_same_turned_round(severity):
    kept = strength("snow", severity).kept
    for value in (0, 50, 100):
        picture = corrupted(flat(value), "snow", severity)
        assert largest(picture, picture[::-1, ::-1]) == 0
        ground = kept * value + (1 - kept) * max(value, 1.5 * value + 127.5)
        assert picture.min() == pytest.approx(min(ground, 255) - 0.5, abs=0.51 + 8 * (severity > 3))
        assert picture.max() > min(ground + 30, 254)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_frost_adds_ice_by_the_published_weights(severity):
    weights = strength("frost", severity)
    ices = draws(flat(0), "frost", severity, 200) / 255 / weights.ice
    mean = np.mean([colour for colour, _ in weather.ICES], axis=0)
    assert ices.mean(axis=(0, 1, 2)) == pytest.approx(mean, abs=0.06)
    for value in (40, 100):
        on_grey, ice = (
            corrupted(flat(value), "frost", severity),
            corrupted(flat(0), "frost", severity),
        )
        assert largest(on_grey - ice, np.minimum(weights.image * value, 255 - ice)) < 1.01


@pytest.mark.parametrize("decay", [3, 2.5, 2, 1.75])
def test_plasma_is_rougher_where_it_decays_less(decay):
    rough = []
    for draw in range(100):
        field = weather.plasma(decay, generator(draw))
        assert field.min() == 0
        assert field.max() == 1
        coarse, fine = field[::2, ::2], field
        details = []
        for grid in (coarse, fine):
            old, new = grid[::2, ::2], grid[1::2, 1::2]
            below, beside = np.roll(old, -1, 0), np.roll(old, -1, 1)
            details.append(new - (old + below + beside + np.roll(below, -1, 1)) / 4)
        rough.append([detail.std() for detail in details])
    coarse, fine = np.mean(rough, axis=0)
    assert coarse / fine == pytest.approx(decay**2, rel=0.03)
    uniform = details[1] / details[1].std()
    assert np.abs(uniform).max() < 1.2 * np.sqrt(3)  # a uniform distribution ends there


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_lies_between_its_darkest_and_brightest_point(severity):
    amount = strength("fog", severity).amount
    white = 100 / 255
    values = draws(flat(100), "fog", severity)
    darkest = 100 * white / (white + amount)
    assert values.min(axis=(1, 2, 3)) == pytest.approx(np.floor(darkest), abs=1)
    assert values.max(axis=(1, 2, 3)) == pytest.approx(99.5, abs=1)


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_water_is_turquoise_and_has_its_brightness(severity):
    added = draws(flat(0), "spatter", severity) / 255
    colour = np.array(weather.WATER)
    assert added.max(axis=(1, 2)) == pytest.approx(np.tile(0.5 * colour, (20, 1)), abs=1 / 255)
    assert largest(added, added[..., 1:2] / colour[1] * colour) < 1.1 / 255
    wet = (0.02, 0.08, 0.3)[severity - 1]
    assert wet / 2 < (added.max(axis=3) > 0).mean() < 2 * wet
    dark, light = corrupted(flat(50), "spatter", severity), corrupted(flat(0), "spatter", severity)
    assert largest(dark - light, 50) <= 1


@pytest.mark.parametrize("severity", [4, 5])
def test_mud_is_brown_and_covers(severity):
    on_black, on_white = (draws(flat(value), "spatter", severity) / 255 for value in (0, 255))
    mud = on_black[..., 0] / weather.MUD[0]
    assert mud.max() == pytest.approx(1, abs=0.02)
    assert mud[mud > 0].min() > 0.78
    assert largest(on_black, mud[..., None] * np.array(weather.MUD)) < 1.1 / 255
    assert largest(on_white, on_black + 1 - mud[..., None]) < 6 / 255
    assert 0.02 < (mud > 0).mean() < 0.2


def test_without_a_drop_the_image_stays_as_it_is():
    dry = weather.Spatter(0.1, 0.01, 0.7, 0.7, 0.5, muddy=False)
    assert largest(weather.spatter(noise_image(), dry, generator()), noise_image()) == 0


# --- digital --------------------------------------------------------------------------------------

COLOURS = [(100, 80, 60), (40, 44, 200), (200, 200, 200), (0, 0, 0), (255, 255, 255), (0, 9, 3)]


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("colour", COLOURS)
def test_brightness_and_saturate_equal_colorsys(colour, severity):
    image = np.full((32, 32, 3), colour, np.uint8)
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    value_up = min(1, value + strength("brightness", severity))
    brighter = np.array(colorsys.hsv_to_rgb(hue, saturation, value_up)) * 255
    assert largest(corrupted(image, "brightness", severity), brighter) < 1.001
    factor, added = strength("saturate", severity)
    richer = colorsys.hsv_to_rgb(hue, min(1, saturation * factor + added), value)
    assert largest(corrupted(image, "saturate", severity), np.array(richer) * 255) < 1.001


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_keeps_its_share_of_the_distance_to_each_channels_mean(severity):
    image = (noise_image() * np.array([1, 0.5, 0.2])).astype(np.uint8)
    mean = image.mean(axis=(0, 1))
    expected = mean + strength("contrast", severity) * (image - mean)
    assert largest(corrupted(image, "contrast", severity), expected) < 1.001


def test_elastic_moves_corners_and_leaves_lines_straight():
    ramp = np.zeros((32, 32, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(32) * 8, np.arange(32)[:, None] * 8
    moves = []
    for draw in range(200):
        moved = elastic(ramp, Elastic(0, 0, 2.56), generator(draw)).astype(float)
        inner = moved[8:24, 8:24, :2]
        assert np.abs(np.diff(inner, 2, axis=0)).max() <= 2  # an affine map of a plane is a plane
        assert np.abs(np.diff(inner, 2, axis=1)).max() <= 2
        # The middle of the first and the last corner.
        moves.append((moved[16, 16, :2] + 0.5 - 128) / 8)
    deviation = 2.56 / np.sqrt(3) / np.sqrt(2)
    assert np.std(moves, axis=0) == pytest.approx([deviation] * 2, rel=0.15)
    assert np.mean(moves, axis=0) == pytest.approx([0, 0], abs=0.25)


def test_elastic_pushes_by_a_smooth_field():
    ramp = np.zeros((32, 32, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(32) * 8, np.arange(32)[:, None] * 8
    strength = Elastic(3.2, 0.96, 0)
    moved = np.stack([elastic(ramp, strength, generator(draw)) for draw in range(20)])
    shift = (moved[:, 6:26, 6:26, :2] + 0.5 - ramp[6:26, 6:26, :2]) / 8
    # Uniform noise on ±1 has deviation 1/√3; the blur leaves 1 / (2√π · sigma) of it.
    expected = 3.2 / np.sqrt(3) / (2 * np.sqrt(np.pi) * 0.96)
    assert np.sqrt((shift**2).mean(axis=(0, 1, 2))) == pytest.approx([expected] * 2, rel=0.05)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_repeats_means_of_boxes(severity):
    image, side = noise_image(), strength("pixelate", severity)
    assert side == int(32 * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])
    # A pixel belongs to a box if its centre does; the nearest box is shown.
    centres, reach = np.arange(32) + 0.5, 16 / side
    boxes = [np.abs(centres - (box + 0.5) * 32 / side) < reach for box in range(side)]
    shown = (centres * side / 32).astype(int)
    weights = np.stack([box / box.sum() for box in boxes])[shown]
    expected = np.einsum("ip,jq,pqc->ijc", weights, weights, image)
    assert largest(corrupted(image, "pixelate", severity), expected) < 1.5


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_equals_pillow_at_that_quality(severity):
    image = load_sample_image("china.jpg")[100:132, 200:232]
    file = io.BytesIO()
    quality = (80, 65, 58, 50, 40)[severity - 1]
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    expected = np.asarray(Image.open(file)).astype(float)
    assert np.abs(corrupted(image, "jpeg_compression", severity) - expected).mean() < 0.5
