"""Train one model's classifier on the labeled images, and keep its self-supervised head usable."""

from dataclasses import asdict

from tttlab.config.params import Params
from tttlab.workflow import command, places


def run(params: Params, model: str, seed: int) -> None:
    """Write outputs/finetuned/<model>/<seed>: the source network and its learning curve."""
    if params.models[model].whole:
        from tttlab.workflow.whole_networks import keep

        return keep(params, model, seed)
    return train(params, model, seed)


def train(params: Params, model: str, seed: int) -> None:
    """Fit the classifier, and what else `finetune.mode` says."""
    from tttlab.data.image_sets import ImageSet
    from tttlab.networks.checkpoints import build_objective, load
    from tttlab.networks.network import add_probe
    from tttlab.training.optimisers import Recipe
    from tttlab.training.recipes import finetune, last_values
    from tttlab.workflow.trainings import log_inputs, open_trainer, write

    source = places.OUTPUTS / "pretrained" / model / str(seed)
    folders = [places.OUTPUTS / "data" / name for name in ("labeled_train", "labeled_validation")]
    train, validation = (ImageSet.load(folder) for folder in folders)
    network, parent = load(source)
    section = params.models[model].model_dump(mode="json", exclude={"pretrain"})
    views = params.models[model].pretrain.augment
    settings = {"seed": seed, "objective_views": asdict(views), "models": {model: section}}
    recipe = dict(section["finetune"])
    options = {key: recipe.pop(key) for key in ("mode", "objective_weight", "inner")}
    augmentation, probe = params.models[model].finetune.augment, recipe.pop("probe")
    del recipe["augment"]
    if probe:
        add_probe(network, **probe, seed=seed)

    inputs, parent_id = [*folders, source / "weights.safetensors"], parent["mlflow_run_id"]
    training = open_trainer(params, model, "finetune", settings, inputs, parent_id)
    with training as (trainer, tracked):
        log_inputs(
            tracked,
            labeled_train=(train, "training"),
            labeled_validation=(validation, "validation"),
        )
        rows, refit = finetune(
            trainer,
            network,
            build_objective(section["objective"]),
            train,
            validation,
            Recipe(**recipe),
            **options,
            augmentation=augmentation,
            objective_augmentation=views,
        )
        if tracked is None:
            return  # only the first process writes
        metrics = last_values(rows)
        if refit:
            metrics |= {f"refit_{key}": last_values(refit)[key] for key in ("loss", "seconds")}
        extra = {"parent": parent["sha256"], "mlflow_run_id": tracked.id, "metrics": metrics}
        about = {
            "settings": section | {"probe": probe},
            "classes": train.classes,
            "image_size": parent["image_size"],
            "extra": extra,
        }
        write(places.OUTPUTS / "finetuned" / model / str(seed), network, rows, tracked, about)
    print(
        f"{model}: validation accuracy {metrics['validation_accuracy']:.1%} "
        f"after {metrics['epoch']} epochs in {metrics['seconds']:.0f} s"
    )


if __name__ == "__main__":
    command.main(run, __doc__, "model", "seed")
