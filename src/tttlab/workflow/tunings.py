"""Tuning one run: the work that is kept of it, and the search on one model."""

from typing import Any

from tqdm import tqdm

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.experiments import trials, tuning
from tttlab.runtime.resuming import Work
from tttlab.tracking.comparison import log_trials
from tttlab.tracking.runs import start_run
from tttlab.workflow import places
from tttlab.workflow.execution import parent_run
from tttlab.workflow.leftovers import open_work
from tttlab.workflow.loading import build_run, load_source, open_stream


def open_tuning(params: Params, name: str, models: list[str]) -> Work:
    """Open the work of tuning one run on several models; what is done is kept until all are, and written."""
    networks = [
        f"{folder}/{model}/{params.seeds[0]}"
        for folder in ("finetuned", "source_stats")
        for model in models
    ]
    inputs = [
        places.OUTPUTS / folder
        for folder in (*networks, "data/labeled_validation", f"methods/{name}.json")
    ]
    adapting = dict.fromkeys(("protocol", "online", "augment"), True) | {"runs": {name}}
    sections = {"seed": True, "tune": True, "source_stats": True, "adapt": adapting}
    return open_work(f"tune {name}", params.model_dump(mode="json", include=sections), inputs)


def tune_model(params: Params, name: str, model: str, work: Work) -> dict[str, Any]:
    """Tune one run on one model, on the network of the first training seed; every trial is a run in MLflow."""
    images = ImageSet.load(places.OUTPUTS / "data" / "labeled_validation")
    own, wish = params.run_settings(name, model), params.tune
    source, stream = load_source(params, model, params.seeds[0]), open_stream(params, own.protocol)
    grid = tuning.list_candidates(
        own.search, own.values(), wish.candidates, params.seed, name, model, in_one_pass=not stream
    )

    def build(values: dict[str, Any]) -> tuple:
        longest = {"steps": grid.steps[-1]} if own.trains and not stream else {}
        return build_run(params, name, model, source, values | longest)[1:]

    for values in grid.candidates:  # every mistake shows first
        build(values)
    parent = parent_run(params)  # a store that cannot be used, too
    total = tuning.pairs_to_judge(
        len(grid.candidates), len(images), wish.images, wish.severities, wish.keep, bool(stream)
    )
    workers, at_once = (
        (params.machine.workers if source.device.type == "cpu" else 0),
        params.machine.images_per_step,
    )
    with tqdm(total=total, desc=f"tune {name} {model}", unit="image") as bar:
        judge = tuning.Judge(
            source.network,
            images,
            wish.images,
            wish.severities,
            *grid[:2],
            build,
            params.seed,
            work,
            model,
            workers,
            source.device,
            bar.update,
            stream,
            at_once,
        )
        ranked = tuning.successive_halving(
            judge, len(grid.candidates), len(wish.images), wish.keep, wish.clean_penalty
        )
    search = trials.Search(ranked, grid, own.trains and not stream, wish.clean_penalty)
    # Leaving out an image of a stream would change the others' results.
    found = search.choose(judge.saves_time if wish.gate and not stream else None)
    tags = {
        "model": model,
        "method": own.method,
        "run": name,
        "source_run_id": source.about.get("mlflow_run_id"),
    }
    settings = wish.model_dump(mode="json") | {
        "search": {key: [*values] for key, values in own.search.items()}
    }
    with start_run(
        places.ROOT,
        stage="tune",
        name=f"tune {name} · {model}",
        params=settings,
        tags=tags,
        parent=parent,
        resume_key=f"{work.id} {model}",
    ) as tracked:
        tracked.log_input(
            "labeled_validation", images.source, images.digest(), len(images), "validation"
        )
        log_trials(tracked, search.describe(), tags)
        tracked.log_metrics(search.chosen())
    print(f"{name} {model}: {found['settings']}, gate {found['gate']}")
    return found | {"default": own.values()}
