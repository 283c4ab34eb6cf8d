"""With and without test-time training: every reported number, from one table of predictions.

The same test images appear under every shift, so the rows of such a table are not independent. Intervals therefore
resample *images*, each together with all its shifts; resampling rows would make them too narrow.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from tttlab.errors import UserError
from tttlab.seeding import numpy_generator

COLUMNS = (
    "image_id", "shift", "corruption", "severity", "label", "source_prediction", "adapted_prediction",
    "source_confidence", "adapted_confidence", "loss_first", "loss_last", "fell_back", "milliseconds",
)  # fmt: skip
RESAMPLES = 9_999
CONFIDENCE = 0.95

Verdict = Literal["helped", "hurt", "undecided", "unchanged", "unknown"]


def read_predictions(path: Path) -> pd.DataFrame:
    """Read the predictions of one run on one model: a row per (image, shift).

    Raises:
        UserError: The file is missing, lacks columns, or holds an image twice under one shift.
    """
    if not path.is_file():
        raise UserError(f"{path}: expected the predictions of a run that params.yaml lists, found no file; run `adapt`")
    predictions = pd.read_parquet(path)
    if missing := [column for column in COLUMNS if column not in predictions.columns]:
        raise UserError(f"{path}: expected the columns of a predictions table, found none named {', '.join(missing)}")
    twice = predictions.duplicated(["image_id", "shift"])
    if twice.any():
        row = predictions[twice].iloc[0]
        raise UserError(f"{path}: expected every image once per shift, found {row['image_id']} twice under {row['shift']}")
    return predictions


def summarise(predictions: pd.DataFrame, seed: int) -> dict[str, float | int | None]:
    """Sum one run up: the entries of ``outputs/metrics.json``.

    Accuracies, the gain and its 95 % interval are fractions over the shifted images unless named clean. They are None
    where they cannot be known: no labels, no such images, or, for the interval, fewer than two images.

    Args:
        predictions: One row per (image, shift); label -1 means unknown.
        seed: Seed of the bootstrap.
    """
    part = np.where(predictions["shift"] == "clean", "clean", "shifted")
    table = compare(predictions.assign(part=part), ["part"], seed).set_index("part").reindex(["clean", "shifted"])
    clean, overall = table.loc["clean"], table.loc["shifted"]
    shifted = predictions[part == "shifted"]
    summary = {name: overall[name] for name in ("accuracy_source", "accuracy_adapted", "gain", "gain_low", "gain_high")}
    summary |= {"clean_source": clean["accuracy_source"], "clean_adapted": clean["accuracy_adapted"]}
    summary |= {"images": predictions["image_id"].nunique(), "fell_back": shifted["fell_back"].sum()}
    for percent in (50, 95):
        summary[f"milliseconds_p{percent}"] = shifted["milliseconds"].quantile(percent / 100)
    return {name: _plain(value) for name, value in summary.items()}


def by_shift(predictions: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Compare per shift, clean images first: the columns of `compare` after shift, corruption and severity."""
    table = compare(predictions, ["shift", "corruption", "severity"], seed)
    place = {name: rank for rank, name in enumerate(table["corruption"].unique())}
    rank = table["corruption"].map(place).where(table["shift"] != "clean", -1)
    return table.assign(rank=rank).sort_values(["rank", "severity"], kind="stable", ignore_index=True).drop(columns="rank")


