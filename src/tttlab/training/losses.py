"""The losses of the trainings."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tttlab.data.pixels import as_images
from tttlab.networks.network import Network
from tttlab.networks.objective import Objective
from tttlab.training.meta_training import check_single_process, meta_loss, views_of
from tttlab.training.trainer import Loss


def supervised_loss(
    mode: str, objective: Objective | None, weight: float, inner: Mapping[str, Any] | None
) -> Loss:
    """Choose the loss of fine-tuning; see `finetune`."""
    if mode not in ("joint", "meta"):
        return classification_loss
    if mode == "joint":
        return joint_loss(objective, weight)
    moved = inner.get("trainable", "all")
    meta = meta_loss(objective, weight, inner["lr"], inner["steps"], trainable=moved)
    # Without weight nothing trains the head before the first step, not even weight decay.
    before = joint_loss(objective, weight) if weight else classification_loss
    return changing(before, meta, inner.get("after", 0))


def changing(first: Loss, second: Loss, count: int) -> Loss:
    """Take another loss, that of meta-learned fine-tuning, after ``count`` epochs."""

    def loss(
        network: Network, batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, Tensor]:
        check_single_process(batch)  # before all epochs, not after the first ones
        return (second if batch["epoch"] > count else first)(network, batch, generator)

    return loss if count else second


def objective_loss(objective: Objective) -> Loss:
    """Make the loss of the objective alone."""

    def loss(
        network: Network, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        views, share = as_images(views_of(batch)), batch.get("share")
        labels = {"labels": batch["labels"]} if objective.labels else {}
        return {"loss": objective.loss(network, views, generator, share, **labels)}

    return loss


def classification_loss(
    network: Network, batch: dict[str, Tensor], _generator: torch.Generator
) -> dict[str, Tensor]:
    """Cross-entropy of the views ``classify (N, 1, H, W, 3)``."""
    logits = network(as_images(batch["classify"][:, 0])).logits
    return {"loss": F.cross_entropy(logits, batch["labels"])}


def joint_loss(objective: Objective, weight: float) -> Loss:
    """Make the loss cross-entropy + ``weight`` · objective."""
    self_supervised_loss = objective_loss(objective)

    def loss(
        network: Network, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        self_supervised = self_supervised_loss(network, batch, generator)["loss"]
        supervised = classification_loss(network, batch, generator)["loss"]
        return {
            "loss": supervised + weight * self_supervised,
            "classification_loss": supervised,
            "objective_loss": self_supervised,
        }

    return loss
