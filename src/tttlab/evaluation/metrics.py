"""Every reported number with and without test-time training, from one table of predictions.

The same test images appear under every shift and are shown to the network of every training seed.
So the rows are not independent: `tttlab.evaluation.intervals` takes images and seeds as the
units of chance.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from tttlab.evaluation import calibration, significance
from tttlab.evaluation.intervals import gain_interval
from tttlab.evaluation.predictions import GAINS, add_correctness, has_gate

FLIPS = ["wrong_to_right", "right_to_wrong", "changed"]
TABLE = ["n", "accuracy_source", "accuracy_adapted", "gain", "gain_low", "gain_high", *FLIPS]
GATED = {  # name in metrics.json: (rows, column of `compare`)
    "accuracy_adapted": ("shifted", "accuracy_gated"),
    "gain": ("shifted", "gated_gain"),
    "gain_low": ("shifted", "gated_gain_low"),
    "gain_high": ("shifted", "gated_gain_high"),
    "clean_adapted": ("clean", "accuracy_gated"),
    "open": ("shifted", "open"),
    "clean_open": ("clean", "open"),
    "wrong_to_right": ("shifted", "gated_wrong_to_right"),
    "right_to_wrong": ("shifted", "gated_right_to_wrong"),
    "milliseconds": ("shifted", "gated_milliseconds"),
}

Verdict = Literal["helped", "hurt", "undecided", "unchanged", "unknown"]


def summarise(predictions: pd.DataFrame) -> dict[str, Any]:
    """Summarise one run: its entry in ``outputs/metrics.json``.

    Accuracies, gains with their 95 % intervals, and calibration errors are fractions of the shifted
    rows, except those named clean. Flips are numbers of shifted rows. ``images`` counts the shifted
    images, or the clean ones if there is no shift. ``shifts_helped`` and ``shifts_hurt`` count
    all shifts, clean among them.

    Values are None without labels or rows; intervals also with fewer than two images, the gains of
    training for a run that does not train, and ``gated`` for a run without a gate.

    Args:
        predictions: One row per (image, shift, seed); label -1 means unknown.
    """
    part = np.where(predictions["shift"] == "clean", "clean", "shifted")
    parts = compare(predictions.assign(part=part), ["part"]).set_index("part")
    parts = parts.reindex(["clean", "shifted"])
    shifted, tests = predictions[part == "shifted"], shift_tests(predictions)
    gains = [f"{name}{end}" for name in ("gain", "training_gain") for end in ("", "_low", "_high")]
    flips = FLIPS[:2]
    columns = ["accuracy_source", "accuracy_adapted", *gains]
    entry = {column: parts.at["shifted", column] for column in columns}
    for side in ("source", "adapted"):
        entry[f"clean_{side}"] = parts.at["clean", f"accuracy_{side}"]
    for column in ("ece_source", "ece_adapted", *flips):
        entry[column] = parts.at["shifted", column]
    entry["changed"] = (shifted["source_prediction"] != shifted["adapted_prediction"]).sum()
    significant = tests["mcnemar_holm"] < significance.LEVEL
    tested = tests["mcnemar_p"].notna().any()
    for name, sign in (("shifts_helped", 1), ("shifts_hurt", -1)):
        entry[name] = (significant & (tests["direction"] == sign)).sum() if tested else None
    entry["images"] = (shifted if len(shifted) else predictions)["image_id"].nunique()
    entry["seeds"] = predictions["seed"].nunique()
    entry["gain_seed_sd"] = add_correctness(shifted).groupby("seed")["gain"].mean().std()
    entry["fell_back"] = shifted["fell_back"].sum()
    for percent in (50, 95):
        entry[f"milliseconds_p{percent}"] = shifted["milliseconds"].quantile(percent / 100)
    entry["milliseconds_mean"] = shifted["milliseconds"].mean()
    entry = {name: _plain(value) for name, value in entry.items()}
    gated = {name: _plain(parts.at[rows, column]) for name, (rows, column) in GATED.items()}
    return entry | {"gated": gated if has_gate(predictions) else None}


def flatten(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Turn an entry of metrics.json into a row of summary.csv.

    The gate's values become ``gated_<name>``; None becomes NaN.
    """
    row = {name: value for name, value in entry.items() if name != "gated"}
    for name, value in (entry["gated"] or dict.fromkeys(GATED)).items():
        row[f"gated_{name}"] = value
    return {name: np.nan if value is None else value for name, value in row.items()}


def by_shift(predictions: pd.DataFrame) -> pd.DataFrame:
    """Compare per shift, with McNemar's tests: by_shift.csv without the columns model and run.

    The clean images come first.
    """
    keys = ["shift", "corruption", "severity"]
    table = compare(predictions, keys).merge(shift_tests(predictions).reset_index(), on="shift")
    ranks = {name: rank for rank, name in enumerate(table["corruption"].unique())}
    rank = table["corruption"].map(ranks).where(table["shift"] != "clean", -1)
    order = ["rank", "severity"]
    table = table.assign(rank=rank).sort_values(order, kind="stable", ignore_index=True)
    tests, errors = ["mcnemar_p", "mcnemar_holm"], ["ece_source", "ece_adapted"]
    return table[[*keys, *TABLE, *tests, *errors, "distance", "gated_gain"]]


def by_corruption(predictions: pd.DataFrame) -> pd.DataFrame:
    """Compare per corruption, its severities together; clean images are left out."""
    table = compare(predictions[predictions["shift"] != "clean"], ["corruption"])
    return table[["corruption", *TABLE, "distance", "gated_gain"]]


