import json
import math

import numpy as np
import pandas as pd
import pytest

from tttlab.evaluation import metrics
from tttlab.evaluation.intervals import gain_interval
from tttlab.evaluation.significance import mcnemar


def predictions(label, source, adapted, *, shifts=("fog-1",), **columns) -> pd.DataFrame:
    """A table of predictions of one seed, without training or gate.

    ``source`` and ``adapted`` are (shifts, images).
    """
    sides = np.atleast_2d(source), np.atleast_2d(adapted)
    blocks = []
    for shift, before, after in zip(shifts, *sides, strict=True):
        corruption, _, severity = shift.rpartition("-") if shift != "clean" else ("none", "", "0")
        if not severity.isdigit():
            corruption, severity = shift, "0"
        block = {
            "image_id": [f"image-{i}" for i in range(len(label))],
            "shift": shift,
            "corruption": corruption,
            "severity": int(severity),
            "seed": 0,
            "label": label,
            "source_prediction": before,
            "adapted_prediction": after,
            "untrained_prediction": after,
            "source_confidence": 0.5,
            "adapted_confidence": 0.5,
            "loss_first": math.nan,
            "loss_last": math.nan,
            "distance": 1.0,
            "fell_back": False,
            "milliseconds": 1.0,
            "gate_open": True,
            "gate_milliseconds": 0.0,
        }
        blocks.append(pd.DataFrame(block))
    return pd.concat(blocks, ignore_index=True).assign(**columns)


def binary(before, after, shifts=("fog-1",), **columns) -> pd.DataFrame:
    """Predictions from correctness: class 0 is right, class 1 is wrong."""
    before, after = np.atleast_2d(before), np.atleast_2d(after)
    label = np.zeros(before.shape[1], int)
    return predictions(label, 1 - before, 1 - after, shifts=shifts, **columns)


TABLE = predictions(
    label=[0, 1, 2, 3],
    source=[[0, 1, 2, 3], [0, 1, 9, 9], [0, 9, 9, 9]],
    adapted=[[0, 1, 2, 9], [0, 1, 2, 9], [9, 1, 2, 8]],
    shifts=["clean", "fog-1", "fog-5"],
    milliseconds=[*[1000.0] * 4, *range(1, 9)],
    fell_back=[True, False, False, False, *[False] * 6, True, True],
    distance=[*[1.0] * 4, *[2.0] * 4, 2, 2, 4, 4],
)
# The same run with training, and with a gate that opens for the last two images.
TRAINED = TABLE.assign(
    untrained_prediction=[0, 1, 2, 3, 0, 1, 2, 9, 9, 9, 2, 9],
    loss_first=1.0,
    gate_open=[False, False, True, True] * 3,
    gate_milliseconds=0.5,
)
FULL_COLUMNS = [
    "n",
    "accuracy_source",
    "accuracy_adapted",
    "gain",
    "gain_low",
    "gain_high",
    "wrong_to_right",
    "right_to_wrong",
    "changed",
]


def several_seeds(count=3, images=40, shifts=("clean", "fog-1", "fog-5")) -> pd.DataFrame:
    """Predictions of several seeds; later seeds gain more."""
    generator = np.random.default_rng(0)
    tables = []
    for seed in range(count):
        before = generator.random((len(shifts), images)) < 0.6
        after = before | (generator.random(before.shape) < 0.2 * (seed + 1))
        tables.append(binary(before.astype(int), after.astype(int), shifts, seed=seed))
    return pd.concat(tables, ignore_index=True)


