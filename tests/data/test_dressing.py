"""Dressing: what is measured of an image, what counts as strange, and what is laid over others."""

import math

import numpy as np
import pytest
import torch

from tttlab.data.dressing import (
    POWER_FLOOR,
    Appearance,
    appearance,
    dressed,
    opponent_colours,
    rings,
    strangeness,
)

SIZES = [(32, 32), (28, 28), (8, 8), (15, 20)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_opponent_colours_keep_powers_and_see_grey_in_the_first_alone():
    matrix = opponent_colours(random(1))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3, dtype=torch.float64))
    grey = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(matrix @ grey, grey.new_tensor([math.sqrt(3), 0, 0]))


@pytest.mark.parametrize("size", SIZES)
def test_rings_hold_every_frequency_but_zero_once(size):
    """Against the full spectrum: as many frequencies, and higher rings of higher frequencies."""
    numbers, times = rings(*size)
    assert (numbers < 0).nonzero().tolist() == [[0, 0]]
    assert times[numbers >= 0].sum() == size[0] * size[1] - 1
    radius = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1]))
    found = sorted(zip(numbers.flatten().tolist(), radius.flatten().tolist(), strict=True))
    assert [radius for _, radius in found] == sorted(radius.flatten().tolist())
    assert numbers.unique().tolist() == list(range(-1, int(numbers.max()) + 1))


@pytest.mark.parametrize("size", SIZES)
def test_the_appearance_is_the_mean_power_of_the_full_spectrum(size):
    image = random(3, *size)
    numbers = rings(*size)[0].numpy()
    red, green, blue = image.numpy()
    colours = (
        (red + green + blue) / np.sqrt(3),
        (red - green) / np.sqrt(2),
        (red + green - 2 * blue) / np.sqrt(6),
    )
    found = appearance(image)
    for number, colour in enumerate(colours):
        power = np.abs(np.fft.fft2(colour)) ** 2 / colour.size
        sums = {}
        for down in range(size[0]):
            for right in range(size[1]):
                # A real image's spectrum is symmetric about zero.
                half = right <= size[1] // 2
                there = (down, right) if half else (-down % size[0], -right % size[1])
                sums.setdefault(numbers[there], []).append(power[down, right])
        expected = [np.log(np.mean(sums[ring]) + POWER_FLOOR) for ring in range(len(sums) - 1)]
        np.testing.assert_allclose(found.log_power[number], expected, rtol=1e-10)
        assert found.mean[number].item() == pytest.approx(colour.mean())


def test_white_noise_has_its_variance_in_every_ring():
    powers = appearance(0.1 * random(400, 3, 32, 32)).log_power.exp().mean(0)
    torch.testing.assert_close(powers, torch.full_like(powers, 0.01), rtol=0.06, atol=0)


def test_what_lies_within_natural_variation_is_not_strange():
    """James and Stein: of z² = 1 nothing stays at t = 2, of z² = 8 three quarters."""
    center = Appearance(torch.zeros(3, 6).double(), torch.zeros(3).double())
    scale = Appearance(torch.full((3, 6), 0.5).double(), torch.full((3,), 0.1).double())
    for distance, share in ((1.0, 0.0), (math.sqrt(8), 0.75), (-math.sqrt(8), 0.75)):
        image = Appearance(scale.log_power * distance, scale.mean * distance)
        found = strangeness(image, center, scale, 2.0)
        torch.testing.assert_close(found.log_power, share * image.log_power)
        torch.testing.assert_close(found.mean, share * image.mean)


def test_one_strange_ring_is_believed_as_far_as_its_neighbours_are_strange():
    """z² = 30 alone among zeros counts as 10, and as 15 at the edge."""
    center = Appearance(torch.zeros(3, 6).double(), torch.zeros(3).double())
    scale = Appearance(torch.ones(3, 6).double(), torch.ones(3).double())
    for ring, expected in ((2, 1 - 2 / 10), (0, 1 - 2 / 15)):
        values = torch.zeros(3, 6).double()
        values[1, ring] = math.sqrt(30)
        found = strangeness(Appearance(values, torch.zeros(3).double()), center, scale, 2.0)
        torch.testing.assert_close(found.log_power, expected * values)