def by_severity(predictions: pd.DataFrame) -> pd.DataFrame:
    """Compare per severity, all corruptions together.

    Severity 0 is the clean images. Shifts without severities are left out.
    """
    graded = predictions[(predictions["severity"] > 0) | (predictions["shift"] == "clean")]
    table = compare(graded, ["severity"]).sort_values("severity", ignore_index=True)
    return table[["severity", *TABLE, "distance", "gated_gain"]]


def reliability(predictions: pd.DataFrame) -> pd.DataFrame:
    """Make the reliability diagram over all shifted rows with a label.

    Returns:
        a row per (with, bin); NaN in empty bins.
    """
    labeled = predictions[(predictions["shift"] != "clean") & (predictions["label"] >= 0)]
    one_group = np.zeros(len(labeled), int)
    parts = []
    for side in ("source", "adapted"):
        (confidence,), (accuracy,), (count,) = _reliability(labeled, side, one_group, 1)
        columns = {
            "with": side,
            "bin": np.arange(len(count)),
            "confidence": confidence,
            "accuracy": accuracy,
            "n": count,
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def shift_tests(predictions: pd.DataFrame) -> pd.DataFrame:
    """Test each shift exactly by McNemar in every seed, with Holm's correction over all shifts.

    The clean images count as a shift here.

    Returns:
        Per shift (the index) ``mcnemar_p``, ``mcnemar_holm`` (NaN without labels) and
        ``direction``: 1 if more images were helped than hurt, -1 if fewer, else 0.
    """
    groups = add_correctness(predictions).groupby(["shift", "seed"], sort=False)
    flips = groups[FLIPS[:2]].sum(min_count=1).unstack("seed")
    helped, hurt = (flips[name].fillna(0).to_numpy() for name in FLIPS[:2])
    labeled = flips.notna().any(axis=1)
    p_values = np.where(labeled, significance.mcnemar(helped, hurt), np.nan)
    tests = {
        "mcnemar_p": p_values,
        "mcnemar_holm": significance.holm(p_values),
        "direction": np.sign((helped - hurt).sum(axis=1)),
    }
    return pd.DataFrame(tests, index=flips.index)


def compare(predictions: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Compare with and without adaptation on the same images, per group of rows.

    Args:
        predictions: One row per (image, shift, seed). Rows whose label is -1 count only in ``n``,
            ``changed``, ``distance``, ``open`` and times.
        by: Columns that make the groups.

    Returns:
        A row per group, in order of first appearance: the ``by`` columns, ``n`` (rows),
        ``accuracy_<side>`` for the sides source, untrained, adapted and gated, each of `GAINS` with
        its ends ``_low`` and ``_high``, the flips (rows), ``ece_source``, ``ece_adapted``,
        ``distance`` (mean), ``open`` (share of rows that the gate adapts to) and
        ``gated_milliseconds`` (mean). Unknown values are NaN; without a gate, its values too.
    """
    table = add_correctness(predictions)
    groups = table.groupby(list(by), sort=False)
    codes = groups.ngroup()
    sides = [f"accuracy_{side}" for side in ("source", "untrained", "adapted", "gated")]
    means = groups[[*sides, *GAINS, "distance", "open", "gated_milliseconds"]].mean()
    flips = [*FLIPS, "gated_wrong_to_right", "gated_right_to_wrong"]
    counts = groups[flips].sum(min_count=1).astype("Int64")
    result = pd.concat([groups.size().rename("n"), means, counts], axis=1)
    for name, (after, before) in GAINS.items():
        ends = _interval(table, name, after, before, codes, len(result))
        result[f"{name}_low"], result[f"{name}_high"] = ends.T
    labeled = table["label"] >= 0
    for side in ("source", "adapted"):
        bins = _reliability(table[labeled], side, codes[labeled].to_numpy(), len(result))
        result[f"ece_{side}"] = calibration.calibration_error(bins)
    if not has_gate(predictions):
        result[["open", "gated_milliseconds"]] = np.nan
    return result.reset_index()


def verdict(low: float | None, high: float | None) -> Verdict:
    """Name what an interval of the gain shows."""
    if low is None or high is None or np.isnan(low) or np.isnan(high):
        return "unknown"
    if low == high == 0:
        return "unchanged"
    if low > 0:
        return "helped"
    return "hurt" if high < 0 else "undecided"


def _interval(
    table: pd.DataFrame, name: str, after: str, before: str, codes: pd.Series, num_groups: int
) -> np.ndarray:
    """Compute the (G, 2) intervals of a gain; of width 0 if all predictions of the table agree."""
    known = table[name].notna()
    columns = (table[name], table["image_id"], table["seed"], codes)
    known_columns = (column[known].to_numpy() for column in columns)
    interval = gain_interval(*known_columns, num_groups=num_groups)
    identical = (table[f"{after}_prediction"] == table[f"{before}_prediction"]).all()
    return np.where(np.isnan(interval), np.nan, 0) if identical else interval


def _reliability(
    labeled: pd.DataFrame, side: str, codes: np.ndarray, num_groups: int
) -> calibration.Reliability:
    correct = (labeled[f"{side}_prediction"] == labeled["label"]).to_numpy(float)
    confidences = labeled[f"{side}_confidence"].to_numpy(float)
    return calibration.reliability(confidences, correct, codes, num_groups)


def _plain(value: Any) -> float | int | None:
    """Convert a NumPy number to a JSON number, and NaN to None."""
    if pd.isna(value):
        return None
    return int(value) if isinstance(value, int | np.integer) else float(value)
