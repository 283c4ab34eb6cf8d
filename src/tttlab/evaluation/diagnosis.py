"""Tables on when test-time training helps and what tuning was worth.

They use labels, but only after the fact: nothing of this reaches `adapt` or `tune`.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtr, stdtrit  # importing scipy.stats would take a second

from tttlab.evaluation.intervals import CONFIDENCE
from tttlab.evaluation.predictions import add_correctness
from tttlab.seeding import numpy_generator

TABLES = ("steps", "tuning", "alignment", "correlations")
RESAMPLES = 999
# Signals that are known before adapting and without a label.
LABEL_FREE = ("loss_first", "source_confidence", "distance")


def make_tables(
    predictions: pd.DataFrame, steps: Path, aligned: Path, seed: int
) -> dict[str, pd.DataFrame]:
    """Make the `TABLES` of one run, as far as its files allow.

    Args:
        predictions: of this run; see `tttlab.evaluation.predictions`.
        steps: the file that `adapt` writes along the steps; it may be missing.
        aligned: the file that `align` writes; it is missing if there was nothing to compare.
        seed: of the resampling.
    """
    tables = {}
    if steps.is_file():
        table = pd.read_parquet(steps)
        tables |= {"steps": along_steps(table), "tuning": choices(table)}
    if aligned.is_file():
        joined = join_alignment(predictions, pd.read_parquet(aligned))
        tables["alignment"] = alignment_by_shift(joined)
        tables["correlations"] = correlations(joined, seed)
    return tables


def along_steps(steps: pd.DataFrame) -> pd.DataFrame:
    """Average the curves of every setting: ``tables/steps.csv`` without model and run.

    Args:
        steps: a row per (setting, step, image, shift), as `adapt` wrote it; label -1 means unknown.
    """
    table = steps.assign(
        right=(steps["prediction"] == steps["label"]).astype(float).where(steps["label"] >= 0),
        used=steps["step"] == steps["used_step"],
    )
    keys = ["setting", "step"]
    shifted = table[table["shift"] != "clean"].groupby(keys, sort=False)
    clean = table[table["shift"] == "clean"].groupby(keys, sort=False)
    return pd.DataFrame(
        {
            "accuracy": shifted["right"].mean(),
            "clean_accuracy": clean["right"].mean(),
            "loss": shifted["loss"].mean(),
            "milliseconds": shifted["milliseconds"].mean(),
            "n": shifted["image_id"].nunique(),
            "used": shifted["used"].first(),
            "settings": shifted["settings"].first(),
        }
    ).reset_index()


def choices(steps: pd.DataFrame) -> pd.DataFrame:
    """Compare no adaptation, default, tuned setting and oracle: ``tables/tuning.csv``.

    All are measured on the same images. The oracle is the best of all settings and steps that were
    followed, picked by test accuracy. It is an upper bound on any choice among them, not a result.

    Args:
        steps: as for `along_steps`.

    Returns:
        a row per choice; none if no shifted image has a label.
    """
    labeled = steps[steps["label"] >= 0]
    if (labeled["shift"] == "clean").all():
        return pd.DataFrame()
    first = labeled.groupby(["image_id", "shift"], sort=False).first().reset_index()
    right = (first["source_prediction"] == first["label"]).groupby(first["shift"] == "clean").mean()
    none = {
        "choice": "none",
        "settings": "",
        "step": 0,
        "accuracy": right[False],
        "clean_accuracy": right.get(True, np.nan),
    }
    curves = along_steps(labeled)
    used = curves[curves["used"]].set_index("setting")
    columns = ["settings", "step", "accuracy", "clean_accuracy"]
    rows = [none]
    for choice in ("default", "tuned") if "tuned" in used.index else ("default",):
        # Where tuning chose the default, there is a curve named "tuned" only.
        name = choice if choice in used.index else "tuned"
        if name in used.index:
            rows.append({"choice": choice, **used.loc[name, columns]})
    best = curves.loc[curves["accuracy"].idxmax()]
    rows.append({"choice": "oracle", **best[columns]})
    table = pd.DataFrame(rows)
    table["gain"] = table["accuracy"] - none["accuracy"]
    table["clean_change"] = table["clean_accuracy"] - none["clean_accuracy"]
    return table.drop(columns="clean_accuracy").assign(
        n=labeled.loc[labeled["shift"] != "clean", "image_id"].nunique()
    )


def join_alignment(predictions: pd.DataFrame, aligned: pd.DataFrame) -> pd.DataFrame:
    """Put the gradients' agreement beside the predictions of the same network.

    Returns:
        a row per (image, shift) with a label.
    """
    rows = predictions[(predictions["label"] >= 0) & predictions["seed"].isin(aligned["seed"])]
    table = add_correctness(rows).merge(aligned, on=["image_id", "shift", "seed"], how="left")
    return table.assign(
        loss_change=table["loss_last"] - table["loss_first"],
        confidence_change=table["adapted_confidence"] - table["source_confidence"],
    )


def alignment_by_shift(joined: pd.DataFrame) -> pd.DataFrame:
    """Average per shift over the images whose gradients have an angle: ``tables/alignment.csv``.

    Images that a method leaves alone have no gradient, hence no angle. The mean cosine's interval
    is Student's.
    """
    groups = joined[joined["cosine"].notna()].groupby("shift", sort=False)
    columns = ["cosine", "gain", "loss_change", "confidence_change", "distance"]
    table = groups[columns].mean().assign(n=groups.size())
    count, standard_error = groups["cosine"].count(), groups["cosine"].sem()
    half = standard_error * stdtrit((count - 1).clip(lower=1), (1 + CONFIDENCE) / 2)
    low, high = table["cosine"] - half, table["cosine"] + half
    return table.assign(cosine_low=low, cosine_high=high).reset_index()


def correlations(joined: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Rank-correlate every signal with the gain: ``tables/correlations.csv``.

    Only rows with a known signal count. Over images, a row is an (image, shift) with a gain of -1,
    0 or 1, and the p-value comes from resampling whole images, because the shifts of one image are
    not independent. Over corruptions, the means over their images and severities are correlated,
    because severities of one corruption are not independent either, and the p-value comes from
    permuting the corruptions.

    Args:
        joined: from `join_alignment`.
        seed: of the resampling.
    """
    shifted = joined[joined["shift"] != "clean"]
    signals = [
        "cosine",
        "loss_first",
        "loss_change",
        "source_confidence",
        "confidence_change",
        "distance",
    ]
    rows = []
    for signal in signals:
        finite = shifted[np.isfinite(shifted[signal])]
        by_corruption = finite.groupby("corruption", sort=False)[[signal, "gain"]].mean()
        for level, table in (("image", finite), ("corruption", by_corruption)):
            if len(table) < 3 or table[signal].nunique() < 2 or table["gain"].nunique() < 2:
                continue
            if level == "corruption":
                rho, p = permuted_spearman(table[signal], table["gain"], seed)
            else:
                rho, p = clustered_spearman(table[signal], table["gain"], table["image_id"], seed)
            rows.append(
                {
                    "level": level,
                    "signal": signal,
                    "label_free": signal in LABEL_FREE,
                    "spearman": rho,
                    "p": p,
                    "n": len(table),
                }
            )
    return pd.DataFrame(rows)


