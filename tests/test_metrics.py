import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tttlab import metrics
from tttlab.errors import UserError


def predictions(label, source, adapted, *, shifts=("fog-1",), **columns) -> pd.DataFrame:
    """A table of predictions: ``source`` and ``adapted`` are (shifts, images)."""
    blocks = []
    for shift, before, after in zip(shifts, np.atleast_2d(source), np.atleast_2d(adapted), strict=True):
        corruption, _, severity = shift.rpartition("-") if shift != "clean" else ("none", "", "0")
        block = {"shift": shift, "corruption": corruption, "severity": int(severity), "label": label}
        block |= {"source_prediction": before, "adapted_prediction": after, "fell_back": False, "milliseconds": 1.0}
        block |= {"source_confidence": 0.5, "adapted_confidence": 0.5, "loss_first": 0.0, "loss_last": 0.0}
        blocks.append(pd.DataFrame({"image_id": [f"image-{i}" for i in range(len(label))], **block}))
    return pd.concat(blocks, ignore_index=True).assign(**columns)


def binary(before, after, shifts=("fog-1",)) -> pd.DataFrame:
    """Predictions from correctness: class 0 is right, class 1 is wrong."""
    before, after = np.atleast_2d(before), np.atleast_2d(after)
    return predictions(np.zeros(before.shape[1], int), 1 - before, 1 - after, shifts=shifts)


class TestSummarise:
    TABLE = predictions(
        label=[0, 1, 2, 3],
        source=[[0, 1, 2, 3], [0, 1, 9, 9], [0, 9, 9, 9]],
        adapted=[[0, 1, 2, 9], [0, 1, 2, 9], [9, 1, 2, 8]],
        shifts=["clean", "fog-1", "fog-5"],
        milliseconds=[*[1000.0] * 4, *range(1, 9)],
        fell_back=[True, False, False, False, *[False] * 6, True, True],
    )

    def test_numbers_counted_by_hand(self):
        found = metrics.summarise(self.TABLE, seed=0)
        low, high = found.pop("gain_low"), found.pop("gain_high")
        assert found == pytest.approx(
            {
                "accuracy_source": 3 / 8,
                "accuracy_adapted": 5 / 8,
                "gain": 2 / 8,
                "clean_source": 1.0,
                "clean_adapted": 3 / 4,
                "images": 4,
                "fell_back": 2,
                "milliseconds_p50": 4.5,
                "milliseconds_p95": 7.65,
            }
        )
        # Per image, over both shifts: -1, +1, +2, 0 of 2; the extremes are four times the same image.
        assert -0.5 <= low < 0.25 < high <= 1

    def test_is_valid_json_whatever_is_unknown(self):
        unlabeled = self.TABLE.assign(label=-1)
        only_clean = self.TABLE[self.TABLE["shift"] == "clean"]
        for table in (self.TABLE, unlabeled, only_clean):
            json.dumps(metrics.summarise(table, seed=0), allow_nan=False)
        found = metrics.summarise(unlabeled, seed=0)
        unknown = {name for name, value in found.items() if value is None}
        assert unknown == {f"{a}_{b}" for a in ("accuracy", "clean") for b in ("source", "adapted")} | {
            "gain", "gain_low", "gain_high"
        }  # fmt: skip
        assert metrics.summarise(only_clean, seed=0)["gain"] is None

    def test_partly_labeled_counts_the_labeled(self):
        table = self.TABLE.assign(label=[0, 1, 2, -1] * 3)
        found = metrics.summarise(table, seed=0)
        assert found["accuracy_source"] == 3 / 6
        assert found["accuracy_adapted"] == 5 / 6
        assert found["images"] == 4

    def test_same_seed_same_interval_in_any_order_of_rows(self):
        generator = np.random.default_rng(1)
        table = binary(generator.integers(2, size=97), generator.integers(2, size=97))
        again = metrics.summarise(table, seed=5)
        assert metrics.summarise(table, seed=5) == again
        assert metrics.summarise(table.sample(frac=1, random_state=0), seed=5) == again
        assert metrics.summarise(table, seed=6)["gain_low"] == pytest.approx(again["gain_low"], abs=0.03)