class TestSummarise:
    def test_numbers_counted_by_hand(self):
        entry = metrics.summarise(TABLE)
        low, high = entry.pop("gain_low"), entry.pop("gain_high")
        # Confidence 0.5: the errors of calibration are |3/8 − 1/2| and |5/8 − 1/2|.
        expected = {
            "accuracy_source": 3 / 8,
            "accuracy_adapted": 5 / 8,
            "gain": 2 / 8,
            "training_gain": None,
            "training_gain_low": None,
            "training_gain_high": None,
            "clean_source": 1.0,
            "clean_adapted": 3 / 4,
            "ece_source": 1 / 8,
            "ece_adapted": 1 / 8,
            "wrong_to_right": 3,
            "right_to_wrong": 1,
            "changed": 5,
            "shifts_helped": 0,
            "shifts_hurt": 0,
            "images": 4,
            "seeds": 1,
            "gain_seed_sd": None,
            "fell_back": 2,
            "milliseconds_p50": 4.5,
            "milliseconds_p95": 7.65,
            "milliseconds_mean": 36 / 8,
            "gated": None,
        }
        assert entry == pytest.approx(expected)
        # Per image, over both shifts: -1, +1, +2, 0 of 2.
        differences = np.array([0.0, 0, 1, 0, -1, 1, 1, 0])
        images, seeds, groups = np.tile(np.arange(4), 2), np.zeros(8, int), np.zeros(8, int)
        (expected,) = gain_interval(differences, images, seeds, groups, num_groups=1)
        assert [low, high] == pytest.approx(expected)
        assert -1 <= low < 0.25 < high <= 1

    def test_training_and_gate_counted_by_hand(self):
        entry = metrics.summarise(TRAINED)
        # Untrained: 4 of 8 right, fog-1 3, fog-5 1; adapted 5 of 8.
        assert entry["training_gain"] == pytest.approx(1 / 8)
        assert entry["training_gain_low"] < 1 / 8 < entry["training_gain_high"]
        gated = entry["gated"]
        low, high = gated.pop("gain_low"), gated.pop("gain_high")
        # The gate keeps the source's predictions of images 0 and 1, of which 3 of 4 are right.
        times = [0.5] * 2 + [0.5 + 3, 0.5 + 4] + [0.5] * 2 + [0.5 + 7, 0.5 + 8]
        expected = {
            "accuracy_adapted": 5 / 8,
            "gain": 2 / 8,
            "clean_adapted": 3 / 4,
            "open": 1 / 2,
            "clean_open": 1 / 2,
            "wrong_to_right": 2,
            "right_to_wrong": 0,
            "milliseconds": np.mean(times),
        }
        assert gated == pytest.approx(expected)
        assert low < 2 / 8 < high

    def test_is_valid_json_whatever_is_unknown(self):
        one_image = TRAINED[TRAINED["image_id"] == "image-2"]
        only_clean = TRAINED[TRAINED["shift"] == "clean"]
        unlabeled, single = only_clean.assign(label=-1), several_seeds(images=1)
        for table in (TABLE, TRAINED, one_image, only_clean, unlabeled, single):
            json.dumps(metrics.summarise(table), allow_nan=False)
        assert metrics.summarise(only_clean)["gain"] is None
        assert metrics.summarise(one_image)["gain"] == 1
        assert metrics.summarise(one_image)["gain_low"] is None

    def test_without_labels(self):
        entry = metrics.summarise(TRAINED.assign(label=-1))
        gated = entry.pop("gated")
        known = {
            "changed",
            "images",
            "seeds",
            "fell_back",
            "milliseconds_p50",
            "milliseconds_p95",
            "milliseconds_mean",
        }
        assert {name for name, value in entry.items() if value is not None} == known
        assert {name for name, value in gated.items() if value is not None} == {
            "open",
            "clean_open",
            "milliseconds",
        }

    def test_partly_labeled_counts_the_labeled(self):
        entry = metrics.summarise(TABLE.assign(label=[0, 1, 2, -1] * 3))
        assert entry["accuracy_source"] == 3 / 6
        assert entry["accuracy_adapted"] == 5 / 6
        assert entry["images"] == 4

    def test_the_order_of_rows_does_not_matter(self):
        table = several_seeds()
        again = metrics.summarise(table.sample(frac=1, random_state=0))
        assert again == pytest.approx(metrics.summarise(table), nan_ok=True)

    def test_a_run_that_changes_nothing_has_an_interval_of_zero_width(self):
        right = np.random.default_rng(0).integers(2, size=(2, 40))
        entry = metrics.summarise(binary(right, right, ["clean", "fog-1"]))
        assert (entry["gain"], entry["gain_low"], entry["gain_high"]) == (0, 0, 0)
        assert (entry["shifts_helped"], entry["shifts_hurt"], entry["changed"]) == (0, 0, 0)

    def test_shifts_are_counted_by_direction_after_holm(self):
        # Of 40 images each: all helped, all hurt, 6 helped, none flipped, and clean ones hurt.
        # For the 6, p = 0.03 is not significant after Holm's correction.
        before = np.zeros((5, 40), int)
        before[[1, 4]] = 1
        after = 1 - before
        after[2, 6:], after[3] = 0, 0
        shifts = ["fog-1", "fog-2", "fog-3", "fog-4", "clean"]
        entry = metrics.summarise(binary(before, after, shifts))
        assert (entry["shifts_helped"], entry["shifts_hurt"]) == (1, 2)

    def test_flattened_for_a_table(self):
        with_gate = metrics.flatten(metrics.summarise(TRAINED))
        without = metrics.flatten(metrics.summarise(TABLE))
        assert list(with_gate) == list(without)
        assert with_gate["gated_open"] == 1 / 2
        assert math.isnan(without["gated_gain"])
        assert "gated" not in with_gate


