"""Every network as it is, beside what is recommended for each of the others.

What was done before test time, another normalisation layer or augmentation, may be worth more than
anything that is done at test time. Two networks of one seed have nothing in common but the images
and their order, so the intervals take both trainings as chance.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tttlab.evaluation.controls import beside
from tttlab.evaluation.metrics import compare
from tttlab.evaluation.predictions import read_predictions
from tttlab.evaluation.recommendation import recommend
from tttlab.evaluation.results import CONTROL, is_known

if TYPE_CHECKING:
    import pandas as pd


def rows(
    records: Mapping[str, Mapping[str, Mapping[str, Any]]],
    pairs: Sequence[tuple[str, str]],
    predictions: Path,
) -> Iterator[dict[str, Any]]:
    """Compare all pairs of networks on the shifted images; nothing without labels.

    Args:
        records: what `adapt` tells, by run and model.
        pairs: every model with every run on it.
        predictions: folder with ``<model>/<run>.parquet``.

    Yields:
        a row of ``tables/networks.csv``: ``model`` with its recommended ``run`` (`CONTROL`: none
        is) and ``accuracy``, the ``other`` network with its accuracy without adapting
        ``accuracy_other``, and the other's ``lead`` with ``lead_low`` and ``lead_high``, its 95 %
        interval. All are fractions.
    """
    runs: dict[str, list[str]] = {}
    for model, run in pairs:
        runs.setdefault(model, []).append(run)

    def shifted(model: str, run: str) -> "pd.DataFrame":
        table = read_predictions(predictions / model / f"{run}.parquet")
        return table[table["shift"] != "clean"]

    plain = {model: as_it_is(shifted(model, names[0])) for model, names in runs.items()}
    for model, names in runs.items():
        run = recommend({name: records[name][model] for name in names})
        own = shifted(model, run) if run else plain[model]
        for other in runs:
            if other != model and len(own):
                row = difference(plain[other], own)
                if is_known(row["lead"]):
                    yield {"model": model, "run": run or CONTROL, "other": other, **row}


def as_it_is(predictions: "pd.DataFrame") -> "pd.DataFrame":
    """Put the network's own predictions in the place of the adapted ones."""
    return predictions.assign(adapted_prediction=predictions["source_prediction"])


def difference(of_other: "pd.DataFrame", of_one: "pd.DataFrame") -> dict[str, float]:
    """Compare the adapted predictions of two networks on the same images, shifts and seeds.

    Returns:
        ``accuracy`` of the one and ``accuracy_other``, and the other's ``lead`` with the ends
        ``lead_low`` and ``lead_high`` of its 95 % interval; fractions, NaN without labels.

    Raises:
        UserError: the two tables are not of the same images, shifts and seeds.
    """
    paired = beside(of_other, of_one, "adapted_prediction")
    (row,) = compare(paired.assign(all=0), ["all"]).to_dict("records")
    return {
        "accuracy": row["accuracy_source"],
        "accuracy_other": row["accuracy_adapted"],
        **{f"lead{end}": row[f"gain{end}"] for end in ("", "_low", "_high")},
    }
