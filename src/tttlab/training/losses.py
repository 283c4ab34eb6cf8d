"""The losses of the trainings."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tttlab.data.pixels import as_images
from tttlab.networks.network import Network
from tttlab.networks.objective import Objective
from tttlab.training.meta_training import meta_loss
from tttlab.training.trainer import Loss


def supervised_loss(
    mode: str, objective: Objective | None, weight: float, inner: Mapping[str, Any] | None
) -> Loss:
    """Choose the loss of fine-tuning; see `finetune`."""
    if mode not in ("joint", "meta"):
        return classification_loss
    without_step = joint_loss(objective, weight)
    if mode == "joint":
        return without_step
    moved = inner.get("trainable", "all")
    meta = meta_loss(objective, weight, inner["lr"], inner["steps"], trainable=moved)
    return changing(without_step, meta, inner.get("after", 0))


def changing(first: Loss, second: Loss, count: int) -> Loss:
    """Take another loss after ``count`` epochs."""

    def loss(
        network: Network, batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, Tensor]:
        return (second if batch["epoch"] > count else first)(network, batch, generator)

    return loss if count else second


def objective_loss(objective: Objective) -> Loss:
    """Make the loss of the objective alone."""

    def loss(
        network: Network, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        views, share = as_images(batch["objective"]), batch.get("share")
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
    """Make the loss cross-entropy + ``weight`` · objective.

    Without weight the objective is left out: its head is not trained, not even by weight decay.
    """
    self_supervised_loss = objective_loss(objective)

    def loss(
        network: Network, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        supervised = classification_loss(network, batch, generator)["loss"]
        if not weight:
            return {"loss": supervised, "classification_loss": supervised}
        self_supervised = self_supervised_loss(network, batch, generator)["loss"]
        return {
            "loss": supervised + weight * self_supervised,
            "classification_loss": supervised,
            "objective_loss": self_supervised,
        }

    return loss