class TestSeveralSeeds:
    def test_counts_and_spread(self):
        table = several_seeds(images=400)
        entry = metrics.summarise(table)
        shifted = table[table["shift"] != "clean"]
        before = (shifted["source_prediction"] == shifted["label"]).astype(int)
        after = (shifted["adapted_prediction"] == shifted["label"]).astype(int)
        gains = (after - before).groupby(shifted["seed"]).mean()
        assert (entry["seeds"], entry["images"]) == (3, 400)
        assert entry["gain"] == pytest.approx(gains.mean())
        assert entry["gain_seed_sd"] == pytest.approx(gains.std(ddof=1))
        # The networks differ so much that this is about Student's t over the three gains.
        width = entry["gain_high"] - entry["gain_low"]
        assert width == pytest.approx(2 * 4.30 * gains.std() / math.sqrt(3), rel=0.1)
        one_seed = metrics.summarise(table[table["seed"] == 1])
        assert one_seed["gain_high"] - one_seed["gain_low"] < width / 2

    def test_mcnemar_holds_in_every_seed(self):
        table = several_seeds()
        by_shift = metrics.by_shift(table).set_index("shift")
        seed_tables = [table[table["seed"] == seed] for seed in range(3)]
        of_seeds = [metrics.by_shift(rows).set_index("shift") for rows in seed_tables]
        for shift in by_shift.index:
            expected = max(of_seed.loc[shift, "mcnemar_p"] for of_seed in of_seeds)
            assert by_shift.loc[shift, "mcnemar_p"] == pytest.approx(expected)
            assert by_shift.loc[shift, "n"] == 120

    def test_a_single_image_gives_no_interval(self):
        table = metrics.by_shift(several_seeds(images=1))
        assert table[["gain_low", "gain_high"]].isna().all(axis=None)
        assert table["gain"].notna().all()


