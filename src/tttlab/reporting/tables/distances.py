"""The report's tables of how far the image sets lie apart."""

from collections.abc import Callable, Iterator

import pandas as pd

from tttlab.evaluation.results import Results, is_known, shift_name
from tttlab.reporting.tables.comparison import Cell, Table, line
from tttlab.reporting.words import percent, points, probability, significant

_METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "kl_features": ("KL divergence, features, nats", significant),
    "kl_labels": ("KL divergence, predicted classes, nats", significant),
    "wasserstein_sliced": ("sliced Wasserstein, feature units", significant),
    "wasserstein_gaussian": ("Gaussian Wasserstein, feature units", significant),
    "fid": ("Fréchet (FID's formula)", significant),
    "mmd": ("squared MMD", significant),
    "classifier_accuracy": ("told apart by a classifier, %", percent),
    "confidence_drop": ("drop of confidence, points", points),
    "estimated_accuracy": ("estimated accuracy (confidence drop), %", percent),
    "estimated_accuracy_atc": ("estimated accuracy (thresholded), %", percent),
}


def _metric(name: str) -> tuple[str, Callable[[float], str]]:
    return _METRICS.get(name, (name.replace("_", " "), significant))


def _distances(results: Results) -> pd.DataFrame:
    """Summarise every distance over the training seeds: the mean value and the largest p."""
    rows = results.rows("distances")
    if not len(rows):
        return rows
    keys = ["model", "reference", "target", "metric"]
    means = {name: (name, "mean") for name in ("value", "floor", "floor_high")}
    counts = {name: (name, "min") for name in ("n_reference", "n_target")}
    return rows.groupby(keys, sort=False).agg(**means, p=("p", "max"), **counts).reset_index()


def _distance_cell(row: pd.Series, extra: str = "") -> Cell:
    write = _metric(row["metric"])[1]
    floor = f"floor {write(row['floor'])}" if is_known(row["floor"]) else ""
    p = f"p {probability(row['p'])}" if is_known(row["p"]) else ""
    note = " · ".join(filter(None, [extra, floor, p]))
    return Cell(write(row["value"]), note, "strong" if _is_far(row) else "")


def _is_far(row: pd.Series) -> bool:
    """Compare with the floor; between balanced sets p is too large (docs/distances.md)."""
    return not row["metric"].startswith("estimated") and bool(row["value"] > row["floor_high"])


def distance_summary(results: Results) -> Iterator[Table]:
    """Compare the distances between the sets: to clean images, to shifts, to the farthest shift."""
    table = _distances(results)
    groups = dict(list(table.groupby("model", sort=False))) if len(table) else {}
    for number, (model, rows) in enumerate(groups.items(), 1):
        lines = []
        pairs = _pairs(rows)
        for metric, of_metric in rows.groupby("metric", sort=False):
            cells = []
            for reference, target in pairs.values():
                found = of_metric[of_metric["reference"] == reference]
                found = found[found["target"] == target]
                cells.append(_distance_cell(found.iloc[0]) if len(found) else Cell("–"))
            if not _only_shift(rows):
                shifted = of_metric["target"] != "clean"
                cells += _over_shifts(of_metric[shifted & (of_metric["reference"] == "labeled")])
            lines.append(line(_metric(metric)[0], *cells))
        over = () if _only_shift(rows) else ("mean", "farthest")
        heads = (model, *pairs, *(f"labeled → shifted, {which}" for which in over))
        caption = (
            f"n = {_sizes(rows)} images. Floor: mean of the same metric between two samples of one "
            "distribution, of these sizes. Bold: beyond 95 % of such pairs. p: permutation test, "
            "too careful where both sets are balanced."
        )
        if results.seeds > 1:
            caption += " Values are means over the training seeds, p the largest of them."
        caption = caption if number == len(groups) else ""
        yield Table(f"distance-{model}", "distance", heads, tuple(lines), caption)


def _only_shift(rows: pd.DataFrame) -> str | None:
    """Name the shift if there is but one; there is no farthest of one."""
    targets = rows.loc[rows["reference"] == "labeled", "target"].unique()
    shifted = [target for target in targets if target != "clean"]
    return shifted[0] if len(shifted) == 1 else None


def _pairs(rows: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """List the pairs of sets that have a column: reference and target by the column's head."""
    wanted = [("unlabeled", "labeled"), ("labeled", "clean")]
    if only := _only_shift(rows):
        wanted.append(("labeled", only))
    known = set(zip(rows["reference"], rows["target"], strict=True))
    return {
        f"{reference} → {shift_name(target)}": (reference, target)
        for reference, target in wanted
        if (reference, target) in known
    }


def _sizes(rows: pd.DataFrame) -> str:
    sizes = rows[["n_reference", "n_target"]].to_numpy()
    return " to ".join(f"{size:,}" for size in sorted({sizes.min(), sizes.max()}))


def _over_shifts(rows: pd.DataFrame) -> tuple[Cell, Cell]:
    """Summarise one metric over the shifts: its mean and the farthest shift.

    The farthest shift has the lowest estimated accuracy, or the highest value of another metric.
    """
    values = rows["value"].dropna()
    if values.empty:
        return Cell("–"), Cell("–")
    metric = rows["metric"].iloc[0]
    mean = _metric(metric)[1](values.mean())
    if metric.startswith("estimated"):
        note, farthest = "", rows.loc[values.idxmin()]
    else:
        far = sum(_is_far(row) for _, row in rows.iterrows())
        note, farthest = f"beyond the floor: {far} of {len(rows)}", rows.loc[values.idxmax()]
    return Cell(mean, note), _distance_cell(farthest, shift_name(farthest["target"]))


def distance_details(results: Results) -> Iterator[Table]:
    """List every metric of every pair of sets."""
    table = _distances(results)
    if not len(table):
        return
    for (model, reference), rows in table.groupby(["model", "reference"], sort=False):
        metrics, lines = list(dict.fromkeys(rows["metric"])), []
        for target, of_target in rows.groupby("target", sort=False):
            by_metric = {row["metric"]: _distance_cell(row) for _, row in of_target.iterrows()}
            cells = (by_metric.get(metric, Cell("–")) for metric in metrics)
            lines.append(line(shift_name(target), *cells))
        heads = ("target", *(_metric(metric)[0] for metric in metrics))
        name = f"distances-{reference}-{model}"
        folded = f"{model}: every shift from the {reference} images"
        yield Table(name, "distance", heads, tuple(lines), folded=folded)
