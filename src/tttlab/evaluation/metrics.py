"""With and without test-time training: every reported number, from one table of predictions.

The same test images appear under every shift and are shown to the network of every training seed, so the rows of such a
table are not independent: `tttlab.evaluation.intervals` takes images and seeds as the units of chance.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from tttlab.evaluation import calibration, significance
from tttlab.evaluation.intervals import gain_interval
from tttlab.evaluation.predictions import GAINS, has_gate, score

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
    """Sum one run up: the entry of ``outputs/metrics.json``.

    Accuracies, gains with their 95 % intervals and calibration errors are fractions over the shifted rows unless named
    clean, flips are numbers of such rows, ``images`` counts those images, or, without a shift, the clean ones.
    ``shifts_helped`` and ``shifts_hurt`` count all shifts, clean among them. What cannot be known is None: without labels,
    without such rows, or, for an interval, with fewer than two images.
    ``gated`` is None for a run without a gate, the gains of training for one that does not train.

    Args:
        predictions: One row per (image, shift, seed); label -1 means unknown.
    """
    part = np.where(predictions["shift"] == "clean", "clean", "shifted")
    parts = (
        compare(predictions.assign(part=part), ["part"])
        .set_index("part")
        .reindex(["clean", "shifted"])
    )
    shifted, tests = predictions[part == "shifted"], shift_tests(predictions)
    significant = tests["mcnemar_holm"] < significance.LEVEL
    names = [f"{name}{end}" for name in ("gain", "training_gain") for end in ("", "_low", "_high")]
    entry = {
        name: parts.at["shifted", name] for name in ("accuracy_source", "accuracy_adapted", *names)
    }
    entry |= {
        f"clean_{name}": parts.at["clean", f"accuracy_{name}"] for name in ("source", "adapted")
    }
    entry |= {
        name: parts.at["shifted", name]
        for name in ("ece_source", "ece_adapted", "wrong_to_right", "right_to_wrong")
    }
    entry["changed"] = (shifted["source_prediction"] != shifted["adapted_prediction"]).sum()
    for name, sign in (("shifts_helped", 1), ("shifts_hurt", -1)):
        entry[name] = (
            (significant & (tests["direction"] == sign)).sum()
            if tests["mcnemar_p"].notna().any()
            else None
        )
    entry |= {
        "images": (shifted if len(shifted) else predictions)["image_id"].nunique(),
        "seeds": predictions["seed"].nunique(),
    }
    entry["gain_seed_sd"] = score(shifted).groupby("seed")["gain"].mean().std()
    entry["fell_back"] = shifted["fell_back"].sum()
    for percent in (50, 95):
        entry[f"milliseconds_p{percent}"] = shifted["milliseconds"].quantile(percent / 100)
    entry["milliseconds_mean"] = shifted["milliseconds"].mean()
    entry = {name: _plain(value) for name, value in entry.items()}
    gated = {name: _plain(parts.at[rows, column]) for name, (rows, column) in GATED.items()}
    return entry | {"gated": gated if has_gate(predictions) else None}


def flatten(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Turn an entry of metrics.json into a row of summary.csv: the gate's values as ``gated_<name>``, None as NaN."""
    gated = entry["gated"] or dict.fromkeys(GATED)
    row = {k: v for k, v in entry.items() if k != "gated"} | {
        f"gated_{name}": value for name, value in gated.items()
    }
    return {name: np.nan if value is None else value for name, value in row.items()}


def by_shift(predictions: pd.DataFrame) -> pd.DataFrame:
    """Compare per shift, clean images first, with McNemar's tests; the columns of by_shift.csv after model and run."""
    keys = ["shift", "corruption", "severity"]
    table = compare(predictions, keys).merge(shift_tests(predictions).reset_index(), on="shift")
    place = {name: rank for rank, name in enumerate(table["corruption"].unique())}
    rank = table["corruption"].map(place).where(table["shift"] != "clean", -1)
    table = table.assign(rank=rank).sort_values(
        ["rank", "severity"], kind="stable", ignore_index=True
    )
    return table[
        [
            *keys,
            *TABLE,
            "mcnemar_p",
            "mcnemar_holm",
            "ece_source",
            "ece_adapted",
            "distance",
            "gated_gain",
        ]
    ]