class TestGroups:
    def test_by_shift_counted_by_hand(self):
        found = metrics.by_shift(TestSummarise.TABLE.iloc[::-1], seed=0)
        assert found["shift"].tolist() == ["clean", "fog-1", "fog-5"]
        assert found["severity"].tolist() == [0, 1, 5]
        assert found["n"].tolist() == [4, 4, 4]
        assert found["accuracy_source"].tolist() == [1, 2 / 4, 1 / 4]
        assert found["accuracy_adapted"].tolist() == [3 / 4, 3 / 4, 2 / 4]
        assert found["gain"].tolist() == [-1 / 4, 1 / 4, 1 / 4]
        assert found["wrong_to_right"].tolist() == [0, 1, 2]
        assert found["right_to_wrong"].tolist() == [1, 0, 1]
        assert found["changed"].tolist() == [1, 1, 4]  # 9 → 8 is wrong both times, and still changed

    def test_without_labels_changes_still_count(self):
        found = metrics.by_shift(TestSummarise.TABLE.assign(label=-1), seed=0)
        assert found[["accuracy_source", "gain", "gain_low"]].isna().all(axis=None)
        assert found["changed"].tolist() == [1, 1, 4]
        assert found["wrong_to_right"].tolist() == [0, 0, 0]

    def test_corruption_and_severity_pool_the_right_rows(self):
        generator = np.random.default_rng(0)
        shifts = ["clean", "fog-1", "fog-5", "snow-1", "snow-5"]
        before, after = generator.integers(2, size=(2, 5, 30))
        table = binary(before, after, shifts)
        corruption = metrics.by_corruption(table, seed=0).set_index("corruption")
        severity = metrics.by_severity(table, seed=0).set_index("severity")
        assert corruption.index.tolist() == ["fog", "snow"]
        assert severity.index.tolist() == [0, 1, 5]
        assert corruption.loc["snow", "accuracy_adapted"] == pytest.approx(after[3:].mean())
        assert severity.loc[5, "accuracy_source"] == pytest.approx(before[[2, 4]].mean())
        assert corruption.loc["fog", "n"] == 60

    def test_a_run_that_changes_nothing_has_an_interval_of_zero_width(self):
        right = np.random.default_rng(0).integers(2, size=40)
        row = metrics.by_shift(binary(right, right), seed=0).iloc[0]
        assert (row["gain"], row["gain_low"], row["gain_high"]) == (0, 0, 0)


