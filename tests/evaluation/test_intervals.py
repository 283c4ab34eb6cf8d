"""The interval against formulas for special cases, and its coverage in simulated tests."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks import coverage
from benchmarks.bootstrap import paired_interval
from tttlab.evaluation.intervals import crossed_interval, gain_interval


def one_group(differences) -> np.ndarray:
    """Interval of (images,), (images, shifts) or (images, shifts, seeds) differences."""
    differences = np.asarray(differences, float)
    differences = differences.reshape(*differences.shape, *[1] * (3 - differences.ndim))
    image, _, seed = np.indices(differences.shape).reshape(3, -1)
    groups = np.zeros(image.size, int)
    return gain_interval(differences.ravel(), image, seed, groups, num_groups=1)[0]


def bonett_price(helped, hurt, images):
    """The published adjusted Wald interval of one shift, with the quantile of t."""
    helped, hurt = (helped + 1) / (images + 2), (hurt + 1) / (images + 2)
    centre = helped - hurt
    standard_error = math.sqrt((helped + hurt - centre**2) / (images + 2))
    half = stats.t.ppf(0.975, images - 1) * standard_error
    return centre - half, centre + half


class TestOneSeed:
    @pytest.mark.parametrize(
        ("helped", "hurt", "images"),
        [(12, 5, 100), (0, 0, 50), (3, 0, 40), (1, 30, 60), (0, 10, 10)],
    )
    def test_one_shift_is_bonett_and_prices_interval(self, helped, hurt, images):
        differences = np.repeat([1, -1, 0], [helped, hurt, images - helped - hurt])
        expected = np.clip(bonett_price(helped, hurt, images), -1, 1)
        assert one_group(differences) == pytest.approx(expected, abs=1e-12)

    def test_shifts_under_which_images_flip_alike_count_once(self):
        # The effective number of images is then n, whatever the number of shifts.
        differences = np.repeat([1, -1, 0], [8, 3, 69])
        expected = one_group(differences)
        assert one_group(np.tile(differences[:, None], 20)) == pytest.approx(expected, abs=2e-3)

    def test_many_independent_flips_need_no_adjustment(self):
        means = np.random.default_rng(0).choice([-1, 0, 1], p=[0.1, 0.6, 0.3], size=(200, 40))
        expected = stats.t.interval(0.95, 199, means.mean(), stats.sem(means.mean(axis=1)))
        assert one_group(means) == pytest.approx(expected, abs=1e-4)

    def test_no_flips_still_leave_doubt(self):
        low, high = one_group(np.zeros((50, 3)))
        assert low == -high
        assert 3 / 50 * 0.8 < high < 3 / 50 * 1.2  # the rule of three

    def test_close_to_the_bootstrap_where_that_is_good(self):
        generator = np.random.default_rng(3)
        differences = generator.choice([-1, 0, 1], p=[0.1, 0.7, 0.2], size=(500, 8)) + 0.0
        rows = (differences.ravel(), np.repeat(np.arange(500), 8))
        bootstrap = paired_interval(*rows, np.zeros(4000, int), num_groups=1, seed=0)[0]
        assert one_group(differences) == pytest.approx(bootstrap, abs=1e-3)


class TestSeveralSeeds:
    def test_against_the_two_way_layout_written_out(self):
        generator = np.random.default_rng(1)
        n, shifts, seeds = 300, 50, 3
        image_effect = 0.05 * generator.standard_normal((n, 1, 1))
        seed_effect = 0.03 * generator.standard_normal((1, 1, seeds))
        chance = 0.2 + image_effect + seed_effect
        differences = (generator.random((n, shifts, seeds)) < chance).astype(float)
        cells = differences.mean(axis=1)
        mean, by_image, by_seed = cells.mean(), cells.mean(axis=1), cells.mean(axis=0)
        m_image = seeds * ((by_image - mean) ** 2).sum() / (n - 1)
        m_seed = n * ((by_seed - mean) ** 2).sum() / (seeds - 1)
        m_error = ((cells - by_image[:, None] - by_seed + mean) ** 2).sum() / (n - 1) / (seeds - 1)
        image, seed = (m_image - m_error) / (n * seeds), m_seed / (n * seeds)
        weighted = image * stats.t.ppf(0.975, n - 1) + seed * stats.t.ppf(0.975, seeds - 1)
        half = weighted / math.sqrt(image + seed)
        assert one_group(differences) == pytest.approx([mean - half, mean + half], abs=2e-4)

    def test_seeds_that_alone_differ_give_students_t_over_seeds(self):
        counts = np.array([10, 14, 18])  # of 50 shifts, for every image and by seed
        differences, gains = np.zeros((2000, 50, 3)), counts / 50
        for seed, count in enumerate(counts):
            differences[:, :count, seed] = 1
        expected = stats.t.interval(0.95, 2, gains.mean(), stats.sem(gains))
        assert one_group(differences) == pytest.approx(expected, abs=1e-3)

    def test_equal_networks_are_as_one(self):
        generator = np.random.default_rng(2)
        differences = generator.choice([-1, 0, 1], p=[0.05, 0.8, 0.15], size=(100, 1, 1))
        differences = differences.repeat(6, axis=1)
        expected = one_group(differences)
        assert one_group(differences.repeat(4, axis=2)) == pytest.approx(expected, abs=1e-12)

    def test_never_without_width(self):
        # The seeds' means are equal and M_error exceeds M_image: the variance would be negative.
        differences = np.zeros((20, 1, 2))
        differences[:10, 0, 0] = differences[10:, 0, 1] = 1
        low, high = one_group(differences)
        assert low < 0.5 < high


class TestGroups:
    def test_unequal_groups_at_once_are_each_on_their_own(self):
        generator = np.random.default_rng(4)
        differences = generator.choice([-1, 0, 1], p=[0.2, 0.5, 0.3], size=900) + 0.0
        images, seeds, groups = (generator.integers(count, size=900) for count in (60, 3, 4))
        groups[images < 20] = 0  # some images are in one group only
        intervals = gain_interval(differences, images, seeds, groups, num_groups=5)
        for group in range(4):
            rows = groups == group
            only_group = np.zeros(rows.sum(), int)
            columns = differences[rows], images[rows], seeds[rows], only_group
            (expected,) = gain_interval(*columns, num_groups=1)
            assert intervals[group] == pytest.approx(expected)
        assert np.isnan(intervals[4]).all()

    def test_order_and_names_do_not_matter(self):
        generator = np.random.default_rng(5)
        differences, order = generator.choice([-1.0, 0, 1], size=120), generator.permutation(120)
        images, seeds, groups = np.arange(120) // 6, np.arange(120) % 2, np.arange(120) // 3 % 2
        names = np.array([f"image-{99 - i}" for i in images])
        expected = gain_interval(differences, images, seeds, groups, num_groups=2)
        columns = differences[order], names[order], 7 - seeds[order], groups[order]
        assert gain_interval(*columns, num_groups=2) == pytest.approx(expected)

    def test_what_one_image_or_none_can_tell(self):
        assert np.isnan(one_group([1.0])).all()
        assert np.isnan(one_group(np.ones((1, 4, 3)))).all()
        no_rows = *np.zeros((2, 0)), *np.zeros((2, 0), int)
        assert np.isnan(gain_interval(*no_rows, num_groups=2)).all()
        assert one_group([1.0, 1.0]) == pytest.approx([-1, 1])

    def test_cells_are_what_rows_add_up_to(self):
        generator = np.random.default_rng(6)
        differences = generator.choice([-1.0, 0, 1], size=(30, 5, 2))
        sums, counts = differences.sum(axis=1)[..., None], np.full((30, 2, 1), 5.0)
        flips = np.abs(differences).sum(keepdims=True).ravel()
        (interval,) = crossed_interval(sums, counts, flips)
        assert interval == pytest.approx(one_group(differences))


class TestCoverage:
    """A part of `python -m benchmarks.coverage`.

    The standard error of a share of 2,000 near 95 % is half a point.
    """

    @pytest.mark.parametrize(
        "case",
        [
            coverage.Case("typical", 100, 10),
            coverage.Case("flips under all shifts", 100, 10),
            coverage.Case("typical", 100, 10, seeds=2, seed_effect=0.05),
            coverage.Case("typical", 100, 10, seeds=3, seed_effect=0.0),
            coverage.Case("typical", 100, 10, seeds=3, seed_effect=0.25),
            coverage.Case("typical", 50, 10, seeds=5, seed_effect=0.05),
        ],
        ids=str,
    )
    def test_within_two_points(self, case):
        (row,) = coverage.measure(case, data_sets=2000, only="reported")
        assert row["coverage"] == pytest.approx(0.95, abs=0.02 + 2 * 0.005)

    def test_where_the_bootstrap_fails(self):
        rare = coverage.Case("rare flips", 100, 1)
        few = coverage.Case("typical", 100, 10, seeds=3, seed_effect=0.25)
        coverages = {
            (case.seeds, row["method"]): row["coverage"]
            for case in (rare, few)
            for row in coverage.measure(case, 300)
        }
        assert coverages[1, "percentile bootstrap"] < 0.5 < 0.95 < coverages[1, "reported"]
        assert coverages[3, "percentile, images and seeds"] < 0.9 < coverages[3, "reported"]

    def test_rows_are_not_observations(self):
        """Each image flips under all 8 shifts or none: 640 rows, 80 independent observations."""
        generator, shifts, truth = np.random.default_rng(6), 8, 0.2
        flips = (generator.random((80, 600)) < truth).astype(float)
        sums, counts = shifts * flips[:, None], np.full((80, 1, 600), 8.0)
        by_image = crossed_interval(sums, counts, shifts * flips.sum(axis=0))
        rows = np.repeat(flips, shifts, axis=0)
        by_row = crossed_interval(rows[:, None], np.ones((640, 1, 600)), rows.sum(axis=0))
        image_coverage, row_coverage = (
            ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean() for ends in (by_image, by_row)
        )
        assert image_coverage == pytest.approx(0.95, abs=0.03)
        assert row_coverage < 0.7
