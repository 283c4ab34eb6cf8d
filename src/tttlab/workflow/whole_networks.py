"""Networks that are kept as they are: what the two stages of training do with them."""

import shutil
from pathlib import Path

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.errors import UserError
from tttlab.networks import checkpoints
from tttlab.networks.known_classes import class_list, order_of, told_classes
from tttlab.networks.whole import build_whole, count_logits, tell_wrong_count
from tttlab.runtime.devices import choose_device
from tttlab.tracking.runs import start_run
from tttlab.training.probing import classification, encode
from tttlab.workflow import pieces, places
from tttlab.workflow.execution import parent_run
from tttlab.workflow.training_keys import backbone_code
from tttlab.workflow.trainings import Place, log_inputs, write

PARTS = ("train", "validation")


def take(params: Params, item: pieces.Network, place: Place, size: int) -> list[Path]:
    """Take a network for `pretrain`: its weights, and the classes that its checkpoint tells.

    Args:
        params: all settings.
        item: the network; nothing is drawn at random by its seed.
        place: where to write.
        size: side of the images, pixels.

    Returns:
        the files that the first process writes.
    """
    if not place.fabric.is_global_zero:
        return []
    model = item.model
    section = params.models[model].model_dump(mode="json", exclude={"finetune"})
    network = build_whole(section, size)
    extra = {
        "parent": None,
        "mlflow_run_id": None,
        "logits": count_logits(network, size, f"models.{model}"),
        # So that all that follows is computed anew when the code changes, not the weights alone.
        "code": backbone_code(section["backbone"]),
    }
    folder = place.folder / str(item)
    about = {
        "settings": section,
        "classes": told_classes(section["weights"]) or (),
        "image_size": size,
        "extra": extra,
    }
    shutil.rmtree(folder, ignore_errors=True)  # DVC may have linked earlier files to its cache
    checkpoints.save(network, folder, **about)
    print(f"{model}: {extra['logits']} classes, kept as it is")
    return sorted(folder.iterdir())


def keep(params: Params, item: pieces.Network, place: Place) -> list[Path]:
    """Write the source network for `finetune`, and how it does on the validation images.

    Returns:
        the files that the first process writes.
    """
    if not place.fabric.is_global_zero:
        return []
    model, seed = item
    key, folder = f"models.{model}", places.OUTPUTS / "data"
    train, validation = (ImageSet.load(folder / f"labeled_{part}") for part in PARTS)
    device = choose_device(params.machine.device, params.machine.precision)
    network, parent = checkpoints.load(places.OUTPUTS / "pretrained" / str(item), device)
    section = params.models[model].model_dump(mode="json", exclude={"pretrain"})
    own = section["finetune"]
    classes = own["classes"] or parent["classes"] or class_list(section, key)
    if wrong := tell_wrong_count(parent["logits"], classes, key):
        raise UserError(wrong)
    if own["mean"]:
        network.standardise(own["mean"], own["std"])
    order = order_of(classes, train.classes, key)
    network.reorder(order)
    # Thousands of names would be no setting to compare runs by.
    shown = section | {"finetune": own | {"classes": len(classes)}}
    with start_run(
        places.ROOT,
        stage="finetune",
        name=f"keep {model} · {section['backbone']}",
        params={"seed": seed, "models": {model: shown}},
        tags={"model": model, "objective": "none", "seed": seed, "source_run_id": ""},
        parent=parent_run(params),
    ) as tracked:
        log_inputs(tracked, labeled_validation=(validation, "validation"))
        metrics = classification(encode(network, validation, params.machine.images_per_step))
        tracked.log_metrics(metrics)
        extra = {
            "parent": parent["sha256"],
            "mlflow_run_id": tracked.id,
            "logits": parent["logits"],
            "code": parent["code"],
            "metrics": metrics,
        }
        about = {
            "settings": section,
            "classes": [classes[number] for number in order],
            "image_size": parent["image_size"],
            "extra": extra,
        }
        rows = [{"epoch": 0, **metrics}]
        files = write(place.folder / str(item), network, rows, tracked, about)
    others = len(classes) - len(train.classes)
    known = f", which knows {others:,} classes besides" if others else ""
    print(f"{model}: validation accuracy {metrics['validation_accuracy']:.1%} as it is{known}")
    return files
