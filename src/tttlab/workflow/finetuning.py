"""Fine-tuning of one network on the labeled images."""

from dataclasses import asdict
from pathlib import Path

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.networks.checkpoints import build_objective, load
from tttlab.networks.network import add_probe
from tttlab.training.loaders import Changes
from tttlab.training.optimisers import Recipe
from tttlab.training.recipes import finetune, last_values
from tttlab.workflow import pieces, places
from tttlab.workflow.trainings import Place, log_inputs, open_trainer, write
from tttlab.workflow.whole_networks import keep


def finetune_network(params: Params, item: pieces.Network, place: Place) -> list[Path]:
    """Train one network; return the files that the first process writes."""
    if params.models[item.model].whole:
        return keep(params, item, place)
    model, seed = item
    labeled, validation = (
        ImageSet.load(places.OUTPUTS / "data" / name)
        for name in ("labeled_train", "labeled_validation")
    )
    network, parent = load(places.OUTPUTS / "pretrained" / str(item))
    section = params.models[model].model_dump(mode="json", exclude={"pretrain"})
    views = params.models[model].pretrain.augment
    settings = {"seed": seed, "objective_views": asdict(views), "models": {model: section}}
    recipe = dict(section["finetune"])
    options = {key: recipe.pop(key) for key in ("mode", "objective_weight", "inner")}
    options["changes"] = Changes(*(recipe.pop(name, 0.0) for name in Changes._fields))
    augmentation, probe = params.models[model].finetune.augment, recipe.pop("probe")
    del recipe["augment"]
    if probe:
        add_probe(network, **probe, seed=seed)

    training = open_trainer(params, model, "finetune", settings, place, parent["mlflow_run_id"])
    with training as (trainer, tracked):
        log_inputs(
            tracked,
            labeled_train=(labeled, "training"),
            labeled_validation=(validation, "validation"),
        )
        rows, refit = finetune(
            trainer,
            network,
            build_objective(section["objective"]),
            labeled,
            validation,
            Recipe(**recipe),
            **options,
            augmentation=augmentation,
            objective_augmentation=views,
        )
        if tracked is None:
            return []  # only the first process writes
        metrics = last_values(rows)
        if refit:
            metrics |= {f"refit_{key}": last_values(refit)[key] for key in ("loss", "seconds")}
        extra = {"parent": parent["sha256"], "mlflow_run_id": tracked.id, "metrics": metrics}
        about = {
            "settings": section | {"probe": probe},
            "classes": labeled.classes,
            "image_size": parent["image_size"],
            "extra": extra,
        }
        files = write(place.folder / str(item), network, rows, tracked, about)
    print(
        f"{model}: validation accuracy {metrics['validation_accuracy']:.1%} "
        f"after {metrics['epoch']} epochs in {metrics['seconds']:.0f} s"
    )
    return files