def permuted_spearman(first: pd.Series, second: pd.Series, seed: int) -> tuple[float, float]:
    """Compute Spearman's rank correlation with the two-sided p-value of random permutations."""
    ranks = (values.rank() for values in (first, second))
    x, y = (((rank - rank.mean()) / rank.std(ddof=0)).to_numpy() for rank in ranks)
    permuted = numpy_generator(seed, "permutation").permuted(np.tile(y, (RESAMPLES, 1)), axis=1)
    rho = float((x * y).mean())
    as_extreme = np.abs(permuted @ x) / len(x) >= abs(rho) - 1e-12
    return rho, float((1 + as_extreme.sum()) / (1 + RESAMPLES))


def clustered_spearman(
    first: pd.Series, second: pd.Series, clusters: pd.Series, seed: int
) -> tuple[float, float]:
    """Compute Spearman's rank correlation of rows that come in clusters.

    Returns:
        ρ and its two-sided p-value, from ρ over the standard deviation of its replicates in a
        bootstrap of whole clusters; NaN for one cluster.
    """
    x, y = (values.rank().to_numpy() - (len(values) + 1) / 2 for values in (first, second))
    codes, names = pd.factorize(clusters, sort=True)
    sums = np.zeros((len(names), 6))
    np.add.at(sums, codes, np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1))

    def pearson(total: np.ndarray) -> np.ndarray:
        n, sx, sy, sxx, syy, sxy = total.T
        return (sxy - sx * sy / n) / np.sqrt((sxx - sx**2 / n) * (syy - sy**2 / n))

    rho = float(pearson(sums.sum(0, keepdims=True))[0])
    if len(names) < 2:
        return rho, float("nan")
    weights = numpy_generator(seed, "correlation").multinomial(
        len(names), np.full(len(names), 1 / len(names)), RESAMPLES
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.nanstd(pearson(weights @ sums))
    return rho, float(2 * ndtr(-abs(rho) / spread)) if spread > 0 else 1.0
