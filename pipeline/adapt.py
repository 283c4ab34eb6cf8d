"""Adapt every model to the shifted test images, each on its own or along streams, by one run of params.yaml."""

import json

from tttlab.config.params import Params
from tttlab.workflow import command, places


def run(params: Params, name: str) -> None:
    """Write outputs/adapted/<run>/<model>.parquet (and .steps.parquet) for every model, and outputs/adapt/<run>.json."""
    from tttlab.workflow.processes import open_processes, shared_work
    from tttlab.workflow.sweeps import open_sweeps

    fabric = open_processes(params)
    sets = ("data/test", "data/labeled_validation", "data/shifted")
    chosen = (f"tuned/{name}.json", f"methods/{name}.json")
    inputs = [places.OUTPUTS / folder for folder in ("finetuned", "source_stats", *sets, *chosen)]
    sections = {"seed": True, "seeds": True, "source_stats": True, "shifts": True,
                "adapt": {"protocol": True, "online": True, "augment": True, "curve": True, "runs": {name}}}  # fmt: skip
    settings = params.model_dump(mode="json", include=sections)
    sweeps = open_sweeps(params, name, fabric)
    with shared_work(fabric, f"adapt {name}", settings, inputs) as work:
        about = {model: adapt_model(params, name, model, own, work) for model, own in sweeps.items()}
        if fabric.is_global_zero:  # the first process writes
            (places.OUTPUTS / "adapt").mkdir(parents=True, exist_ok=True)
            (places.OUTPUTS / "adapt" / f"{name}.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def adapt_model(params: Params, name: str, model: str, sweeps: list, work) -> dict:
    """Adapt the networks of one model, one per training seed; return what the report tells about them."""
    import pandas as pd

    from tttlab.workflow.curves import adapt_along_steps

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
    return entries[0] | {"losses": losses, "milliseconds_p50": float(table["milliseconds"].median())}


def adapt_network(params: Params, sweep, work) -> tuple | None:
    """Adapt one network, with its own run in MLflow; the first process returns predictions and what is told about them."""
    from tttlab.evaluation.predictions import score
    from tttlab.runtime import devices
    from tttlab.tracking.comparison import log_predictions
    from tttlab.tracking.runs import start_run
    from tttlab.workflow.execution import parent_run

    if not sweep.fabric.is_global_zero:
        return sweep.adapt(work)
    seed = f" · seed {sweep.seed}" if len(params.seeds) > 1 else ""
    with start_run(places.ROOT, stage="adapt", name=f"adapt {sweep.name} · {sweep.model}{seed}",
                            params=sweep.told, tags=sweep.tags,
                            parent=parent_run(params),
                            resume_key=f"{work.id} {sweep.prefix}") as tracked:  # fmt: skip
        tracked.log_input("test", sweep.images.source, sweep.images.digest(), len(sweep.images), "test")
        devices.forget_peak(sweep.source.device)
        table, losses = sweep.adapt(work)
        log_predictions(tracked, score(table))
        memory, curve = devices.peak_memory(sweep.source.device), losses.tolist() if len(losses) > 1 else []
        tracked.log_series("loss/mean", curve)
        tracked.log_metrics({"cost/peak_memory_mb": memory})
        kept = work.folder / f"{sweep.prefix}.parquet"
        table.to_parquet(kept, index=False)
        tracked.log_artifact(kept)
    return table, {"mlflow_run_id": tracked.id, "losses": curve, "settings": sweep.told, "tuning": sweep.tuned,
                   "peak_memory_mb": memory}  # fmt: skip


if __name__ == "__main__":
    command.main(run, __doc__, "run")
