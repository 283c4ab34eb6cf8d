"""When does test-time training help, and what was it worth to tune it: tables from what the stages measured.

Labels are used here, after the fact; nothing of this reaches `adapt` or `tune`.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from tttlab.evaluation.predictions import score
from tttlab.seeding import numpy_generator

TABLES = ("steps", "tuning", "alignment", "correlations")
RESAMPLES = 999
LABEL_FREE = (
    "loss_first",
    "source_confidence",
    "distance",
)  # known before adapting, and without a label


def read(
    predictions: pd.DataFrame, steps: Path, aligned: Path, seed: int
) -> dict[str, pd.DataFrame]:
    """Make those of `TABLES` for which one run left what they need.

    Args:
        predictions: of this run; see `tttlab.evaluation.predictions`.
        steps: what `adapt` wrote along the steps, if it did.
        aligned: what `align` wrote, if it had something to compare.
        seed: of the resampling.
    """
    found = {}
    if steps.is_file():
        table = pd.read_parquet(steps)
        found |= {"steps": along_steps(table), "tuning": choices(table)}
    if aligned.is_file():
        joined = join_alignment(predictions, pd.read_parquet(aligned))
        found |= {
            "alignment": alignment_by_shift(joined),
            "correlations": correlations(joined, seed),
        }
    return found


def along_steps(steps: pd.DataFrame) -> pd.DataFrame:
    """Average the curves of every setting: the columns of ``tables/steps.csv`` behind model and run.

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
    """Compare no adaptation, the default, the tuned setting and the oracle on the same images: ``tables/tuning.csv``.

    The oracle is the best of all settings and steps that were followed, picked by test accuracy: an upper bound of what any
    choice among them could have given, never a result.

    Args:
        steps: as for `along_steps`.
    """
    labeled = steps[steps["label"] >= 0]
    if (labeled["shift"] == "clean").all():  # nothing shifted whose label is known
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
    rows = [none]
    for choice in ("default", "tuned") if "tuned" in used.index else ("default",):
        name = choice if choice in used.index else "tuned"  # the default was what tuning chose
        if name in used.index:
            rows.append(
                {
                    "choice": choice,
                    **used.loc[name, ["settings", "step", "accuracy", "clean_accuracy"]],
                }
            )
    best = curves.loc[curves["accuracy"].idxmax()]
    rows.append({"choice": "oracle", **best[["settings", "step", "accuracy", "clean_accuracy"]]})
    table = pd.DataFrame(rows)
    table["gain"] = table["accuracy"] - none["accuracy"]
    table["clean_change"] = table["clean_accuracy"] - none["clean_accuracy"]
    return table.drop(columns="clean_accuracy").assign(
        n=labeled.loc[labeled["shift"] != "clean", "image_id"].nunique()
    )


def join_alignment(predictions: pd.DataFrame, aligned: pd.DataFrame) -> pd.DataFrame:
    """Put the gradients' agreement beside the predictions of the same network; rows are (image, shift) with a label."""
    known = (predictions["label"] >= 0) & predictions["seed"].isin(aligned["seed"])
    table = score(predictions[known]).merge(aligned, on=["image_id", "shift", "seed"], how="left")
    return table.assign(
        loss_change=table["loss_last"] - table["loss_first"],
        confidence_change=table["adapted_confidence"] - table["source_confidence"],
    )


def alignment_by_shift(joined: pd.DataFrame) -> pd.DataFrame:
    """Average per shift over the images whose gradients have an angle: ``tables/alignment.csv``.

    Images without a gradient, which a method leaves alone, have none. The interval of the mean cosine is Student's.
    """
    known = joined[joined["cosine"].notna()]
    groups = known.groupby("shift", sort=False)
    columns = ["cosine", "gain", "loss_change", "confidence_change", "distance"]
    table = groups[columns].mean().assign(n=groups.size())
    count, spread = groups["cosine"].count(), groups["cosine"].sem()
    reach = spread * stats.t.ppf(0.975, (count - 1).clip(lower=1))
    return table.assign(
        cosine_low=table["cosine"] - reach, cosine_high=table["cosine"] + reach
    ).reset_index()


def correlations(joined: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Rank-correlate every signal with the gain, over images and over shifts: ``tables/correlations.csv``.

    Both are taken over the rows where the signal is known. Over images a row is an (image, shift), its gain -1, 0 or 1, and the
    p-value comes from resampling whole images, since the shifts of one image are not independent. Over shifts, the means
    over their images are correlated, and the p-value comes from permuting the shifts.

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
        by_shift = finite.groupby("shift", sort=False)[[signal, "gain"]].mean().reset_index()
        for level, known in (("image", finite), ("shift", by_shift)):
            if len(known) < 3 or known[signal].nunique() < 2 or known["gain"].nunique() < 2:
                continue
            if level == "shift":
                rho, p = permuted_spearman(known[signal], known["gain"], seed)
            else:
                rho, p = clustered_spearman(known[signal], known["gain"], known["image_id"], seed)
            label_free = signal in LABEL_FREE
            rows.append(
                {
                    "level": level,
                    "signal": signal,
                    "label_free": label_free,
                    "spearman": rho,
                    "p": p,
                    "n": len(known),
                }
            )
    return pd.DataFrame(rows)


def permuted_spearman(one: pd.Series, other: pd.Series, seed: int) -> tuple[float, float]:
    """Spearman's rank correlation with the two-sided p-value of random permutations."""
    x, y = (stats.zscore(stats.rankdata(values)) for values in (one, other))
    drawn = numpy_generator(seed, "permutation").permuted(np.tile(y, (RESAMPLES, 1)), axis=1)
    rho = float((x * y).mean())
    return rho, float(
        (1 + (np.abs(drawn @ x) / len(x) >= abs(rho) - 1e-12).sum()) / (1 + RESAMPLES)
    )


def clustered_spearman(
    one: pd.Series, other: pd.Series, clusters: pd.Series, seed: int
) -> tuple[float, float]:
    """Spearman's rank correlation of rows that come in clusters, with a p-value that resamples whole clusters.

    Returns:
        ρ, and the two-sided p-value of ρ divided by the standard deviation of its bootstrap replicates; NaN for one cluster.
    """
    x, y = (stats.rankdata(values) - (len(values) + 1) / 2 for values in (one, other))
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
    return rho, float(2 * stats.norm.sf(abs(rho) / spread)) if spread > 0 else 1.0
