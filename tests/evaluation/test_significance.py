import time

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as by_statsmodels
from statsmodels.stats.multitest import multipletests

from tttlab.evaluation.significance import holm, mcnemar


class TestMcNemar:
    @pytest.mark.parametrize(
        ("helped", "hurt", "expected"),
        [
            (5, 0, 2 / 2**5),  # all five in one direction or all in the other
            (4, 1, 2 * (1 + 5) / 2**5),
            (1, 7, 2 * (1 + 8) / 2**8),
            (3, 3, 1),
            (0, 0, 1),
        ],
    )
    def test_binomial_tails_by_hand(self, helped, hurt, expected):
        assert mcnemar([helped], [hurt]) == pytest.approx(expected)

    def test_against_statsmodels(self):
        helped, hurt = np.random.default_rng(0).integers(40, size=(2, 200))
        expected = [
            by_statsmodels([[0, a], [b, 0]], exact=True).pvalue
            for a, b in zip(helped, hurt, strict=True)
        ]
        assert mcnemar(helped[:, None], hurt[:, None]) == pytest.approx(expected, rel=1e-9)

    def test_several_seeds_take_the_weakest(self):
        p_values = [mcnemar([a], [b]) for a, b in ((12, 1), (9, 2), (20, 3))]
        assert mcnemar([12, 9, 20], [1, 2, 3]) == pytest.approx(max(p_values))

    def test_seeds_that_disagree_show_nothing(self):
        assert mcnemar([30, 0], [0, 30]) == 1
        assert mcnemar([30, 0], [0, 0]) == 1  # in the second nothing flipped

    def test_rejects_no_more_often_than_its_level(self):
        generator = np.random.default_rng(1)
        flips = generator.integers(5, 60, size=(20_000, 1))
        helped = generator.binomial(flips, 0.5)
        rejected = (mcnemar(helped, flips - helped) <= 0.05).mean()
        assert rejected <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 20_000)

    def test_seventy_six_shifts_of_twenty_runs_take_no_time(self):
        helped, hurt = np.random.default_rng(2).integers(40, size=(2, 20, 76, 3))
        start = time.process_time()  # not the time of other processes
        for run in range(20):
            holm(mcnemar(helped[run], hurt[run]))
        assert time.process_time() - start < 1  # 0.02 s on an idle machine


class TestHolm:
    def test_worked_by_hand(self):
        # Sorted: 0.01 × 4, 0.02 × 3, 0.03 × 2 = 0.06 (not below the one before), 0.9.
        assert holm(np.array([0.9, 0.01, 0.03, 0.02])) == pytest.approx([0.9, 0.04, 0.06, 0.06])

    def test_unknown_ones_do_not_count(self):
        adjusted = holm(np.array([0.01, np.nan, 0.02]))
        assert adjusted[[0, 2]] == pytest.approx([0.02, 0.02])
        assert np.isnan(adjusted[1])
        assert np.isnan(holm(np.array([np.nan]))).all()
        assert len(holm(np.array([]))) == 0

    def test_against_statsmodels(self):
        p = np.random.default_rng(4).uniform(size=40) ** 3
        p[7] = p[3]
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], rel=1e-12)

    def test_any_false_one_is_rare(self):
        p = stats.uniform.rvs(size=(2000, 10), random_state=3)
        assert np.mean([(holm(row) < 0.05).any() for row in p]) == pytest.approx(0.05, abs=0.015)
