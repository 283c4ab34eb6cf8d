"""Perturbations of training images: closed forms, SciPy's filter, the spectrum of the noise."""

import numpy as np
import pytest
from scipy.ndimage import correlate

from tttlab.data import perturbations
from tttlab.data.perturbations import coloured_noise, curved, filtered, mixed, perturb


def stream(key: int = 0) -> np.random.Generator:
    return np.random.default_rng(key)


def photograph(size: int = 12) -> np.ndarray:
    return stream(9).random((size, size + 3, 3))


def test_a_filter_is_scipys_and_keeps_even_areas():
    image = photograph()
    weights = stream().standard_normal((3, 3))
    weights -= weights.mean()
    weights *= 0.7 / np.sqrt((weights**2).sum())
    expected = np.stack(
        [correlate(image[..., channel], weights, mode="mirror") for channel in range(3)], axis=-1
    )
    actual = filtered(image, 0.7, stream())
    np.testing.assert_allclose(actual - image, expected, atol=1e-12)
    assert np.abs(expected).max() > 0.1
    even = np.full((8, 8, 3), 0.4)
    np.testing.assert_allclose(filtered(even, 1.0, stream(1)), even, atol=1e-12)


def test_a_mixture_moves_colours_and_keeps_greys():
    matrix = stream().standard_normal((3, 3))
    matrix = np.eye(3) + 0.3 * (matrix - matrix.mean(0))
    red = np.array([[[1.0, 0.0, 0.0]]])
    np.testing.assert_allclose(mixed(red, 0.3, stream())[0, 0], matrix[0], atol=1e-12)
    assert np.abs(matrix[0] - red[0, 0]).max() > 0.05
    greys = np.linspace(0, 1, 5)[None, :, None].repeat(3, axis=2)
    np.testing.assert_allclose(mixed(greys, 0.3, stream()), greys, atol=1e-12)


def test_a_tone_curve_is_its_sum_of_waves():
    tones = np.linspace(0, 1, 52)  # every fifth of the curve's 256 points
    amplitudes = 0.1 * stream().standard_normal((3, 5)) / np.arange(1, 6)
    actual = curved(tones[None, :, None].repeat(3, axis=2), 0.1, stream())[0]
    for channel, waves in enumerate(amplitudes):
        bend = sum(a * np.sin(np.pi * k * tones) for k, a in enumerate(waves, start=1))
        np.testing.assert_allclose(actual[:, channel], tones + bend, atol=1e-12)
    np.testing.assert_allclose(actual[[0, -1]], [[0] * 3, [1] * 3], atol=1e-12)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_noises_power_falls_with_frequency(beta, monkeypatch):
    monkeypatch.setattr(perturbations, "COLOURS", (beta, beta))
    generator, count = stream(), 600
    power = np.zeros((16, 12))
    for _ in range(count):
        noise = coloured_noise((16, 12, 3), generator)
        assert noise.mean((0, 1)) == pytest.approx([0] * 3, abs=1e-12)
        assert noise.std((0, 1)) == pytest.approx([1] * 3, rel=1e-12)
        power += (np.abs(np.fft.fft2(noise, axes=(0, 1))) ** 2).sum(-1)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(16), np.fft.fftfreq(12), indexing="ij"))
    present = frequency > 0
    slope = np.polyfit(np.log(frequency[present]), np.log(power[present]), 1)[0]
    assert slope == pytest.approx(-beta, abs=0.05)


def test_noise_is_never_white_and_an_images_own_stream_decides():
    assert min(perturbations.COLOURS) >= 0.5
    pixels = (255 * photograph()).astype(np.uint8)
    first, again, other = (perturb(pixels, stream(key)) for key in (3, 3, 4))
    assert first.dtype == np.uint8
    assert first.shape == pixels.shape
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    assert (first != pixels).mean() > 0.5


def test_without_strength_nothing_changes(monkeypatch):
    for name in ("FILTER", "MIXTURE", "CURVE", "NOISE"):
        monkeypatch.setattr(perturbations, f"LARGEST_{name}", 0.0)
    pixels = (255 * photograph()).astype(np.uint8)
    np.testing.assert_array_equal(perturb(pixels, stream()), pixels)
