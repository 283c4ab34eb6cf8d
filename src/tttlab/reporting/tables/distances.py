"""The report's tables of how far the image sets lie apart."""

from collections.abc import Callable, Iterator

import pandas as pd

from tttlab.evaluation.results import Results, known, shift_name
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
    """Take every distance over the training seeds: the mean of the values, the largest p."""
    rows = results.rows("distances")
    if not len(rows):
        return rows
    keys = ["model", "reference", "target", "metric"]
    means = {name: (name, "mean") for name in ("value", "floor", "floor_high")}
    counts = {name: (name, "min") for name in ("n_reference", "n_target")}
    return rows.groupby(keys, sort=False).agg(**means, p=("p", "max"), **counts).reset_index()


def _distance_cell(row: pd.Series, extra: str = "") -> Cell:
    write = _metric(row["metric"])[1]
    parts = [
        f"floor {write(row['floor'])}" if known(row["floor"]) else "",
        f"p {probability(row['p'])}" if known(row["p"]) else "",
    ]
    return Cell(
        write(row["value"]),
        " · ".join(filter(None, [extra, *parts])),
        "strong" if _is_far(row) else "",
    )


def _is_far(row: pd.Series) -> bool:
    """Judge by the floor: a permutation test is too careful between balanced sets (docs/distances.md)."""
    return not row["metric"].startswith("estimated") and bool(row["value"] > row["floor_high"])


def distance_summary(results: Results) -> Iterator[Table]:
    """Set the distances between the image sets side by side: the clean target, the shifts' mean, the worst shift."""
    table = _distances(results)
    groups = dict(list(table.groupby("model", sort=False))) if len(table) else {}
    for number, (model, rows) in enumerate(groups.items(), 1):
        home, lines = rows[rows["reference"] == "labeled"], []
        shifted = home[home["target"] != "clean"]
        for metric in dict.fromkeys(rows["metric"]):
            first = rows[
                (rows["metric"] == metric)
                & (rows["reference"] == "unlabeled")
                & (rows["target"] == "labeled")
            ]
            clean = home[(home["metric"] == metric) & (home["target"] == "clean")]
            cells = [
                _distance_cell(part.iloc[0]) if len(part) else Cell("–") for part in (first, clean)
            ]
            lines.append(
                line(
                    _metric(metric)[0], *cells, *_over_shifts(shifted[shifted["metric"] == metric])
                )
            )
        heads = (
            model,
            "unlabeled → labeled",
            "labeled → clean",
            "labeled → shifted, mean",
            "labeled → shifted, farthest",
        )
        seeds = (
            " Values are means over the training seeds, p the largest of them."
            if results.seeds > 1
            else ""
        )
        caption = (
            f"n = {_sizes(rows)} images. Floor: mean of the same metric between two samples of one distribution, of these "
            f"sizes. Bold: beyond 95 % of such pairs. p: permutation test, too careful where both sets are balanced.{seeds}"
        )
        yield Table(
            f"distance-{model}",
            "distance",
            heads,
            tuple(lines),
            caption if number == len(groups) else "",
        )


def _sizes(rows: pd.DataFrame) -> str:
    sizes = rows[["n_reference", "n_target"]].to_numpy()
    return " to ".join(f"{size:,}" for size in sorted({sizes.min(), sizes.max()}))


def _over_shifts(rows: pd.DataFrame) -> tuple[Cell, Cell]:
    """Sum one metric up over the shifts; the farthest is where an estimated accuracy is lowest, anything else highest."""
    values = rows["value"].dropna()
    if values.empty:
        return Cell("–"), Cell("–")
    write, estimate = (
        _metric(rows["metric"].iloc[0])[1],
        rows["metric"].iloc[0].startswith("estimated"),
    )
    far = (
        ""
        if estimate
        else f"beyond the floor: {sum(_is_far(row) for _, row in rows.iterrows())} of {len(rows)}"
    )
    farthest = rows.loc[values.idxmin() if estimate else values.idxmax()]
    return Cell(write(values.mean()), far), _distance_cell(farthest, shift_name(farthest["target"]))


def distance_details(results: Results) -> Iterator[Table]:
    """List every metric of every pair."""
    table = _distances(results)
    for (model, reference), rows in (
        table.groupby(["model", "reference"], sort=False) if len(table) else ()
    ):
        metrics, lines = list(dict.fromkeys(rows["metric"])), []
        for target, part in rows.groupby("target", sort=False):
            found = {row["metric"]: _distance_cell(row) for _, row in part.iterrows()}
            lines.append(
                line(shift_name(target), *(found.get(metric, Cell("–")) for metric in metrics))
            )
        heads = ("target", *(_metric(metric)[0] for metric in metrics))
        told = f"{model}: every shift from the {reference} images"
        yield Table(f"distances-{reference}-{model}", "distance", heads, tuple(lines), folded=told)
