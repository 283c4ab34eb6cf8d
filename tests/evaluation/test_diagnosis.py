"""Tables on steps, choices, alignment and correlation, against worked examples and SciPy."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tttlab.evaluation import diagnosis


def step_rows() -> pd.DataFrame:
    """Two settings, steps 0 to 2, two images, clean and one shift."""
    # By setting and step: whether shifted image a, shifted image b and both clean images are right.
    right = {
        ("tuned", 0): (0, 0, 1),
        ("tuned", 1): (1, 0, 1),
        ("tuned", 2): (1, 0, 0),
        ("candidate-1", 0): (0, 0, 1),
        ("candidate-1", 1): (1, 1, 0),
        ("candidate-1", 2): (1, 1, 0),
    }
    rows = []
    for (setting, step), (first, second, clean) in right.items():
        for image, shifted in (("a", first), ("b", second)):
            for shift, correct in (("clean", clean), ("fog-5", shifted)):
                rows.append(
                    {
                        "image_id": image,
                        "shift": shift,
                        "label": 1,
                        "setting": setting,
                        "settings": f"lr of {setting}",
                        "step": step,
                        "used_step": 1,
                        "source_prediction": int(shift == "clean"),
                        "prediction": int(correct),
                        "loss": 3.0 - step,
                        "milliseconds": 1.0 + step,
                    }
                )
    return pd.DataFrame(rows)


def test_curves_average_over_the_shifted_images():
    table = diagnosis.along_steps(step_rows()).set_index(["setting", "step"])
    assert table["accuracy"].to_list() == [0, 0.5, 0.5, 0, 1, 1]
    assert table["clean_accuracy"].to_list() == [1, 1, 0, 1, 0, 0]
    assert table["loss"].to_list() == [3, 2, 1] * 2
    assert table["milliseconds"].to_list() == [1, 2, 3] * 2
    assert table["used"].to_list() == [False, True, False] * 2
    assert set(table["n"]) == {2}


def test_the_oracle_is_the_best_of_all_and_the_tuned_setting_its_own():
    table = diagnosis.choices(step_rows()).set_index("choice")
    assert table.index.to_list() == ["none", "default", "tuned", "oracle"]
    assert table["accuracy"].to_dict() == {"none": 0, "default": 0.5, "tuned": 0.5, "oracle": 1.0}
    assert table.loc["oracle", ["settings", "step"]].to_list() == ["lr of candidate-1", 1]
    assert table["clean_change"].to_dict() == {"none": 0, "default": 0, "tuned": 0, "oracle": -1}
    assert table["gain"].to_dict() == {"none": 0, "default": 0.5, "tuned": 0.5, "oracle": 1.0}


def test_without_labels_there_are_curves_of_loss_and_cost_and_no_choices():
    unlabeled = step_rows().assign(label=-1)
    table = diagnosis.along_steps(unlabeled)
    assert table["accuracy"].isna().all()
    assert table["loss"].notna().all()
    assert diagnosis.choices(unlabeled).empty


def predictions(images: int = 40, shifts: int = 6, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    names = ["clean", *(f"fog-{i}" for i in range(1, shifts))]
    grid = pd.MultiIndex.from_product([range(images), names], names=["image_id", "shift"])
    table = grid.to_frame(index=False)
    count = len(table)
    # Two severities of the first corruption, one of all others.
    corruption = table["shift"].replace({"fog-1": "fog", "fog-2": "fog"})
    return table.assign(
        seed=0,
        corruption=corruption,
        label=rng.integers(0, 3, count),
        source_prediction=rng.integers(0, 3, count),
        adapted_prediction=rng.integers(0, 3, count),
        source_confidence=rng.random(count),
        adapted_confidence=rng.random(count),
        loss_first=rng.random(count),
        loss_last=rng.random(count),
        distance=rng.random(count),
        untrained_prediction=rng.integers(0, 3, count),
        gate_open=True,
        gate_milliseconds=0.0,
        milliseconds=1.0,
    )


def test_alignment_is_joined_by_image_and_averaged_by_shift():
    table = predictions()
    aligned = table[["image_id", "shift", "seed"]][table["image_id"] < 5].assign(
        cosine=0.5, inner=1.0, supervised_loss=2.0
    )
    aligned.loc[aligned["image_id"] == 0, "cosine"] = np.nan
    aligned.loc[aligned["image_id"] == 1, "cosine"] = -0.3
    joined = diagnosis.join_alignment(table, aligned)
    assert len(joined) == len(table)
    two_seeds = pd.concat([table, table.assign(seed=7)])
    # The gradients are those of one network.
    assert set(diagnosis.join_alignment(two_seeds, aligned)["seed"]) == {0}
    assert set(joined["gain"]) == {-1, 0, 1}
    by_shift = diagnosis.alignment_by_shift(joined).set_index("shift")
    assert set(by_shift["n"]) == {4}  # one image has no gradient
    values = [-0.3, 0.5, 0.5, 0.5]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    cosine = by_shift.loc["fog-1", ["cosine", "cosine_low", "cosine_high"]]
    assert cosine.to_list() == pytest.approx([np.mean(values), low, high])
    rows = joined[(joined["shift"] == "fog-2") & joined["image_id"].between(1, 4)]
    change = (rows["loss_last"] - rows["loss_first"]).mean()
    assert by_shift.loc["fog-2", "gain"] == pytest.approx(rows["gain"].mean())
    assert by_shift.loc["fog-2", "loss_change"] == pytest.approx(change)


def test_correlations_are_spearmans():
    table = predictions()
    aligned = table[["image_id", "shift", "seed"]].assign(
        cosine=np.linspace(-1, 1, len(table)), inner=0.0, supervised_loss=0.0
    )
    joined = diagnosis.join_alignment(table, aligned)
    correlations = diagnosis.correlations(joined, 0).set_index(["level", "signal"])
    shifted = joined[joined["shift"] != "clean"]
    for signal in ("cosine", "distance", "loss_change"):
        expected = stats.spearmanr(shifted[signal], shifted["gain"]).statistic
        assert correlations.loc[("image", signal), "spearman"] == pytest.approx(expected)
    shifts = shifted.groupby("shift")[["distance", "gain"]].mean()
    fog = shifts.loc[["fog-1", "fog-2"]].mean()
    means = [*shifts.drop(["fog-1", "fog-2"]).to_numpy().tolist(), fog.to_list()]
    expected = stats.spearmanr(*zip(*means, strict=True)).statistic
    found = correlations.loc[("corruption", "distance")]
    assert found["spearman"] == pytest.approx(expected)
    assert found["n"] == 4
    assert correlations.loc[("image", "distance"), "n"] == 200
    assert correlations["label_free"].to_dict()["image", "distance"]
    assert not correlations["label_free"].to_dict()["image", "cosine"]


def test_severities_of_one_corruption_are_no_evidence_of_their_own():
    """Gain and signal differ between corruptions alone: twice the severities, the same p-value."""
    generator = np.random.default_rng(3)
    signal, gain = generator.random(8), generator.permutation(8) % 3 - 1

    def joined(severities: int) -> pd.DataFrame:
        grid = [(f"{c}-{s}", c) for c in range(8) for s in range(severities)]
        rows = [
            {"image_id": i, "shift": name, "corruption": c, "gain": gain[c]}
            | dict.fromkeys(["cosine", "loss_first", "loss_change"], signal[c])
            | dict.fromkeys(["source_confidence", "confidence_change", "distance"], signal[c])
            for i in range(4)
            for name, c in grid
        ]
        return pd.DataFrame(rows)

    tables = [diagnosis.correlations(joined(count), 0) for count in (1, 2)]
    once, twice = (table[table["level"] == "corruption"] for table in tables)
    assert len(once) == 6
    pd.testing.assert_frame_equal(once, twice, rtol=1e-9)


def test_a_signal_known_for_few_images_is_related_to_the_gain_of_these_alone():
    table = predictions()
    few = table["image_id"] < 4
    # No gain where the cosine is known.
    table.loc[few, "adapted_prediction"] = table.loc[few, "source_prediction"]
    aligned = table.loc[few, ["image_id", "shift", "seed"]].assign(
        cosine=np.linspace(-1, 1, few.sum()), inner=0.0, supervised_loss=0.0
    )
    correlations = diagnosis.correlations(diagnosis.join_alignment(table, aligned), 0)
    assert "cosine" not in set(correlations["signal"])
    assert {"distance", "loss_first"} <= set(correlations["signal"])


def test_permuting_gives_spearmans_coefficient_and_its_exact_p_value():
    x, y = pd.Series([1.0, 2, 3, 4, 5, 6]), pd.Series([2.0, 1, 4, 3, 6, 5])
    rho, p = diagnosis.permuted_spearman(x, y, 0)
    exact = stats.permutation_test(
        (x,), lambda drawn: stats.spearmanr(drawn, y).statistic, permutation_type="pairings"
    )
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert p == pytest.approx(exact.pvalue, abs=0.02)


def test_an_untuned_run_has_a_default_and_no_tuned_row():
    steps = step_rows().replace({"setting": {"tuned": "default"}})
    assert diagnosis.choices(steps)["choice"].to_list() == ["none", "default", "oracle"]


def test_rows_of_one_image_do_not_count_as_independent():
    """Copies of the same rows must not make a correlation more certain."""
    rng = np.random.default_rng(1)
    x, y, images = rng.normal(size=60), rng.normal(size=60), np.arange(60)
    once = diagnosis.clustered_spearman(pd.Series(x), pd.Series(y), pd.Series(images), 0)
    copied = diagnosis.clustered_spearman(
        *(pd.Series(np.repeat(values, 20)) for values in (x, y, images)), 0
    )
    assert copied == pytest.approx(once, rel=0.02)
    assert once[1] == pytest.approx(stats.spearmanr(x, y).pvalue, abs=0.06)


@pytest.mark.parametrize("rows", range(3, 12))
def test_one_image_says_nothing_of_chance(rows):
    """Every resample of one image is the same; rounding errors are no spread."""
    x, y = np.random.default_rng(rows).normal(size=(2, rows))
    image = pd.Series(["only"] * rows)
    rho, p = diagnosis.clustered_spearman(pd.Series(x), pd.Series(y), image, 0)
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(p)


def test_p_values_are_uniform_without_a_relation():
    rng = np.random.default_rng(2)
    images, p_values = pd.Series(np.repeat(range(30), 4)), []
    for seed in range(200):
        x_effect, y_effect = rng.normal(size=(2, 30, 1))  # of an image, shared by its four rows
        x = (x_effect + rng.normal(size=(30, 4))).ravel()
        y = (y_effect + rng.normal(size=(30, 4))).ravel()
        _, p = diagnosis.clustered_spearman(pd.Series(x), pd.Series(y), images, seed)
        p_values.append(p)
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.11
