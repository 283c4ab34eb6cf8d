"""Comparison and report of the runs as stages, with MLflow."""

import pandas as pd

from tttlab.arc.results import read_about, read_json
from tttlab.arc.settings import Settings
from tttlab.arc_results.evaluating import evaluate
from tttlab.arc_results.report import write_report
from tttlab.tracking.records import log_points
from tttlab.tracking.store import open_store
from tttlab.workflow import places
from tttlab.workflow.execution import parent_run


def evaluate_runs(settings: Settings) -> None:
    """Write ``metrics.json`` and the tables, and print how many tasks each run solves."""
    metrics = evaluate(places.OUTPUTS, list(settings.adapt.runs))
    for name, run in metrics["runs"].items():
        print(
            f"{name}: {run['solved']} of {run['tasks']} solved, "
            f"{run['seconds_per_task']:.1f} s per task"
        )


def report_runs(settings: Settings) -> None:
    """Write ``report.html``, and log it and the scores to MLflow."""
    page = write_report(places.OUTPUTS)
    metrics = read_json(places.OUTPUTS / "metrics.json", "evaluate")["runs"]
    about = read_about(places.OUTPUTS, list(metrics))
    curve = pd.read_csv(places.OUTPUTS / "tables" / "curve.csv")
    client, _ = open_store(places.ROOT)
    parent = parent_run(settings)
    for name, run in metrics.items():
        scores = [(f"tasks/{key}", run[key], 0) for key in ("solved", "pass1_one_view")]
        for row in curve[curve["run"] == name].to_dict("records"):
            scores += [(f"tasks/{key}", row[key], row["steps"]) for key in ("pass1", "pass2")]
        log_points(client, about[name]["mlflow_run_id"], scores)
        log_points(client, parent, [(f"arc solved/{name}", run["solved"], 0)])
    client.log_artifact(parent, str(page), "arc")
    print(f"report: {page}")