def by_corruption(predictions: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Compare per corruption, its severities together; clean images are left out."""
    return compare(predictions[predictions["shift"] != "clean"], ["corruption"], seed)


def by_severity(predictions: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Compare per severity, all corruptions together; severity 0 are the clean images."""
    return compare(predictions, ["severity"], seed).sort_values("severity", ignore_index=True)


def compare(predictions: pd.DataFrame, by: Sequence[str], seed: int) -> pd.DataFrame:
    """Compare with and without adaptation on the same images, per group of rows.

    Args:
        predictions: One row per (image, shift); rows whose label is -1 count in ``n`` and ``changed`` only.
        by: Columns that make the groups.
        seed: Seed of the bootstrap; all groups are resampled with the same draws of images.

    Returns:
        A row per group, in order of first appearance: the ``by`` columns, ``n`` (rows), ``accuracy_source``,
        ``accuracy_adapted``, ``gain``, ``gain_low``, ``gain_high`` (fractions, NaN where unknown), ``wrong_to_right``,
        ``right_to_wrong`` (rows with a label) and ``changed`` (rows whose predicted class changed).
    """
    table = _scored(predictions)
    groups = table.groupby(list(by), sort=False)
    result = groups.agg(
        n=("changed", "size"),
        accuracy_source=("accuracy_source", "mean"),
        accuracy_adapted=("accuracy_adapted", "mean"),
        gain=("difference", "mean"),
    )
    known = table["difference"].notna()
    interval = paired_interval(
        *(column[known].to_numpy() for column in (table["difference"], table["image_id"], groups.ngroup())),
        num_groups=len(result),
        seed=seed,
    )
    result["gain_low"], result["gain_high"] = interval.T
    flips = groups[["wrong_to_right", "right_to_wrong", "changed"]].sum()
    return result.join(flips).reset_index()


def paired_interval(
    differences: np.ndarray,
    images: np.ndarray,
    groups: np.ndarray,
    *,
    num_groups: int,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> np.ndarray:
    """Find the percentile bootstrap interval of each group's mean difference, resampling whole images.

    Equal in law to `scipy.stats.bootstrap` over per-image (sum, count) pairs. Written out because all groups then share
    one draw and one matrix product: 90 groups of 10,000 images take seconds, not an hour.

    Args:
        differences: (R,) adapted correct minus source correct, one per row: -1, 0 or 1.
        images: (R,) which image a row is of; the unit that is resampled.
        groups: (R,) integers in ``[0, num_groups)``.
        num_groups: G.
        seed: Seed of the draws.
        resamples: Number of bootstrap samples.
        confidence: Nominal coverage in (0, 1).

    Returns:
        (G, 2) lower and upper ends; NaN for a group with fewer than two images.

    Reference:
        Davison and Hinkley, Bootstrap Methods and their Application (1997), sections 3.8 (clusters) and 5.3.1.
    """
    codes, names = pd.factorize(images, sort=True)  # sorted: the order of the rows is then of no account
    num_images = len(names)
    interval = np.full((num_groups, 2), np.nan)
    if num_images < 2:
        return interval
    sums, counts = np.zeros((2, num_images, num_groups))
    np.add.at(sums, (codes, groups), differences)
    np.add.at(counts, (codes, groups), 1)
    means = np.concatenate([(w @ sums, w @ counts) for w in _image_weights(num_images, resamples, seed)], axis=1)
    with np.errstate(invalid="ignore"):  # a small group can be missing from a resample: 0 / 0, left out of the quantile
        ratios = means[0] / means[1]
    enough = (counts > 0).sum(axis=0) >= 2
    tail = (1 - confidence) / 2
    interval[enough] = np.nanquantile(ratios[:, enough], [tail, 1 - tail], axis=0).T
    return interval


def verdict(low: float | None, high: float | None) -> Verdict:
    """Say in a word what an interval of the gain shows."""
    if low is None or high is None or np.isnan(low) or np.isnan(high):
        return "unknown"
    if low == high == 0:
        return "unchanged"
    if low > 0:
        return "helped"
    return "hurt" if high < 0 else "undecided"


def _scored(predictions: pd.DataFrame) -> pd.DataFrame:
    """Add correctness (NaN without a label), its difference, and the flips, one per row."""
    label, source, adapted = (predictions[name] for name in ("label", "source_prediction", "adapted_prediction"))
    known = label >= 0
    return predictions.assign(
        accuracy_source=(source == label).astype(float).where(known),
        accuracy_adapted=(adapted == label).astype(float).where(known),
        difference=((adapted == label).astype(float) - (source == label)).where(known),
        wrong_to_right=known & (source != label) & (adapted == label),
        right_to_wrong=known & (source == label) & (adapted != label),
        changed=source != adapted,
    )


def _image_weights(num_images: int, resamples: int, seed: int):
    """Yield blocks (b, num_images) of how often a bootstrap sample draws each image."""
    generator = numpy_generator(seed, "bootstrap")
    block = max(1, min(resamples, 2**22 // num_images))  # 32 MB of draws at a time, however many images there are
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        draws = generator.integers(num_images, size=(size, num_images)) + num_images * np.arange(size)[:, None]
        yield np.bincount(draws.ravel(), minlength=size * num_images).reshape(size, num_images).astype(float)


def _plain(value: float) -> float | int | None:
    """Turn a NumPy number into one that JSON knows, NaN into None."""
    if pd.isna(value):
        return None
    return int(value) if isinstance(value, int | np.integer) else float(value)
