"""What MLflow shows of predictions, of a tuning's trials, and of the whole comparison."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tttlab.tracking.records import create_run, flatten, legal_name, log_params, log_points
from tttlab.tracking.runs import Run
from tttlab.tracking.store import find_runs, open_store, table_view

if TYPE_CHECKING:
    import pandas as pd


def log_predictions(run: Run, scored: "pd.DataFrame") -> None:
    """Log what one run did to one network: accuracies, gains and cost.

    The accuracy of every corruption is a curve along the severities; without any label of it, the
    share of predictions that changed is.

    Args:
        run: The adapt stage's run.
        scored: From `tttlab.evaluation.predictions.add_correctness`; unknown values are left out.
    """
    is_clean = scored["shift"] == "clean"
    clean, shifted = scored[is_clean].mean(numeric_only=True), scored[~is_clean]
    curves = {"accuracy": "accuracy_adapted", "accuracy_source": "accuracy_source"}
    means = shifted.groupby(["corruption", "severity"])[[*curves.values(), "changed"]].mean()
    labeled = means["accuracy_source"].notna().groupby("corruption").any()
    points = [
        (f"{name}/{corruption}", row[column], int(severity))
        for (corruption, severity), row in means.iterrows()
        for name, column in (curves if labeled[corruption] else {"changed": "changed"}).items()
    ]
    overall, milliseconds = shifted.mean(numeric_only=True), shifted["milliseconds"]
    totals = {
        "accuracy/mean": overall["accuracy_adapted"],
        "accuracy_source/mean": overall["accuracy_source"],
        "changed/mean": overall["changed"],
        "gain/mean": overall["gain"],
        "gain/training": overall["training_gain"],
        "clean/source": clean["accuracy_source"],
        "clean/adapted": clean["accuracy_adapted"],
        "gate/gain": overall["gated_gain"],
        "gate/clean_adapted": clean["accuracy_gated"],
    }
    if overall["gate_milliseconds"] > 0:
        totals |= {"gate/open": overall["open"], "gate/clean_open": clean["open"]}
    totals |= {f"cost/milliseconds_p{p}": milliseconds.quantile(p / 100) for p in (50, 95)}
    totals |= {"fell_back": shifted["fell_back"].sum()}
    points += [(name, value, 0) for name, value in totals.items()]
    # Rounded, because MLflow's tables show all digits. The predictions file is exact.
    run.log_points([(name, round(value, 4), step) for name, value, step in points])


def log_trials(
    parent: Run,
    trials: Sequence[tuple[Mapping[str, Any], Mapping[int, Mapping[str, float]]]],
    tags: Mapping[str, Any],
) -> None:
    """Log every trial of a tuning as a run below it, so that MLflow can compare them.

    Args:
        parent: The tuning's run.
        trials: From best to worst: the trial's settings, and its results by the number of images
            that gave them.
        tags: Of the trials, such as model, method, run.
    """
    client = parent.client
    experiment = client.get_run(parent.id).info.experiment_id
    below = {"mlflow.parentRunId": parent.id}
    # A tuning that was killed after logging has left its trials.
    for trial in find_runs(client, experiment, below):
        client.delete_run(trial.info.run_id)
    for rank, (settings, results) in enumerate(trials, 1):
        name = f"trial {rank} · {', '.join(f'{key} {value}' for key, value in settings.items())}"
        run_id = create_run(client, experiment, name, {"stage": "trial", **tags, **below})
        log_params(client, run_id, settings)
        points = [("rank", rank, 0)]
        for images, values in results.items():
            points += [(key, round(value, 4), images) for key, value in values.items()]
        log_points(client, run_id, points)
        client.set_terminated(run_id)


def log_comparison(
    root: Path,
    parent: str,
    *,
    table: "pd.DataFrame",
    description: str,
    figures: Mapping[str, Path],
    metrics: Mapping[str, float],
    settings: Mapping[str, Any],
    page: Path,
) -> None:
    """Log the comparison to the pipeline's run and close the run.

    Args:
        root: Folder of ``mlflow.db``.
        parent: Id of the pipeline's run.
        table: A row per model and run.
        description: The comparison in Markdown, for the run's page.
        figures: Picture files by name.
        metrics: Values by name, such as ``gain/<model>/<run>``.
        settings: As nested in params.yaml, for comparing executions; those logged before stay.
        page: The HTML report.
    """
    client, experiment = open_store(root)
    run = Run(parent, resumed=True, root=root)
    run.log_table(table, "comparison.json")
    for path in figures.values():
        run.log_artifact(path, "figures")
    run.log_artifact(page)
    run.log_metrics({name: round(value, 4) for name, value in metrics.items() if value is not None})
    logged, flat = client.get_run(parent).data.params, flatten(settings)
    new = {name: value for name, value in flat.items() if legal_name(name) not in logged}
    log_params(client, parent, new)
    run.set_tags({"mlflow.note.content": description})
    gains = [legal_name(name) for name in metrics if name.startswith("gain/")]
    view = json.dumps(table_view("pipeline", gains))
    client.set_experiment_tag(experiment, "mlflow.sharedViewState.executions", view)
    client.set_terminated(parent, "FINISHED")
