"""The headline table: what a run did to a model, as text."""

from collections.abc import Mapping
from typing import Any

from tttlab.evaluation.metrics import verdict
from tttlab.evaluation.results import Results, difference
from tttlab.reporting.words import amount, interval, percent, points


def rows(results: Results) -> list[dict[str, Any]]:
    """Write the headline table, a row per model and run, all values as text.

    The value of ``gated`` is the run with its gate, from `gated_outcome`.
    """
    table = []
    for (model, run), entry in results.summary.items():
        training_ends = entry.get("training_gain_low"), entry.get("training_gain_high")
        control_ends = entry.get("over_control_low"), entry.get("over_control_high")
        table.append(
            {
                "model": model,
                "run": run,
                "source": percent(entry["accuracy_source"]),
                **_outcome(entry, entry["clean_source"]),
                "training": points(entry.get("training_gain")),
                "training_interval": interval(*training_ends),
                "training_verdict": verdict(*training_ends),
                "control": entry.get("control") or "",
                "over_control": points(entry.get("over_control")),
                "over_control_interval": interval(*control_ends),
                "over_control_verdict": verdict(*control_ends),
                "seed_sd": percent(entry.get("gain_seed_sd")),
                "changed": percent(results.changed(model, run)),
                "milliseconds_p50": amount(entry["milliseconds_p50"]),
                "milliseconds_p95": amount(entry["milliseconds_p95"]),
                "memory": amount(results.adapted.get((model, run), {}).get("peak_memory_mb")),
                "fell_back": f"{entry['fell_back']:,}",
                "gated": gated_outcome(entry),
            }
        )
    return table


def gated_outcome(entry: Mapping[str, Any]) -> dict[str, str] | None:
    """Write what a run with its gate did, from its entry in metrics.json; None without a gate."""
    gated = entry.get("gated")
    if not gated:
        return None
    return {
        **_outcome(gated, entry["clean_source"]),
        "open": percent(gated["open"]),
        "clean_open": percent(gated["clean_open"]),
        "milliseconds": amount(gated["milliseconds"]),
    }


def _outcome(entry: Mapping[str, Any], clean_source: float | None) -> dict[str, str]:
    ends = entry["gain_low"], entry["gain_high"]
    return {
        "adapted": percent(entry["accuracy_adapted"]),
        "gain": points(entry["gain"]),
        "interval": interval(*ends),
        "verdict": verdict(*ends),
        "clean": points(difference(entry["clean_adapted"], clean_source)),
    }
