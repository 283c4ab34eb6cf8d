"""Trained networks with their tuned runs, written as models that stand alone, and registered."""

import shutil
import sys
from pathlib import Path

from PIL import Image

from tttlab.config.params import Params
from tttlab.config.values import is_own_module
from tttlab.data.image_sets import ImageSet
from tttlab.evaluation.recommendation import worth_running
from tttlab.evaluation.results import CONTROL, Results
from tttlab.reporting.about import note
from tttlab.reporting.card import write_card
from tttlab.serving.adaptive_model import AdaptiveModel, ServedRun, save
from tttlab.serving.registry import register
from tttlab.tracking.runs import Run, run_link
from tttlab.workflow import places
from tttlab.workflow.loading import build_run, load_gate, load_network, load_tuned

EXAMPLE = "example.png"


def write_model(params: Params, model: str, folder: Path) -> AdaptiveModel:
    """Write one model and its runs into a folder.

    Args:
        params: all settings.
        model: the model's name.
        folder: emptied first.
    """
    seed = params.seeds[0]
    source = load_network(params, model, seed)
    runs, refused, tunings = {}, {}, {}
    for name in params.adapt.runs:
        if model not in params.models_of(name):
            continue
        if params.run_settings(name, model).protocol == "online":
            refused[name] = f"{name}, which adapts along a stream of images, not to a single one"
            continue
        tuned = tunings[name] = load_tuned(name, model)
        task = build_run(params, name, model, source, tuned["settings"]).task
        runs[name] = ServedRun(task, load_gate(tuned))
    best = worth_running(tunings) or CONTROL
    served = AdaptiveModel(model, source.about, runs, best, refused, params.data.depth)
    shutil.rmtree(folder, ignore_errors=True)  # DVC may have linked earlier files to its cache
    save(served, folder, places.OUTPUTS / "finetuned" / model / str(seed))
    return served


def describe(params: Params, results: Results, served: AdaptiveModel) -> str:
    """Write a model's card."""
    data = places.OUTPUTS / "data"
    sets = {name: ImageSet.load(data / name) for name in ("unlabeled", "labeled_train", "test")}
    labeled, unlabeled = sets["labeled_train"], sets["unlabeled"]
    objective = params.models[served.name].objective.name
    before = f", after {objective} on {len(unlabeled):,} unlabeled ones from {unlabeled.source}"
    images = f"{len(labeled):,} labeled images from {labeled.source}"
    if served.about.get("whole"):
        trained_on = f"images of its own, unknown here; adapting was tuned with {images}"
    else:
        trained_on = images if objective == "none" else images + before
    links = {
        run: run_link(places.ROOT, results.adapted[served.name, run].get("mlflow_run_id"))
        for run in results.runs_of(served.name)
    }
    return write_card(
        results,
        served.name,
        trained_on=f"{trained_on}; {served.image_size} px.",
        tested_on=note(results, sets["test"].source, params.shifts, params.adapt.online),
        about=served.about,
        best=served.best,
        refused=served.refused,
        links=links,
    )


def register_model(run: Run, folder: Path, served: AdaptiveModel, card: str) -> str:
    """Register a model that `write_model` has written; return a line about it."""
    (folder / "README.md").write_text(f"# {served.name}\n\n{card}\n", encoding="utf-8")
    example = folder / EXAMPLE
    labeled = ImageSet.load(places.OUTPUTS / "data" / "labeled_validation")
    Image.fromarray(labeled.pixels[0]).save(example)
    number, new = register(run, places.ROOT, served.name, folder, card, example, own_code(served))
    return f"{served.name}: version {number} {'is' if new else 'was already'} champion"


def own_code(served: AdaptiveModel) -> list[str]:
    """Find the files of the user's own modules that a model needs: methods, and a backbone.

    Only modules of the project's folder: what is installed is the environment's business.
    """
    names = {type(run.task.method).__module__ for run in served.runs.values()}
    if is_own_module(served.about["backbone"]):
        names.add(served.about["backbone"].rpartition(".")[0])
    found = set()
    for name in names:
        top = sys.modules.get(name.partition(".")[0])
        if top is None or top.__name__ == "tttlab":
            continue
        file = Path(getattr(top, "__file__", None) or next(iter(top.__path__))).resolve()
        place = file.parent if file.name == "__init__.py" else file
        if place.is_relative_to(places.ROOT) and "site-packages" not in place.parts:
            found.add(str(place))
    return sorted(found)