class TestGroups:
    def test_by_shift_counted_by_hand(self):
        table = metrics.by_shift(TRAINED.iloc[::-1])
        assert table.columns.tolist() == [
            "shift",
            "corruption",
            "severity",
            *FULL_COLUMNS,
            "mcnemar_p",
            "mcnemar_holm",
            "ece_source",
            "ece_adapted",
            "distance",
            "gated_gain",
        ]
        assert table["shift"].tolist() == ["clean", "fog-1", "fog-5"]
        assert table["severity"].tolist() == [0, 1, 5]
        assert table["n"].tolist() == [4, 4, 4]
        assert table["accuracy_source"].tolist() == [1, 2 / 4, 1 / 4]
        assert table["accuracy_adapted"].tolist() == [3 / 4, 3 / 4, 2 / 4]
        assert table["gain"].tolist() == [-1 / 4, 1 / 4, 1 / 4]
        assert table["wrong_to_right"].tolist() == [0, 1, 2]
        assert table["right_to_wrong"].tolist() == [1, 0, 1]
        # 9 → 8 is wrong before and after, and still changed.
        assert table["changed"].tolist() == [1, 1, 4]
        assert table["mcnemar_p"].tolist() == [1, 1, 1]
        assert table["ece_source"].tolist() == [1 / 2, 0, 1 / 4]
        assert table["distance"].tolist() == [1, 2, 3]
        assert table["gated_gain"].tolist() == [-1 / 4, 1 / 4, 1 / 4]
        assert metrics.by_shift(TABLE)["gated_gain"].isna().all()

    def test_mcnemar_per_shift_with_holm_over_all(self):
        generator = np.random.default_rng(0)
        shifts = ["clean", "fog-1", "fog-5"]
        before = np.zeros((3, 60), int)
        after = (generator.random((3, 60)) < [[0.02], [0.1], [0.3]]).astype(int)
        table = metrics.by_shift(binary(before, after, shifts))
        p = [mcnemar([count], [0]) for count in after.sum(axis=1)]
        assert table["mcnemar_p"].tolist() == pytest.approx(p)
        assert table["mcnemar_holm"].iloc[2] == pytest.approx(3 * p[2])
        assert table["mcnemar_holm"].iloc[1] == pytest.approx(2 * p[1])

    def test_without_labels_changes_still_count(self):
        table = metrics.by_shift(TABLE.assign(label=-1))
        unknown = [
            "accuracy_source",
            "gain",
            "gain_low",
            "wrong_to_right",
            "mcnemar_p",
            "mcnemar_holm",
            "ece_source",
        ]
        assert table[unknown].isna().all(axis=None)
        assert table["changed"].tolist() == [1, 1, 4]

    def test_corruption_and_severity_pool_the_right_rows(self):
        generator = np.random.default_rng(0)
        shifts = ["clean", "fog-1", "fog-5", "snow-1", "snow-5"]
        before, after = generator.integers(2, size=(2, 5, 30))
        table = binary(before, after, shifts)
        corruption, severity = metrics.by_corruption(table), metrics.by_severity(table)
        columns = [*FULL_COLUMNS, "distance", "gated_gain"]
        assert corruption.columns.tolist() == ["corruption", *columns]
        assert severity.columns.tolist() == ["severity", *columns]
        assert corruption["corruption"].tolist() == ["fog", "snow"]
        assert severity["severity"].tolist() == [0, 1, 5]
        assert corruption["accuracy_adapted"].iloc[1] == pytest.approx(after[3:].mean())
        assert severity["accuracy_source"].iloc[2] == pytest.approx(before[[2, 4]].mean())
        assert corruption["n"].iloc[0] == 60

    def test_shifts_without_degrees_count_as_corruptions_and_not_as_a_severity(self):
        generator = np.random.default_rng(0)
        before, after = generator.integers(2, size=(2, 4, 30))
        shifts = ["clean", "fog-5", "photos/night", "test"]
        table = binary(before, after, shifts)
        severity = metrics.by_severity(table).set_index("severity")
        assert severity.index.tolist() == [0, 5]
        # Severity 0 is the clean images only.
        assert severity.loc[0, "accuracy_source"] == pytest.approx(before[0].mean())
        corruption = metrics.by_corruption(table).set_index("corruption")
        assert corruption.index.tolist() == ["fog", "photos/night", "test"]
        assert corruption.loc["photos/night", "accuracy_adapted"] == pytest.approx(after[2].mean())
        assert metrics.by_shift(table)["shift"].tolist() == shifts
        entry = metrics.summarise(table)
        assert entry["accuracy_source"] == pytest.approx(before[1:].mean())
        assert entry["clean_adapted"] == pytest.approx(after[0].mean())

    def test_where_nothing_happened_to_flip_doubt_remains(self):
        before = np.zeros((2, 40), int)
        after = before.copy()
        after[1, :5] = 1
        table = metrics.by_shift(binary(before, after, ["clean", "fog-1"]))
        assert table["gain_low"].iloc[0] < 0 < table["gain_high"].iloc[0]

    @pytest.mark.parametrize(
        "table", [TRAINED.assign(label=-1), TRAINED[:4], TRAINED[TRAINED["image_id"] == "image-0"]]
    )
    def test_little_or_nothing_known_is_no_error(self, table):
        metrics.by_shift(table).to_csv()
        metrics.by_corruption(table).to_csv()
        metrics.by_severity(table).to_csv()
        metrics.reliability(table).to_csv()


class TestReliability:
    def test_counted_by_hand(self):
        confidence = np.array([0.99] * 4 + [0.9, 0.9, 0.1, 0.1] + [0.3] * 4)
        bins = metrics.reliability(TABLE.assign(source_confidence=confidence))
        bins = bins.set_index(["with", "bin"])
        assert bins.columns.tolist() == ["confidence", "accuracy", "n"]
        assert len(bins) == 30
        # Clean rows (0.99) are left out. In fog-1 the two at 0.9 are right, those at 0.1 wrong; in
        # fog-5 one of four is right.
        assert bins["n"].sum() == 16
        assert bins.loc[("source", 13)].tolist() == pytest.approx([0.9, 1, 2])
        assert bins.loc[("source", 1)].tolist() == pytest.approx([0.1, 0, 2])
        assert bins.loc[("source", 4)].tolist() == pytest.approx([0.3, 1 / 4, 4])
        assert bins.loc[("adapted", 7)].tolist() == pytest.approx([0.5, 5 / 8, 8])
        assert bins.loc[("adapted", 0), ["confidence", "accuracy"]].isna().all()


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
