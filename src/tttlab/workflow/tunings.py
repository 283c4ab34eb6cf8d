"""Tuning of runs: the search on one model, and what is written of it."""

from collections.abc import Mapping
from typing import Any

from tttlab.adaptation.task import Task
from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.experiments.search import Search
from tttlab.experiments.tuning import (
    Judge,
    Rounds,
    list_candidates,
    pairs_to_judge,
    successive_halving,
)
from tttlab.runtime.machine import Machine
from tttlab.runtime.progress import open_bar
from tttlab.runtime.resuming import Work
from tttlab.shifts.corruptions.canvas import import_transforms
from tttlab.tracking.comparison import log_trials
from tttlab.tracking.runs import start_run
from tttlab.workflow import places
from tttlab.workflow.execution import parent_run
from tttlab.workflow.ledger import Ledger
from tttlab.workflow.leftovers import find_work
from tttlab.workflow.loading import SourceNetwork, build_run, load_network, open_stream
from tttlab.workflow.pieces import Pair
from tttlab.workflow.tuned import write_choice


def tune_pairs(params: Params, keys: Mapping[Pair, str], ledger: Ledger) -> None:
    """Tune pairs, each with its key, on the networks of the first training seed."""
    import_transforms()  # else two workers of every round of every pair would
    sources: dict[str, SourceNetwork] = {}
    for pair, key in keys.items():
        if pair.model not in sources:
            sources[pair.model] = load_network(params, pair.model, params.seeds[0])
        with find_work(key, f"tune {pair}") as work:
            choice = tune(params, pair, sources[pair.model], work)
            file = write_choice(pair, choice)
        ledger.enter(str(pair), key, [file])


def tune(params: Params, pair: Pair, source: SourceNetwork, work: Work) -> dict[str, Any]:
    """Search the settings of one run on one model; every trial is a run in MLflow."""
    images = ImageSet.load(places.OUTPUTS / "data" / "labeled_validation")
    settings, options = params.run_settings(*pair), params.tune
    stream = open_stream(params, settings.protocol)
    trains = settings.trains and not stream
    default, in_one_pass = settings.values(), not stream
    grid = list_candidates(
        settings.search, default, options.candidates, params.seed, *pair, in_one_pass=in_one_pass
    )

    def build(values: dict[str, Any]) -> Task:
        longest = {"steps": grid.steps[-1]} if trains else {}
        return build_run(params, *pair, source, values | longest).task

    # Every mistake in a candidate shows before the search, and so does an unusable MLflow store.
    for values in grid.candidates:
        build(values)
    parent = parent_run(params)
    candidates, count = len(grid.candidates), len(images)
    total = pairs_to_judge(
        candidates, count, options.images, options.severities, options.keep, bool(stream)
    )
    workers = params.machine.workers if source.device.type == "cpu" else 0
    machine = Machine(source.device, workers, params.machine.images_per_step)
    of_corruptions = options.severities, params.seed, stream, params.shifts.strength
    rounds = Rounds(images, options.images, *of_corruptions)
    with open_bar(f"tune {pair.run} {pair.model}", total, "image") as bar:
        judge = Judge(rounds, grid, build, work, "tune", machine, bar.update)
        ranked = successive_halving(
            judge, candidates, len(options.images), options.keep, options.clean_penalty
        )
    search = Search(ranked, grid, trains, options.clean_penalty)
    # No gate on streams, where skipping an image would change the results of others.
    choice = search.choose(judge.saves_time if options.gate and not stream else None)
    tags = {
        "model": pair.model,
        "method": settings.method,
        "run": pair.run,
        "source_run_id": source.about.get("mlflow_run_id"),
    }
    searched = {key: [*values] for key, values in settings.search.items()}
    with start_run(
        places.ROOT,
        stage="tune",
        name=f"tune {pair.run} · {pair.model}",
        params=options.model_dump(mode="json") | {"search": searched},
        tags=tags,
        parent=parent,
        resume_key=work.id,
    ) as tracked:
        digest = images.digest()
        tracked.log_input("labeled_validation", images.source, digest, count, "validation")
        log_trials(tracked, search.describe(), tags)
        tracked.log_metrics(search.chosen())
    print(f"{pair.run} {pair.model}: {choice['settings']}, gate {choice['gate']}")
    return choice | {"default": default}
