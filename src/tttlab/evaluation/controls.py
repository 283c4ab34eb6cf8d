"""What a run that trains gives above the strongest control: a run without training, no dearer.

*By training* compares a run with itself before its first step. Who has to choose asks another
question: would the same milliseconds give more without training? The control is chosen by its score
in tuning, on source images, as every setting is: test labels have no say.
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tttlab.errors import UserError
from tttlab.evaluation.metrics import compare
from tttlab.evaluation.predictions import read_predictions
from tttlab.evaluation.results import CONTROL, is_known

if TYPE_CHECKING:
    import pandas as pd

UNKNOWN: dict[str, Any] = dict.fromkeys(
    ("control", "over_control", "over_control_low", "over_control_high")
)


def add(
    entries: Mapping[str, dict[str, Any]],
    records: Mapping[str, Mapping[str, Mapping[str, Any]]],
    pairs: Iterable[tuple[str, str]],
    predictions: Path,
) -> None:
    """Compare every run that trains with its control, in place.

    Args:
        entries: of metrics.json by ``<model>/<run>``; each gets the keys of `UNKNOWN`.
        records: what `adapt` tells, by run and model.
        pairs: every model with every run on it.
        predictions: folder with ``<model>/<run>.parquet``.
    """
    for model, runs in itertools.groupby(sorted(pairs), key=lambda pair: pair[0]):
        names = [name for _, name in runs]
        candidates = {
            name: candidate(entries[f"{model}/{name}"], records[name][model]) for name in names
        }
        for name in names:
            entry = entries[f"{model}/{name}"]
            entry |= UNKNOWN
            control = strongest(name, candidates) if candidates[name].trains else None
            if control == CONTROL:
                ends = {f"over_control{end}": entry[f"gain{end}"] for end in ("", "_low", "_high")}
                entry |= {"control": control, **ends}
            elif control:
                files = (predictions / model / f"{of}.parquet" for of in (name, control))
                entry |= over_control(*map(read_predictions, files), control)


class Candidate(NamedTuple):
    """A run on one model, as far as choosing a control needs it.

    Attributes:
        trains: whether it takes steps.
        protocol: ``episodic`` or ``online``; controls have the run's own.
        milliseconds: median time per image.
        lead: its score in tuning above the network as it is; None: it was not tuned.
    """

    trains: bool
    protocol: str
    milliseconds: float
    lead: float | None


def candidate(entry: Mapping[str, Any], record: Mapping[str, Any]) -> Candidate:
    """Read a candidate from a run's entry in metrics.json and from what `adapt` tells of it."""
    tuning, settings = record.get("tuning") or {}, record.get("settings") or {}
    return Candidate(
        is_known(entry["training_gain"]),
        settings.get("protocol", "episodic"),
        entry["milliseconds_p50"],
        tuning.get("lead") if tuning.get("tuned") else None,
    )


def strongest(run: str, candidates: Mapping[str, Candidate]) -> str | None:
    """Choose the control of a run that trains.

    Args:
        run: its name.
        candidates: all runs on its model, by name.

    Returns:
        of the runs without training that take no more time the one that tuning scored highest;
        `CONTROL`, the network as it is, where none scored above it; None where no score is known.
    """
    own = candidates[run]
    leads = {
        name: other.lead
        for name, other in candidates.items()
        if name != CONTROL
        and not other.trains
        and other.protocol == own.protocol
        and other.milliseconds <= own.milliseconds
    }
    known = {name: lead for name, lead in leads.items() if is_known(lead)}
    if not known:
        return None if leads else CONTROL
    best = max(known, key=known.__getitem__)
    return best if known[best] > 0 else CONTROL


def over_control(predictions: "pd.DataFrame", control: "pd.DataFrame", name: str) -> dict[str, Any]:
    """Compare a run with its control on the same shifted images of the same networks.

    Args:
        predictions: of the run, see `tttlab.evaluation.predictions`.
        control: of the control.
        name: of the control.

    Returns:
        the keys of `UNKNOWN`: difference of the accuracies and its 95 % interval, fractions; None
        where there are no labels.
    """
    shifted = (table[table["shift"] != "clean"] for table in (predictions, control))
    table = compare(beside(*shifted, "adapted_prediction").assign(all=0), ["all"])
    (row,) = table[["gain", "gain_low", "gain_high"]].to_dict("records")
    values = {key: float(value) if is_known(value) else None for key, value in row.items()}
    return {"control": name} | {
        key.replace("gain", "over_control"): value for key, value in values.items()
    }


def beside(predictions: "pd.DataFrame", other: "pd.DataFrame", column: str) -> "pd.DataFrame":
    """Put another table's predictions in the place of the source's, on the same rows.

    So `compare` compares the two tables as it compares adapted with source.

    Args:
        predictions: whose rows stay.
        other: has the same images, shifts and seeds.
        column: its predictions that are compared with.

    Raises:
        UserError: it has others.
    """
    keys = ["image_id", "shift", "seed"]
    before = other[[*keys, column]].rename(columns={column: "before"})
    merged = predictions.merge(before, on=keys, validate="one_to_one")
    if not len(merged) == len(predictions) == len(other):
        raise UserError(
            "expected two tables of the same images, shifts and seeds, "
            f"found {len(merged)} rows in both, of {len(predictions)} and {len(other)}; "
            "run `make repro`"
        )
    return merged.assign(source_prediction=merged.pop("before"))