def by_corruption(predictions: pd.DataFrame) -> pd.DataFrame:
    """Compare per corruption, its severities together; clean images are left out."""
    table = compare(predictions[predictions["shift"] != "clean"], ["corruption"])
    return table[["corruption", *TABLE, "distance", "gated_gain"]]


def by_severity(predictions: pd.DataFrame) -> pd.DataFrame:
    """Compare per severity, all corruptions together; 0 are the clean images. Shifts without degrees are left out."""
    graded = predictions[(predictions["severity"] > 0) | (predictions["shift"] == "clean")]
    table = compare(graded, ["severity"]).sort_values("severity", ignore_index=True)
    return table[["severity", *TABLE, "distance", "gated_gain"]]


def reliability(predictions: pd.DataFrame) -> pd.DataFrame:
    """Give the reliability diagram over all shifted rows with a label: a row per (with, bin), empty bins with NaN."""
    known = predictions[(predictions["shift"] != "clean") & (predictions["label"] >= 0)]
    parts = []
    for side in ("source", "adapted"):
        (confidence,), (accuracy,), (count,) = _reliability(
            known, side, np.zeros(len(known), int), 1
        )
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
    """Test each shift by McNemar, exactly and in every seed, with Holm's correction over all of them, clean included.

    Returns:
        Per shift (the index) ``mcnemar_p``, ``mcnemar_holm`` (NaN without labels) and ``direction``, 1 if more images were
        helped than hurt, -1 if fewer, else 0.
    """
    flips = (
        score(predictions)
        .groupby(["shift", "seed"], sort=False)[FLIPS[:2]]
        .sum(min_count=1)
        .unstack("seed")
    )
    helped, hurt = (flips[name].fillna(0).to_numpy() for name in FLIPS[:2])
    known = flips.notna().any(axis=1)
    p_values = np.where(known, significance.mcnemar(helped, hurt), np.nan)
    tests = {"mcnemar_p": p_values, "mcnemar_holm": significance.holm(p_values)}
    return pd.DataFrame(
        tests | {"direction": np.sign((helped - hurt).sum(axis=1))}, index=flips.index
    )


def compare(predictions: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Compare with and without adaptation on the same images, per group of rows.

    Args:
        predictions: One row per (image, shift, seed); rows whose label is -1 count in ``n``, ``changed``, ``distance``,
            ``open`` and times only.
        by: Columns that make the groups.

    Returns:
        A row per group, in order of first appearance: the ``by`` columns, ``n`` (rows), ``accuracy_<side>`` for the sides
        source, untrained, adapted and gated, each of `GAINS` with its ends ``_low`` and ``_high``, the flips (rows),
        ``ece_source``, ``ece_adapted``, ``distance`` (mean), ``open`` (share of rows that the gate adapts to) and
        ``gated_milliseconds`` (mean). NaN where unknown; what concerns the gate also where there is none.
    """
    table = score(predictions)
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
    known = table["label"] >= 0
    for side in ("source", "adapted"):
        found = _reliability(table[known], side, codes[known].to_numpy(), len(result))
        result[f"ece_{side}"] = calibration.calibration_error(found)
    if not has_gate(predictions):
        result[["open", "gated_milliseconds"]] = np.nan
    return result.reset_index()


def verdict(low: float | None, high: float | None) -> Verdict:
    """Say in a word what an interval of the gain shows."""
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
    """Find the (G, 2) intervals of a gain; without width where not one prediction of the whole table differs."""
    known = table[name].notna()
    columns = (
        column[known].to_numpy()
        for column in (table[name], table["image_id"], table["seed"], codes)
    )
    interval = gain_interval(*columns, num_groups=num_groups)
    identical = (table[f"{after}_prediction"] == table[f"{before}_prediction"]).all()
    return np.where(np.isnan(interval), np.nan, 0) if identical else interval


def _reliability(
    known: pd.DataFrame, side: str, codes: np.ndarray, num_groups: int
) -> calibration.Reliability:
    correct = (known[f"{side}_prediction"] == known["label"]).to_numpy(float)
    return calibration.reliability(
        known[f"{side}_confidence"].to_numpy(float), correct, codes, num_groups
    )


def _plain(value: Any) -> float | int | None:
    """Turn a NumPy number into one that JSON knows, NaN into None."""
    if pd.isna(value):
        return None
    return int(value) if isinstance(value, int | np.integer) else float(value)