def nothing(size: tuple[int, int]) -> Appearance:
    count = int(rings(*size)[0].max()) + 1
    return Appearance(torch.zeros(3, count).double(), torch.zeros(3).double())


@pytest.mark.parametrize("size", SIZES)
def test_nothing_strange_changes_nothing(size):
    images, noise = random(2, 3, *size), random(2, 3, *size, seed=1)
    center = appearance(images[0])
    torch.testing.assert_close(dressed(images, noise, nothing(size), center), images)


@pytest.mark.parametrize("size", SIZES)
def test_lost_power_and_a_moved_colour_are_a_filter_and_a_shift(size):
    """A quarter of the power everywhere: half the contrast about the mean colour."""
    images, noise = random(2, 3, *size), random(2, 3, *size, seed=1)
    light = torch.tensor([0.3, 0.0, 0.0]).double()  # of the first opponent colour
    difference = Appearance(nothing(size).log_power + math.log(1 / 4), light)
    found = dressed(images, noise, difference, appearance(images[0]))
    means = images.mean((-2, -1), keepdim=True)
    torch.testing.assert_close(found, means + (images - means) / 2 + 0.3 / math.sqrt(3))


def test_gained_power_is_noise_of_the_power_that_the_mean_image_then_has_more():
    """On an even image, ring by ring: e^μ (e^ρ − 1)."""
    size = (32, 32)
    center = nothing(size)._replace(log_power=nothing(size).log_power - 3.0)
    change = torch.linspace(0, 1, center.log_power.shape[-1]).double().expand(3, -1)
    images = torch.full((300, 3, *size), 0.5).double()
    difference = Appearance(change, torch.zeros(3).double())
    found = dressed(images, random(300, 3, *size), difference, center)
    powers = appearance(found).log_power.exp().mean(0)
    expected = math.exp(-3) * change.expm1() + POWER_FLOOR
    torch.testing.assert_close(powers, expected, rtol=0.08, atol=1e-9)


def test_images_dressed_as_a_corrupted_one_appear_as_it_does():
    """Blurred and noisy natural spectra: the mean log power of what was dressed is the image's."""
    size = (32, 32)
    numbers, _ = rings(*size)
    amplitudes = (-numbers.clamp_min(0) / 4.0).exp()
    natural = torch.fft.irfft2(torch.fft.rfft2(random(200, 3, *size)) * amplitudes, s=size)
    source = appearance(natural)
    center = Appearance(*(values.mean(0) for values in source))
    scale = Appearance(*(values.std(0) for values in source))
    strange = natural[:1] * 0.2 + 0.3 * random(1, 3, *size, seed=3)
    image = appearance(strange[0])
    difference = strangeness(image, center, scale, 0.0)
    found = appearance(dressed(natural, random(*natural.shape, seed=4), difference, center))
    typical = found.log_power.exp().mean(0).log()
    assert (typical - image.log_power).abs().max() < 0.35
    assert (center.log_power - image.log_power).abs().max() > 1.5
    torch.testing.assert_close(found.mean.mean(0), image.mean, rtol=0, atol=1e-6)


def test_autocast_and_bf16_images_are_measured_in_single_precision():
    """A spectrum rounded to bf16 would look strange beside statistics of single precision."""
    images = random(4, 3, 16, 16).float()
    expected = appearance(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = appearance(images)
        nothing_strange = Appearance(*(part.float() for part in nothing((16, 16))))
        again = dressed(images, random(4, 3, 16, 16).float(), nothing_strange, found)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, images, atol=1e-5, rtol=1e-5)
    coarse = images.bfloat16()
    torch.testing.assert_close(appearance(coarse), appearance(coarse.float()))
