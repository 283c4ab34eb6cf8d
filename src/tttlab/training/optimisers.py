"""Length and optimiser of a training."""

from dataclasses import dataclass
from typing import Literal

import torch
from lightly.utils.scheduler import cosine_warmup_schedule
from timm.optim import param_groups_weight_decay
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """Length and optimiser of one training.

    Attributes:
        epochs: passes over the images.
        batch_size: largest number of images per batch.
        optimizer: ``sgd`` with momentum 0.9, or ``adamw``.
        lr: learning rate after the warm-up; from there it falls to 0 along a cosine.
        weight_decay: for weights; biases, norms, position and class tokens have none.
        warmup_epochs: epochs over which the learning rate rises linearly.
        clip: largest norm of the gradient; None: no clipping.
    """

    epochs: int
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 0
    clip: float | None = None

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step, counted from 0 over the whole training."""
        total, warmup = self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch
        # With total + 1 steps the rate reaches 0 after the last step, not in it.
        return self.lr * cosine_warmup_schedule(step, total + 1, 1.0, 0.0, warmup, 0.0)


def build_optimizer(
    network: nn.Module, recipe: Recipe, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """Create the optimiser of a network's trainable parameters.

    Args:
        network: its parameters that require a gradient are optimised.
        recipe: choice of optimiser, learning rate and weight decay.
        betas: decay rates of AdamW's two averages; 0.95 for the second is usual with MAE.
    """
    groups = param_groups_weight_decay(
        network, recipe.weight_decay, no_weight_decay_list=undecayed(network)
    )
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, recipe.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, recipe.lr, betas=betas, fused=True)


def undecayed(network: nn.Module) -> set[str]:
    """Name the position embeddings and tokens: they have several dimensions, but get no decay."""
    listed_by_timm = {
        f"{path}.{name}".lstrip(".")
        for path, module in network.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
    tokens = {
        name
        for name, _ in network.named_parameters()
        if name.endswith(("mask_token", "cls_token", "pos_embed"))
    }
    return listed_by_timm | tokens
