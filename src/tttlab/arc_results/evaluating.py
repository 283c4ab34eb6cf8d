"""The work of the stage evaluate: scores, summaries and comparisons of all runs."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tttlab.arc.results import read_answers, read_costs, read_votes
from tttlab.arc_results.scores import compare, curve, last, score
from tttlab.evaluation.results import CONTROL, is_known

FULL = "all"  # the run that trains every weight: what the others are measured by
_ENDS = [(measure, end) for measure in ("pass1", "pass2") for end in ("", "_low", "_high")]


def evaluate(outputs: Path, runs: Sequence[str]) -> dict[str, Any]:
    """Write ``metrics.json`` and ``tables/{scores,curve,comparisons}.csv``.

    Args:
        outputs: the folder of outputs, with what `prepare` and `adapt` left.
        runs: their names, in order.

    Returns:
        what stands in ``metrics.json``: ``runs`` (by run), ``comparisons`` (by run, reference and
        measure, from `scores.compare`) and ``votes_over_one_view`` (by run).

    Raises:
        UserError: a file is missing, or has other questions than there are answers.
    """
    answers = read_answers(outputs)
    scores = {run: score(read_votes(outputs, run), answers) for run in runs}
    curves = {run: curve(scores[run], read_costs(outputs, run)) for run in runs}
    final = {run: last(table) for run, table in scores.items()}
    comparisons = pd.DataFrame(compare_runs(final))
    voting = {run: compare(table["pass1"], table["one_view"]) for run, table in final.items()}

    nested: dict[str, Any] = {}
    for row in comparisons.to_dict("records"):
        names = [row.pop(name) for name in ("with", "without", "measure")]
        nested.setdefault(names[0], {}).setdefault(names[1], {})[names[2]] = row
    metrics = _known(
        {
            "runs": {run: summary(table) for run, table in curves.items()},
            "comparisons": nested,
            "votes_over_one_view": voting,
        }
    )
    folder = outputs / "tables"
    shutil.rmtree(folder, ignore_errors=True)  # outdated tables must not stay
    folder.mkdir(parents=True)
    tables = {"scores": _by_run(scores), "curve": _by_run(curves), "comparisons": comparisons}
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    text = json.dumps(metrics, indent=2, allow_nan=False)
    (outputs / "metrics.json").write_text(text + "\n", encoding="utf-8")
    return metrics


def summary(curve: pd.DataFrame) -> dict[str, Any]:
    """Summarise a run by the last row of its curve."""
    row = curve.iloc[-1]
    counts = {name: int(row[name]) for name in ("tasks", "solved")}
    shares = {f"{measure}{end}": float(row[f"{measure}{end}"]) for measure, end in _ENDS}
    return {
        **counts,
        **shares,
        "pass1_one_view": float(row["one_view"]),
        "steps": int(row["steps"]),
        "seconds_per_task": float(row["seconds_per_task"]),
        "fell_back": int(row["fell_back"]),
    }


def compare_runs(final: Mapping[str, pd.DataFrame]) -> Iterator[dict[str, Any]]:
    """Compare every run with the control, and `FULL` with every other, by pass@2 and pass@1."""
    for run, other in pairs(list(final)):
        for measure in ("pass2", "pass1"):
            outcome = compare(final[run][measure], final[other][measure])
            yield {"with": run, "without": other, "measure": measure, **outcome}


def pairs(runs: Sequence[str]) -> list[tuple[str, str]]:
    """List which run is compared with which other."""
    control = [(run, CONTROL) for run in runs if CONTROL in runs and run != CONTROL]
    others = [(FULL, run) for run in runs if FULL in runs and run not in (CONTROL, FULL)]
    return control + others


def _by_run(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Put the runs' tables below each other, with the run's name in front."""
    return pd.concat(tables, names=["run"]).reset_index("run").reset_index(drop=True)


def _known(values: Any) -> Any:
    """Replace NaN, which JSON does not have, by None, also in nested mappings."""
    if isinstance(values, dict):
        return {name: _known(value) for name, value in values.items()}
    return values if is_known(values) else None
