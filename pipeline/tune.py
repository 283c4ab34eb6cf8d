"""Choose one run's settings on labeled source images under corruptions that are never tested on."""

import json
from typing import Any

import pipeline
from tttlab.params import Params


def run(params: Params, name: str) -> None:
    """Write outputs/tuned/<run>.json: for every model the settings that `adapt` takes, the gate, and the runners-up."""
    found = {}
    for model in params.models:
        chosen = params.run_settings(name, model)
        fixed = {"tuned": False, "settings": chosen.values(), "default": chosen.values(), "candidates": [], "gate": None}
        found[model] = tune_model(params, name, model) if params.tune.enabled and chosen.search else fixed
    target = pipeline.OUTPUTS / "tuned" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def tune_model(params: Params, name: str, model: str) -> dict[str, Any]:
    """Tune one run on one model, on the network of the first training seed; every trial is a run in MLflow."""
    from tqdm import tqdm

    from pipeline.execution import execution
    from pipeline.loading import build_run, load_source
    from tttlab import tracking, tuning
    from tttlab.data import ImageSet
    from tttlab.resuming import Work, work_key

    images = ImageSet.load(pipeline.OUTPUTS / "data" / "labeled_validation")
    inputs = [pipeline.OUTPUTS / folder / model / str(params.seeds[0]) for folder in ("finetuned", "source_stats")]
    own, wish = params.run_settings(name, model), params.tune
    sections = {"seed": True, "tune": True, "source_stats": True, "adapt": {"protocol": True, "augment": True, "runs": {name}}}
    settings = params.model_dump(mode="json", include=sections)
    source = load_source(params, model, params.seeds[0])
    candidates, steps = tuning.list_candidates(own.search, own.values(), wish.candidates, params.seed, name, model)

    def build(values: dict[str, Any]) -> tuple:
        return build_run(params, name, model, source, values | ({"steps": steps[-1]} if own.trains else {}))[1:]

    for values in candidates:  # every mistake shows first
        build(values)
    key = work_key(f"tune {name} {model}", settings, [*inputs, pipeline.OUTPUTS / "data" / "labeled_validation"])
    total = tuning.pairs_to_judge(len(candidates), len(images), wish.images, wish.severities, wish.keep)
    with Work(pipeline.ROOT / ".resume" / key) as work, tqdm(total=total, desc=f"tune {name} {model}", unit="image") as bar:
        judge = tuning.Judge(source.network, images, wish.images, wish.severities, candidates, steps, build, params.seed, work,
                             "tune", params.machine.workers if source.device.type == "cpu" else 0, source.device,
                             bar.update)  # fmt: skip
        trials = tuning.successive_halving(judge, len(candidates), len(wish.images), wish.keep, wish.clean_penalty)
        found = tuning.choose(trials, candidates, steps, own.trains, wish.clean_penalty, wish.gate)
        tags = {"model": model, "method": own.method, "run": name, "source_run_id": source.about.get("mlflow_run_id")}
        parent = tracking.pipeline_run(pipeline.ROOT, execution(params))
        with tracking.start_run(pipeline.ROOT, stage="tune", name=f"tune {name} · {model}", params=settings["tune"], tags=tags,
                                parent=parent, resume_key=key) as tracked:  # fmt: skip
            tracked.log_input("labeled_validation", images.source, images.digest(), len(images), "validation")
            tracking.log_trials(tracked, tuning.describe(trials, candidates, steps, own.trains, wish.clean_penalty), tags)
            tracked.log_metrics(found["score"])
    print(f"{name} {model}: {found['settings']}, gate {found['gate']}")
    return found | {"default": own.values()}


if __name__ == "__main__":
    pipeline.main(run, __doc__, "run")
