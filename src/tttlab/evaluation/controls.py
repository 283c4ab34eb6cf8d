"""What a run that trains gives above the strongest control: a run without training, no dearer.

*By training* compares a run with itself before its first step. Who has to choose asks another
question: would the same milliseconds give more without training? The control is chosen by its score
in tuning, on source images, as every setting is: test labels have no say.
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tttlab.evaluation.intervals import gain_interval
from tttlab.evaluation.predictions import add_correctness, read_predictions
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
        without labels.
    """
    keys = ["image_id", "shift", "seed"]
    pair = [
        add_correctness(table[table["shift"] != "clean"]).set_index(keys)["accuracy_adapted"]
        for table in (predictions, control)
    ]
    differences = (pair[0] - pair[1]).dropna()
    if not len(differences):
        return UNKNOWN | {"control": name}
    images, seeds = (
        differences.index.get_level_values(key).to_numpy() for key in (keys[0], "seed")
    )
    values = differences.to_numpy()
    ((low, high),) = gain_interval(values, images, seeds, 0 * seeds, num_groups=1)
    low, high = (float(end) if is_known(end) else None for end in (low, high))
    return {
        "control": name,
        "over_control": float(values.mean()),
        "over_control_low": low,
        "over_control_high": high,
    }
