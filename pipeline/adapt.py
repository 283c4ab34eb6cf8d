"""Adapt every model to every shifted test image on its own, by one run of params.yaml."""

import json

import pipeline
from tttlab.params import Params


def run(params: Params, name: str) -> None:
    """Write outputs/adapted/<run>/<model>.parquet for every model, and outputs/adapt/<run>.json."""
    from pipeline.loading import load_run
    from pipeline.processes import open_fabric, shared_work
    from tttlab.data import ImageSet, balanced_subset

    fabric = open_fabric(params)
    test = ImageSet.load(pipeline.OUTPUTS / "data" / "test")
    images = test.take(balanced_subset(test.image_ids, test.labels, params.shifts.images, params.seed, "shifts"))
    inputs = [pipeline.OUTPUTS / folder for folder in ("finetuned", "source_stats", "data/test")]
    sections = {"seed": True, "shifts": True, "adapt": {"protocol": True, "augment": True, "runs": {name}}}
    settings = params.model_dump(mode="json", include=sections)
    ready = {model: load_run(params, name, model, fabric.device) for model in params.models}  # every mistake shows first
    with shared_work(fabric, f"adapt {name}", settings, inputs) as work:
        if not fabric.is_global_zero:
            for model in ready:
                adapt_share(params, name, model, ready[model], images, work, fabric)
            return  # the first process writes
        about = {model: adapt_model(params, name, model, ready[model], images, work, fabric) for model in ready}
    target = pipeline.OUTPUTS / "adapt" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def adapt_share(params: Params, name: str, model: str, ready: tuple, images, work, fabric):
    """Adapt one model to this process's share of the shifted images; return what all found, on the first process."""
    from tqdm import tqdm

    from tttlab import sweep
    from tttlab.shifts import list_shifts

    device, network, _, method, loop, statistics = ready
    shifts = list_shifts(params.shifts.corruptions, params.shifts.severities)
    total, hidden = len(shifts) * len(images) // fabric.world_size, not fabric.is_global_zero
    with tqdm(total=total, desc=f"{name} {model}", unit="image", mininterval=1, disable=hidden) as bar:
        return sweep.adapt_to_shifts(
            network, method, loop, images, shifts, statistics=statistics, seed=params.seed, work=work, prefix=model,
            images_per_step=params.machine.images_per_step, device=device, on_images=bar.update,
            workers=params.machine.workers if device.type == "cpu" else 0,
            rank=fabric.global_rank, ranks=fabric.world_size, barrier=fabric.barrier,
        )  # fmt: skip


def adapt_model(params: Params, name: str, model: str, ready: tuple, images, work, fabric) -> dict:
    """Adapt one model, with its own run in MLflow; return what the report tells about it."""
    from pipeline.execution import execution
    from tttlab import devices, tracking

    device, _, checkpoint, method, *_ = ready
    chosen = params.run_settings(name, model)
    settings = {"run": name, "method": repr(method), **chosen.adapter.model_dump(), "seed": params.seed}
    tags = {"model": model, "method": chosen.method, "run": name, "protocol": params.adapt.protocol,
            "source_run_id": checkpoint.get("mlflow_run_id")}  # fmt: skip
    with tracking.start_run(pipeline.ROOT, stage="adapt", name=f"adapt {name} · {model}", params=settings, tags=tags,
                            parent=tracking.pipeline_run(pipeline.ROOT, execution(params)),
                            resume_key=f"{work.folder.name} {model}") as tracked:  # fmt: skip
        tracked.log_input("test", images.source, images.digest(), len(images), "test")
        table, losses = adapt_share(params, name, model, ready, images, work, fabric)
        target = pipeline.OUTPUTS / "adapted" / name / f"{model}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(target, index=False)
        tracking.log_predictions(tracked, table)
        memory, curve = devices.peak_memory(device), losses.tolist() if len(losses) > 1 else []
        tracked.log_series("loss/mean", curve)
        tracked.log_metrics({"cost/peak_memory_mb": memory})
        tracked.log_artifact(target)
    return {"mlflow_run_id": tracked.id, "losses": curve, "settings": settings,
            "milliseconds_p50": float(table["milliseconds"].median()), "peak_memory_mb": memory}  # fmt: skip


if __name__ == "__main__":
    pipeline.main(run, __doc__, item="run")
