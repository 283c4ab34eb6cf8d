"""Choose one run's settings on labeled source images under corruptions that are never tested on."""

import json
from contextlib import nullcontext
from typing import Any

from tttlab.config.params import Params
from tttlab.workflow import command, places


def run(params: Params, name: str) -> None:
    """Write outputs/tuned/<run>.json: for every model the settings that `adapt` takes, the gate, and the runners-up."""
    chosen = {model: params.run_settings(name, model) for model in params.models_of(name)}
    found = {model: {"tuned": False, "settings": own.values(), "default": own.values(), "candidates": [], "gate": None}
             for model, own in chosen.items()}  # fmt: skip
    searched = [model for model, own in chosen.items() if params.tune.enabled and own.search]
    target = places.OUTPUTS / "tuned" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_tuning(params, name, searched) if searched else nullcontext() as work:
        found |= {model: tune_model(params, name, model, work) for model in searched}
        target.with_suffix(".partial").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        target.with_suffix(".partial").replace(target)


def open_tuning(params: Params, name: str, models: list[str]):
    """Open the work of tuning one run on several models; what is done is kept until all are, and written."""
    from tttlab.workflow.leftovers import open_work

    networks = [f"{folder}/{model}/{params.seeds[0]}" for folder in ("finetuned", "source_stats") for model in models]
    inputs = [places.OUTPUTS / folder for folder in (*networks, "data/labeled_validation", f"methods/{name}.json")]
    adapting = dict.fromkeys(("protocol", "online", "augment"), True) | {"runs": {name}}
    sections = {"seed": True, "tune": True, "source_stats": True, "adapt": adapting}
    return open_work(f"tune {name}", params.model_dump(mode="json", include=sections), inputs)


def tune_model(params: Params, name: str, model: str, work) -> dict[str, Any]:
    """Tune one run on one model, on the network of the first training seed; every trial is a run in MLflow."""
    from tqdm import tqdm

    from tttlab.data.image_sets import ImageSet
    from tttlab.experiments import trials, tuning
    from tttlab.tracking.comparison import log_trials
    from tttlab.tracking.runs import start_run
    from tttlab.workflow.execution import parent_run
    from tttlab.workflow.loading import build_run, load_source, open_stream

    images = ImageSet.load(places.OUTPUTS / "data" / "labeled_validation")
    own, wish = params.run_settings(name, model), params.tune
    source, stream = load_source(params, model, params.seeds[0]), open_stream(params, own.protocol)
    grid = tuning.list_candidates(own.search, own.values(), wish.candidates, params.seed, name, model, in_one_pass=not stream)

    def build(values: dict[str, Any]) -> tuple:
        longest = {"steps": grid.steps[-1]} if own.trains and not stream else {}
        return build_run(params, name, model, source, values | longest)[1:]

    for values in grid.candidates:  # every mistake shows first
        build(values)
    parent = parent_run(params)  # a store that cannot be used, too
    total = tuning.pairs_to_judge(len(grid.candidates), len(images), wish.images, wish.severities, wish.keep, bool(stream))
    workers, at_once = (params.machine.workers if source.device.type == "cpu" else 0), params.machine.images_per_step
    with tqdm(total=total, desc=f"tune {name} {model}", unit="image") as bar:
        judge = tuning.Judge(source.network, images, wish.images, wish.severities, *grid[:2], build, params.seed, work,
                             model, workers, source.device, bar.update, stream, at_once)  # fmt: skip
        ranked = tuning.successive_halving(judge, len(grid.candidates), len(wish.images), wish.keep, wish.clean_penalty)
    search = trials.Search(ranked, grid, own.trains and not stream, wish.clean_penalty)
    # Leaving out an image of a stream would change the others' results.
    found = search.choose(judge.saves_time if wish.gate and not stream else None)
    tags = {"model": model, "method": own.method, "run": name, "source_run_id": source.about.get("mlflow_run_id")}
    settings = wish.model_dump(mode="json") | {"search": {key: [*values] for key, values in own.search.items()}}
    with start_run(places.ROOT, stage="tune", name=f"tune {name} · {model}", params=settings, tags=tags,
                   parent=parent, resume_key=f"{work.id} {model}") as tracked:  # fmt: skip
        tracked.log_input("labeled_validation", images.source, images.digest(), len(images), "validation")
        log_trials(tracked, search.describe(), tags)
        tracked.log_metrics(search.chosen())
    print(f"{name} {model}: {found['settings']}, gate {found['gate']}")
    return found | {"default": own.values()}


if __name__ == "__main__":
    command.main(run, __doc__, "run")
