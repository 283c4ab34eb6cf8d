"""Train one model's encoder on the unlabeled images, without labels, or take it as it is initialised."""

from pathlib import Path

from tttlab.config.params import Params
from tttlab.workflow import command, places


def run(params: Params, model: str, seed: int) -> None:
    """Write outputs/pretrained/<model>/<seed>: the network, and its curve."""
    from tttlab.data.image_sets import ImageSet
    from tttlab.errors import UserError
    from tttlab.networks.checkpoints import build_network
    from tttlab.training.optimisers import Recipe
    from tttlab.training.recipes import last_values, pretrain
    from tttlab.workflow.sizes import image_size
    from tttlab.workflow.trainings import log_inputs, open_trainer, write

    folders = [
        places.OUTPUTS / "data" / name
        for name in ("unlabeled", "labeled_train", "labeled_validation")
    ]
    unlabeled, train, validation = (ImageSet.load(folder) for folder in folders)
    chosen = params.models[model].model_dump(mode="json", exclude={"finetune"})
    size = unlabeled.pixels.shape[1]
    if (wanted := image_size(params)) != size:
        raise UserError(
            f"outputs/data: expected images of {wanted} pixels, found {size}; run dvc repro -f prepare"
        )
    settings = {"seed": seed, "image_size": size, "models": {model: chosen}}
    recipe = {key: value for key, value in chosen["pretrain"].items() if key != "augment"}
    augmentation = params.models[model].pretrain.augment
    network, objective = build_network(chosen, len(train.classes), size, seed)
    weights = [Path(chosen["weights"])] if chosen["weights"] not in (None, "timm") else []

    with open_trainer(params, model, "pretrain", settings, folders + weights, None) as (
        trainer,
        tracked,
    ):
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
            return  # the first process writes
        metrics = last_values(rows)
        extra = {"parent": None, "mlflow_run_id": tracked.id, "metrics": metrics}
        about = {"settings": chosen, "classes": train.classes, "image_size": size, "extra": extra}
        write(places.OUTPUTS / "pretrained" / model / str(seed), network, rows, tracked, about)
    print(
        f"{model}: kNN accuracy {metrics['knn_accuracy']:.1%} after {metrics['epoch']} epochs in {metrics['seconds']:.0f} s"
    )


if __name__ == "__main__":
    command.main(run, __doc__, "model", "seed")
