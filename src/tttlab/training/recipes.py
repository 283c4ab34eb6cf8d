"""The source network's two trainings: self-supervised pretraining and supervised fine-tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from tttlab.config.inner_loop import Augmentation
from tttlab.data.image_sets import ImageSet
from tttlab.networks.network import Network
from tttlab.networks.objective import Objective
from tttlab.training.loaders import UNCHANGED, Changes, Views
from tttlab.training.losses import objective_loss, supervised_loss
from tttlab.training.optimisers import Recipe
from tttlab.training.probing import classification, encode, knn_accuracy
from tttlab.training.trainer import Row, Task, Trainer

ALL = ("encoder", "classifier", "head")
MODES = {
    "linear": ("probe", "classifier"),
    "full": ("encoder", "classifier"),
    "joint": ALL,
    "meta": ALL,
}
PROBES = 5  # kNN accuracies measured during a pretraining, at least
REFIT_EPOCHS = 5


def pretrain(
    trainer: Trainer,
    network: Network,
    objective: Objective | None,
    unlabeled: ImageSet,
    probe: tuple[ImageSet, ImageSet],
    augmentation: Augmentation,
    recipe: Recipe,
) -> list[Row]:
    """Train encoder and self-supervised head, in place, without labels.

    Args:
        trainer: device, seed, workers, resuming.
        network: the network.
        objective: the self-supervised loss; None only if the recipe has no epochs.
        unlabeled: images to train on.
        probe: labeled training and validation images; their kNN accuracy is only recorded.
        augmentation: strength of the views.
        recipe: length and optimiser.

    Returns:
        a row per epoch: ``loss``, ``lr``, and in some epochs ``knn_accuracy``; see `Trainer.fit`.
    """
    interval = max(1, recipe.epochs // PROBES)

    def measure(epoch: int) -> Row:
        if epoch % interval and epoch != recipe.epochs:
            return {}
        return {"knn_accuracy": knn_accuracy(*(encode(network, images) for images in probe))}

    assert not recipe.epochs or (objective and not objective.labels)
    task = Task(
        "pretrain",
        parts=("encoder", "head") if objective else ("encoder",),
        loss=objective_loss(objective),
        views=ssl_views(objective, augmentation),
        recipe=recipe,
        betas=betas(objective),
        measure=measure,
    )
    return trainer.fit(network, unlabeled, task)


def finetune(
    trainer: Trainer,
    network: Network,
    objective: Objective | None,
    train: ImageSet,
    validation: ImageSet,
    recipe: Recipe,
    *,
    mode: Literal["linear", "full", "joint", "meta"] = "joint",
    objective_weight: float = 0.5,
    inner: Mapping[str, Any] | None = None,
    changes: Changes = UNCHANGED,
    augmentation: Augmentation,
    objective_augmentation: Augmentation,
) -> tuple[list[Row], list[Row]]:
    """Train the classifier, in place; afterwards the self-supervised head fits the encoder.

    ``linear`` trains classifier and probe on the frozen encoder, ``full`` classifier and encoder;
    both then refit the head. ``joint`` minimises cross-entropy + ``objective_weight`` · objective
    on the same images, ``meta`` the same after inner steps (see `tttlab.training.meta_training`).

    Args:
        trainer: device, seed, workers, resuming.
        network: the network.
        objective: the self-supervised loss; None for a network without head.
        train: labeled images.
        validation: labeled images whose accuracy is only recorded: the last epoch is kept.
        recipe: length and optimiser.
        mode: see above.
        objective_weight: of the objective in ``joint`` and ``meta``.
        inner: for ``meta``: ``lr``, ``steps`` and ``trainable`` of the inner steps, and ``pairs``,
            how many times the objective's views of each image are drawn.
        changes: shares of the images that are changed in every epoch.
        augmentation: strength of the views that are classified.
        objective_augmentation: strength of the objective's views.

    Returns:
        the curve, a row per epoch (``loss``, ``lr``, ``validation_loss``, ``validation_accuracy``;
        in ``joint`` and ``meta`` also ``classification_loss`` and ``objective_loss``), and that of
        the head's refit, empty without one.
    """
    joint = mode in ("joint", "meta")
    assert objective or not joint
    assert not (objective and objective.labels and mode == "meta")
    pairs = inner["pairs"] if mode == "meta" else 1
    objective_views = ssl_views(objective, objective_augmentation, pairs) if joint else {}
    task = Task(
        "finetune",
        parts=[part for part in MODES[mode] if getattr(network, part)],
        loss=supervised_loss(mode, objective, objective_weight, inner),
        views={"classify": Views(1, augmentation), **objective_views},
        recipe=recipe,
        changes=changes,
        betas=betas(objective if joint else None),
        measure=lambda _epoch: classification(encode(network, validation)),
    )
    rows = trainer.fit(network, train, task)
    if joint or objective is None or not recipe.epochs:
        return rows, []
    return rows, refit_head(trainer, network, objective, train, objective_augmentation, recipe)


def refit_head(
    trainer: Trainer,
    network: Network,
    objective: Objective,
    images: ImageSet,
    augmentation: Augmentation,
    recipe: Recipe,
) -> list[Row]:
    """Train only the self-supervised head, for a few epochs, after the encoder has changed.

    Test-time training follows the head's gradient, which is noise if the head fits another encoder.
    """
    task = Task(
        "refit",
        parts=("head",),
        loss=objective_loss(objective),
        views=ssl_views(objective, augmentation),
        recipe=replace(recipe, epochs=REFIT_EPOCHS, warmup_epochs=0),
        betas=betas(objective),
    )
    return trainer.fit(network, images, task)


def ssl_views(
    objective: Objective | None, augmentation: Augmentation, count: int = 1
) -> dict[str, Views]:
    """Describe the objective's views, drawn ``count`` times per image; none without objective.

    A learned task is that of the image which is classified, as at test time: it has none either.
    """
    if objective is None or objective.meta:
        return {}
    augmentation = augmentation if objective.jitter else replace(augmentation, jitter=0)
    return {"objective": Views(count * objective.num_views, augmentation)}


def betas(objective: Objective | None) -> tuple[float, float]:
    """Return the objective's decay rates for AdamW, or the default ones without objective."""
    return (objective or Objective).betas


def last_values(rows: Sequence[Row]) -> Row:
    """Return the last value of every column of a curve, and the sum of its seconds."""
    latest = {name: value for row in rows for name, value in row.items()}
    return latest | {"seconds": sum(row.get("seconds", 0.0) for row in rows)}
