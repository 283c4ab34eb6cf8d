import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.bootstrap import paired_interval


def interval(difference) -> np.ndarray:
    rows = len(difference)
    images, groups = np.arange(rows), np.zeros(rows, int)
    return paired_interval(difference, images, groups, num_groups=1, seed=0)[0]


def test_one_shift_against_the_normal_formula():
    difference = np.random.default_rng(2).choice([-1, 0, 1], p=[0.1, 0.6, 0.3], size=1000)
    half = stats.norm.ppf(0.975) * difference.std() / math.sqrt(1000)
    expected = [difference.mean() - half, difference.mean() + half]
    assert interval(difference) == pytest.approx(expected, abs=0.003)


def test_one_shift_against_the_binomial_distribution():
    # All wrong before, 12 of 50 right after: a resample's count is Binomial(50, 0.24).
    difference = np.repeat([1, 0], [12, 38])
    expected = stats.binom.ppf([0.025, 0.975], 50, 0.24) / 50
    assert interval(difference) == pytest.approx(expected, abs=1e-9)


def test_many_shifts_against_scipy_on_image_means():
    generator = np.random.default_rng(3)
    difference = generator.choice([-1, 0, 1], size=(60, 5)) + 0.0
    reference = stats.bootstrap(
        (difference.mean(axis=1),), np.mean, method="percentile", n_resamples=20_000, rng=generator
    ).confidence_interval
    images, groups = np.repeat(np.arange(60), 5), np.zeros(300, int)
    intervals = paired_interval(difference.ravel(), images, groups, num_groups=1, seed=0)
    assert intervals[0] == pytest.approx(list(reference), abs=0.006)


def test_unequal_numbers_of_shifts_against_a_slow_loop():
    images = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    difference = np.array([1.0, 1, 0, -1, 0, 1, 0, 0])
    generator = np.random.default_rng(4)
    means = []
    for _ in range(20_000):
        drawn = generator.integers(4, size=4)
        rows = np.concatenate([np.flatnonzero(images == image) for image in drawn])
        means.append(difference[rows].mean())
    intervals = paired_interval(difference, images, np.zeros(8, int), num_groups=1, seed=0)
    assert intervals[0] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)


def test_blocks_of_draws_do_not_change_the_law():
    # 3,000 images are drawn in several blocks; the interval must still be the normal formula's.
    difference = np.random.default_rng(5).choice([0, 1], p=[0.9, 0.1], size=3000)
    half = stats.norm.ppf(0.975) * difference.std() / math.sqrt(3000)
    assert np.diff(interval(difference)) == pytest.approx(2 * half, rel=0.04)


def test_one_image_tells_no_interval():
    assert np.isnan(interval(np.array([1.0]))).all()
