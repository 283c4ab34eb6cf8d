"""Pretraining of one network on the unlabeled images, or none at all."""

from pathlib import Path

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.errors import UserError
from tttlab.networks.checkpoints import build_network
from tttlab.training.optimisers import Recipe
from tttlab.training.recipes import last_values, pretrain
from tttlab.workflow import pieces, places
from tttlab.workflow.sizes import image_size
from tttlab.workflow.trainings import Place, log_inputs, open_trainer, write
from tttlab.workflow.whole_networks import take


def pretrain_network(params: Params, item: pieces.Network, place: Place) -> list[Path]:
    """Train one network; return the files that the first process writes."""
    model, seed = item
    names = ("unlabeled", "labeled_train", "labeled_validation")
    unlabeled, labeled, validation = (
        ImageSet.load(places.OUTPUTS / "data" / name) for name in names
    )
    section = params.models[model].model_dump(mode="json", exclude={"finetune"})
    size = unlabeled.pixels.shape[1]
    if (expected := image_size(params)) != size:
        raise UserError(
            f"outputs/data: expected images of {expected} pixels, found {size}; "
            "run dvc repro -f prepare"
        )
    if params.models[model].whole:
        return take(params, item, place, size)
    settings = {"seed": seed, "image_size": size, "models": {model: section}}
    recipe = {key: value for key, value in section["pretrain"].items() if key != "augment"}
    augmentation = params.models[model].pretrain.augment
    network, objective = build_network(section, len(labeled.classes), size, seed)

    with open_trainer(params, model, "pretrain", settings, place, None) as (trainer, tracked):
        log_inputs(
            tracked,
            unlabeled=(unlabeled, "training"),
            labeled_train=(labeled, "validation"),
            labeled_validation=(validation, "validation"),
        )
        rows = pretrain(
            trainer,
            network,
            objective,
            unlabeled,
            (labeled, validation),
            augmentation,
            Recipe(**recipe),
        )
        if tracked is None:
            return []  # only the first process writes
        metrics = last_values(rows)
        extra = {"parent": None, "mlflow_run_id": tracked.id, "metrics": metrics}
        about = {
            "settings": section,
            "classes": labeled.classes,
            "image_size": size,
            "extra": extra,
        }
        files = write(place.folder / str(item), network, rows, tracked, about)
    print(
        f"{model}: kNN accuracy {metrics['knn_accuracy']:.1%} "
        f"after {metrics['epoch']} epochs in {metrics['seconds']:.0f} s"
    )
    return files
