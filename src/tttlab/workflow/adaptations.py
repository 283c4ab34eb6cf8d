"""Adapting the networks of one model, each with its own run in MLflow, and what is written of it."""

from typing import Any

import pandas as pd

from tttlab.config.params import Params
from tttlab.evaluation.predictions import score
from tttlab.runtime import devices
from tttlab.runtime.resuming import Work
from tttlab.tracking.comparison import log_predictions
from tttlab.tracking.runs import start_run
from tttlab.workflow import places
from tttlab.workflow.curves import adapt_along_steps
from tttlab.workflow.execution import parent_run
from tttlab.workflow.sweeps import Sweep


def adapt_model(
    params: Params, name: str, model: str, sweeps: list[Sweep], work: Work
) -> dict[str, Any]:
    """Adapt the networks of one model, one per training seed; return what the report tells about them."""
    found = [adapt_network(params, sweep, work) for sweep in sweeps]
    steps = adapt_along_steps(sweeps[0], work)
    if found[0] is None:
        return {}
    tables, entries = zip(*found, strict=True)
    folder = places.OUTPUTS / "adapted" / name
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.concat(tables, ignore_index=True)
    table.to_parquet(folder / f"{model}.parquet", index=False)
    if steps is not None:
        steps.to_parquet(folder / f"{model}.steps.parquet", index=False)
    losses = pd.DataFrame([entry["losses"] for entry in entries]).mean().tolist()
    return entries[0] | {
        "losses": losses,
        "milliseconds_p50": float(table["milliseconds"].median()),
    }


def adapt_network(
    params: Params, sweep: Sweep, work: Work
) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """Adapt one network, with its own run in MLflow; the first process returns predictions and what is told about them."""
    if not sweep.fabric.is_global_zero:
        return sweep.adapt(work)
    seed = f" · seed {sweep.seed}" if len(params.seeds) > 1 else ""
    with start_run(
        places.ROOT,
        stage="adapt",
        name=f"adapt {sweep.name} · {sweep.model}{seed}",
        params=sweep.told,
        tags=sweep.tags,
        parent=parent_run(params),
        resume_key=f"{work.id} {sweep.prefix}",
    ) as tracked:
        tracked.log_input(
            "test", sweep.images.source, sweep.images.digest(), len(sweep.images), "test"
        )
        devices.forget_peak(sweep.source.device)
        table, losses = sweep.adapt(work)
        log_predictions(tracked, score(table))
        memory, curve = (
            devices.peak_memory(sweep.source.device),
            losses.tolist() if len(losses) > 1 else [],
        )
        tracked.log_series("loss/mean", curve)
        tracked.log_metrics({"cost/peak_memory_mb": memory})
        kept = work.folder / f"{sweep.prefix}.parquet"
        table.to_parquet(kept, index=False)
        tracked.log_artifact(kept)
    return table, {
        "mlflow_run_id": tracked.id,
        "losses": curve,
        "settings": sweep.told,
        "tuning": sweep.tuned,
        "peak_memory_mb": memory,
    }
