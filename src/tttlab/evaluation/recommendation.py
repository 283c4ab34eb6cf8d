"""Which run tuning recommends: its scores on source images decide, and no test image has a say."""

from collections.abc import Mapping
from typing import Any

from tttlab.evaluation.results import CONTROL, is_known


def lead(tuning: Mapping[str, Any]) -> float | None:
    """Give the score of a tuned run above that of the network as it is, on source images.

    It is the gain under held-out corruptions, less what is lost on clean images; None: unknown.
    """
    return tuning.get("lead") if tuning.get("tuned") else None


def best_tuned(tunings: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Choose the run that tuning scored highest; None: none was tuned. No test image has a say.

    Args:
        tunings: run for single images → what tuning chose for it.
    """
    leads = {run: lead(tuning) for run, tuning in tunings.items()}
    known = {run: value for run, value in leads.items() if is_known(value)}
    return max(known, key=known.__getitem__) if known else None


def worth_running(tunings: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Choose the run that tuning recommends; None: the network as it is. No test image has a say.

    It is the run that scored highest. Training costs several times more, so a run that trains must
    lead those that do not, and the network as it is, by more than the standard error of its score:
    the one-standard-error rule (Breiman, Friedman, Olshen and Stone 1984, section 3.4.3).

    Args:
        tunings: run for single images → what tuning chose for it.
    """
    ahead = {run: tuning for run, tuning in tunings.items() if (lead(tuning) or 0) > 0}
    still = {run: tuning for run, tuning in ahead.items() if not tuning["settings"].get("steps")}
    best, control = best_tuned(ahead), best_tuned(still)
    if best == control:
        return best
    above = lead(ahead[best]) - (lead(ahead[control]) if control else 0.0)
    return best if above > ahead[best]["lead_error"] + 1e-9 else control


def recommend(records: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Choose the run for single images that is worth running; None: the network as it is.

    Args:
        records: what `adapt` tells of every run on one model.
    """
    settings = {run: record.get("settings") or {} for run, record in records.items()}
    return worth_running(
        {
            run: record.get("tuning") or {}
            for run, record in records.items()
            if run != CONTROL and settings[run].get("protocol") != "online"
        }
    )
