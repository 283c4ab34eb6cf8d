"""What MLflow shows of predictions, of a tuning's trials, and of all runs side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
from tttlab.tracking.records import create_run, flatten, legal_name, log_params, log_points
from tttlab.tracking.runs import Run
from tttlab.tracking.store import find_runs, open_store, table_view


def log_predictions(run: Run, scored: "pd.DataFrame") -> None:
    """Log what one run did to one network: accuracy per corruption along the severities, gains, clean accuracy, cost.

    Args:
        run: The adapt stage's run.
        scored: From `tttlab.evaluation.predictions.score`; what is unknown there is left out.
    """
    clean, shifted = (
        scored[scored["shift"] == "clean"].mean(numeric_only=True),
        scored[scored["shift"] != "clean"],
    )
    curves = {"accuracy": "accuracy_adapted", "accuracy_source": "accuracy_source"}
    if shifted["accuracy_source"].isna().all():
        curves = {"changed": "changed"}
    means = shifted.groupby(["corruption", "severity"])[[*curves.values()]].mean()
    points = [
        (f"{name}/{key[0]}", row[column], int(key[1]))
        for key, row in means.iterrows()
        for name, column in curves.items()
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
    # MLflow's tables show every digit there is, so a few are enough; the predictions file is exact.
    log_points(run._client, run.id, [(name, round(value, 4), step) for name, value, step in points])


def log_trials(
    parent: Run,
    trials: Sequence[tuple[Mapping[str, Any], Mapping[int, Mapping[str, float]]]],
    tags: Mapping[str, Any],
) -> None:
    """Log every trial of a tuning as a run below it, which MLflow can then draw side by side.

    Args:
        parent: The tuning's run.
        trials: From best to worst, per trial its settings, and its results by the number of images that gave them.
        tags: Of the trials, such as model, method, run.
    """
    client = parent._client
    experiment = client.get_run(parent.id).info.experiment_id
    for trial in find_runs(
        client, experiment, {"mlflow.parentRunId": parent.id}
    ):  # of a tuning that was killed after them
        client.delete_run(trial.info.run_id)
    for rank, (values, results) in enumerate(trials, 1):
        name = f"trial {rank} · {', '.join(f'{key} {value}' for key, value in values.items())}"
        run = create_run(
            client, experiment, name, {"stage": "trial", **tags, "mlflow.parentRunId": parent.id}
        )
        log_params(client, run, values)
        points = [
            (key, round(value, 4), step)
            for step, found in results.items()
            for key, value in found.items()
        ]
        log_points(client, run, [("rank", rank, 0), *points])
        client.set_terminated(run)


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
    """Put the comparison on the pipeline's run and close it.

    Args:
        root: Folder of ``mlflow.db``.
        parent: Id of the pipeline's run.
        table: A row per model and run.
        description: The comparison in Markdown, which the run's page shows.
        figures: Picture files by name.
        metrics: Values by name, such as ``gain/<model>/<run>``.
        settings: What made them, nested as in params.yaml, for comparing executions; the first ones logged stay.
        page: The HTML report.
    """
    client, experiment = open_store(root)
    run = Run(parent, resumed=True, _client=client)
    run.log_table(table, "comparison.json")
    for path in figures.values():
        run.log_artifact(path, "figures")
    run.log_artifact(page)
    run.log_metrics({name: round(value, 4) for name, value in metrics.items() if value is not None})
    logged = client.get_run(parent).data.params
    log_params(
        client,
        parent,
        {
            name: value
            for name, value in flatten(settings).items()
            if legal_name(name) not in logged
        },
    )
    run.set_tags({"mlflow.note.content": description})
    gains = [legal_name(name) for name in metrics if name.startswith("gain/")]
    client.set_experiment_tag(
        experiment, "mlflow.sharedViewState.executions", json.dumps(table_view("pipeline", gains))
    )
    client.set_terminated(parent, "FINISHED")