class TestInterval:
    def test_one_shift_against_the_normal_formula(self):
        generator = np.random.default_rng(2)
        difference = generator.choice([-1, 0, 1], p=[0.1, 0.6, 0.3], size=1000)
        half = stats.norm.ppf(0.975) * difference.std() / math.sqrt(1000)
        low, high = self.interval(difference)
        assert low == pytest.approx(difference.mean() - half, abs=0.003)
        assert high == pytest.approx(difference.mean() + half, abs=0.003)

    def test_one_shift_against_the_binomial_distribution(self):
        # Wrong before, 12 of 50 right after: a resample's count is Binomial(50, 0.24), its quantiles are the interval.
        difference = np.repeat([1, 0], [12, 38])
        assert self.interval(difference) == pytest.approx(stats.binom.ppf([0.025, 0.975], 50, 0.24) / 50, abs=1e-9)

    def test_many_shifts_against_scipy_on_image_means(self):
        generator = np.random.default_rng(3)
        difference = generator.choice([-1, 0, 1], size=(60, 5)) + 0.0
        reference = stats.bootstrap(
            (difference.mean(axis=1),), np.mean, method="percentile", n_resamples=20_000, rng=generator
        ).confidence_interval
        found = metrics.paired_interval(
            difference.ravel(), np.repeat(np.arange(60), 5), np.zeros(300, int), num_groups=1, seed=0
        )
        assert found[0] == pytest.approx(list(reference), abs=0.006)

    def test_unequal_numbers_of_shifts_against_a_slow_loop(self):
        images = np.array([0, 0, 0, 1, 1, 2, 3, 3])
        difference = np.array([1.0, 1, 0, -1, 0, 1, 0, 0])
        generator = np.random.default_rng(4)
        means = []
        for _ in range(20_000):
            rows = np.concatenate([np.flatnonzero(images == drawn) for drawn in generator.integers(4, size=4)])
            means.append(difference[rows].mean())
        found = metrics.paired_interval(difference, images, np.zeros(8, int), num_groups=1, seed=0)
        assert found[0] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)

    def test_blocks_of_draws_do_not_change_the_law(self):
        # 3,000 images are drawn in several blocks; the interval must still be the normal one.
        difference = np.random.default_rng(5).choice([0, 1], p=[0.9, 0.1], size=3000)
        half = stats.norm.ppf(0.975) * difference.std() / math.sqrt(3000)
        assert np.diff(self.interval(difference)) == pytest.approx(2 * half, rel=0.04)

    def test_one_image_tells_no_interval(self):
        assert np.isnan(self.interval(np.array([1.0]))).all()

    def test_covers_the_truth_where_rows_would_not(self):
        """Each image flips under all of 8 shifts or under none: 8 × 80 rows, and 80 independent observations."""
        generator = np.random.default_rng(6)
        images, shifts, truth, trials = 80, 8, 0.2, 600
        covered = {"images": 0, "rows": 0}
        for trial in range(trials):
            flips = np.repeat(generator.random(images) < truth, shifts).astype(float)
            for unit, codes in {"images": np.repeat(np.arange(images), shifts), "rows": np.arange(flips.size)}.items():
                low, high = metrics.paired_interval(
                    flips, codes, np.zeros(flips.size, int), num_groups=1, seed=trial, resamples=400
                )[0]
                covered[unit] += low <= truth <= high
        assert covered["images"] / trials == pytest.approx(0.95, abs=0.03)
        assert covered["rows"] / trials < 0.7

    @staticmethod
    def interval(difference) -> np.ndarray:
        rows = len(difference)
        return metrics.paired_interval(difference, np.arange(rows), np.zeros(rows, int), num_groups=1, seed=0)[0]


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.01, 0.02, "helped"),
        (-0.02, -0.01, "hurt"),
        (-0.01, 0.01, "undecided"),
        (0.0, 0.01, "undecided"),
        (0.0, 0.0, "unchanged"),
        (None, None, "unknown"),
        (math.nan, math.nan, "unknown"),
    ],
)
def test_verdict(low, high, word):
    assert metrics.verdict(low, high) == word


class TestRead:
    def test_returns_what_was_written(self, tmp_path):
        TestSummarise.TABLE.to_parquet(tmp_path / "run.parquet")
        pd.testing.assert_frame_equal(metrics.read_predictions(tmp_path / "run.parquet"), TestSummarise.TABLE)

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match=r"run\.parquet.*found no file"):
            metrics.read_predictions(tmp_path / "run.parquet")

    def test_missing_column(self, tmp_path):
        TestSummarise.TABLE.drop(columns="fell_back").to_parquet(tmp_path / "run.parquet")
        with pytest.raises(UserError, match="none named fell_back"):
            metrics.read_predictions(tmp_path / "run.parquet")

    def test_an_image_twice(self, tmp_path):
        pd.concat([TestSummarise.TABLE, TestSummarise.TABLE.tail(1)]).to_parquet(tmp_path / "run.parquet")
        with pytest.raises(UserError, match="image-3 twice under fog-5"):
            metrics.read_predictions(tmp_path / "run.parquet")
