"""Adapt every model to every shifted test image on its own, by one run of params.yaml."""

import json

import pipeline
from tttlab.params import Params


def run(params: Params, name: str) -> None:
    """Write outputs/adapted/<run>/<model>.parquet for every model, and outputs/adapt/<run>.json."""
    from pipeline.loading import load_run
    from tttlab.data import ImageSet, balanced_subset
    from tttlab.resuming import Work, work_key

    test = ImageSet.load(pipeline.OUTPUTS / "data" / "test")
    chosen = balanced_subset(test.image_ids, test.labels, params.shifts.images, params.seed, "shifts")
    inputs = [pipeline.OUTPUTS / folder for folder in ("finetuned", "source_stats", "data/test")]
    sections = {"seed": True, "shifts": True, "adapt": {"protocol": True, "augment": True, "runs": {name}}}
    key = work_key(f"adapt {name}", params.model_dump(mode="json", include=sections), inputs)
    ready = {model: load_run(params, name, model) for model in params.models}  # every mistake shows before any work
    with Work(pipeline.ROOT / ".resume" / key) as work:
        about = {model: adapt_model(params, name, model, ready[model], test.take(chosen), work) for model in ready}
    target = pipeline.OUTPUTS / "adapt" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def adapt_model(params: Params, name: str, model: str, ready: tuple, images, work) -> dict:
    """Adapt one model, with its own run in MLflow; return what the report tells about it."""
    from tqdm import tqdm

    from pipeline.execution import execution
    from tttlab import devices, sweep, tracking
    from tttlab.shifts import list_shifts

    device, network, checkpoint, method, loop, statistics = ready
    chosen = params.run_settings(name, model)
    shifts = list_shifts(params.shifts.corruptions, params.shifts.severities)
    settings = {"run": name, "method": repr(method), **chosen.adapter.model_dump(), "seed": params.seed}
    tags = {"model": model, "method": chosen.method, "run": name, "protocol": params.adapt.protocol,
            "source_run_id": checkpoint.get("mlflow_run_id")}  # fmt: skip
    with (
        tracking.start_run(pipeline.ROOT, stage="adapt", name=f"adapt {name} · {model}", params=settings, tags=tags,
                           parent=tracking.pipeline_run(pipeline.ROOT, execution(params)),
                           resume_key=f"{work.folder.name} {model}") as tracked,
        tqdm(total=len(shifts) * len(images), desc=f"{name} {model}", unit="image", mininterval=1) as bar,
    ):  # fmt: skip
        tracked.log_input("test", images.source, images.digest(), len(images), "test")
        table, losses = sweep.adapt_to_shifts(
            network, method, loop, images, shifts, statistics=statistics,
            seed=params.seed, work=work, prefix=model, images_per_step=params.machine.images_per_step, device=device,
            workers=params.machine.workers if device.type == "cpu" else 0, on_images=bar.update,
        )  # fmt: skip
        target = pipeline.OUTPUTS / "adapted" / name / f"{model}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(target, index=False)
        memory = devices.peak_memory(device)
        tracking.log_predictions(tracked, table)
        if len(losses) > 1:
            tracked.log_series("loss/mean", losses.tolist())
        tracked.log_metrics({"cost/peak_memory_mb": memory})
        tracked.log_artifact(target)
    return {"mlflow_run_id": tracked.id, "losses": losses.tolist() if len(losses) > 1 else [], "settings": settings,
            "milliseconds_p50": float(table["milliseconds"].median()), "peak_memory_mb": memory}  # fmt: skip


if __name__ == "__main__":
    pipeline.main(run, __doc__, item="run")
