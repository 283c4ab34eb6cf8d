"""Logging of the comparison to the MLflow run of this execution of the pipeline."""

from pathlib import Path

import pandas as pd

from tttlab.config.params import Params
from tttlab.evaluation import metrics
from tttlab.evaluation.results import Results
from tttlab.reporting import report
from tttlab.tracking.comparison import log_comparison
from tttlab.tracking.runs import run_link
from tttlab.workflow import places
from tttlab.workflow.execution import parent_run


def log_report(params: Params, results: Results, files: dict[str, Path], page: Path) -> None:
    """Log the comparison to the execution's MLflow run, the parent of its stages' runs."""
    parent = parent_run(params)
    links = {
        key: run_link(places.ROOT, entry.get("mlflow_run_id"))
        for key, entry in results.adapted.items()
    }
    flat = {key: metrics.flatten(entry) for key, entry in results.summary.items()}
    names = (
        "gain",
        "training_gain",
        "gated_gain",
        "accuracy_adapted",
        "clean_adapted",
        "milliseconds_p50",
    )
    values = {
        f"{name}/{model}/{run}": entry[name]
        for (model, run), entry in flat.items()
        for name in names
    }
    rows = [{"model": model, "run": run, **entry} for (model, run), entry in flat.items()]
    log_comparison(
        places.ROOT,
        parent,
        table=pd.DataFrame(rows),
        description=report.markdown(results, links),
        figures=files,
        metrics=values,
        settings=params.model_dump(mode="json", exclude={"machine"}),
        page=page,
    )
