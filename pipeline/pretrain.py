"""Train one model's encoder on the unlabeled images, or take it as it is initialised."""

from pathlib import Path

from tttlab.config.params import Params
from tttlab.workflow import command, places


def run(params: Params, model: str, seed: int) -> None:
    """Write outputs/pretrained/<model>/<seed>: the network and its learning curve."""
    from tttlab.data.image_sets import ImageSet
    from tttlab.errors import UserError
    from tttlab.networks.checkpoints import build_network
    from tttlab.training.optimisers import Recipe
    from tttlab.training.recipes import last_values, pretrain
    from tttlab.workflow.sizes import image_size
    from tttlab.workflow.trainings import log_inputs, open_trainer, write
    from tttlab.workflow.whole_networks import take

    names = ("unlabeled", "labeled_train", "labeled_validation")
    folders = [places.OUTPUTS / "data" / name for name in names]
    unlabeled, train, validation = (ImageSet.load(folder) for folder in folders)
    section = params.models[model].model_dump(mode="json", exclude={"finetune"})
    size = unlabeled.pixels.shape[1]
    if (expected := image_size(params)) != size:
        raise UserError(
            f"outputs/data: expected images of {expected} pixels, found {size}; "
            "run dvc repro -f prepare"
        )
    if params.models[model].whole:
        take(params, model, seed, size)
        return
    settings = {"seed": seed, "image_size": size, "models": {model: section}}
    recipe = {key: value for key, value in section["pretrain"].items() if key != "augment"}
    augmentation = params.models[model].pretrain.augment
    network, objective = build_network(section, len(train.classes), size, seed)
    weights = [Path(section["weights"])] if section["weights"] not in (None, "timm") else []

    training = open_trainer(params, model, "pretrain", settings, folders + weights, None)
    with training as (trainer, tracked):
        log_inputs(
            tracked,
            unlabeled=(unlabeled, "training"),
            labeled_train=(train, "validation"),
            labeled_validation=(validation, "validation"),
        )
        rows = pretrain(
            trainer,
            network,
            objective,
            unlabeled,
            (train, validation),
            augmentation,
            Recipe(**recipe),
        )
        if tracked is None:
            return  # only the first process writes
        metrics = last_values(rows)
        extra = {"parent": None, "mlflow_run_id": tracked.id, "metrics": metrics}
        about = {"settings": section, "classes": train.classes, "image_size": size, "extra": extra}
        write(places.OUTPUTS / "pretrained" / model / str(seed), network, rows, tracked, about)
    print(
        f"{model}: kNN accuracy {metrics['knn_accuracy']:.1%} "
        f"after {metrics['epoch']} epochs in {metrics['seconds']:.0f} s"
    )


if __name__ == "__main__":
    command.main(run, __doc__, "model", "seed")
