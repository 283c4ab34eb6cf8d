"""Per-image gradients and their norms; an image's parts ``(B, *shape)`` are one vector."""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

P = ParamSpec("P")
R = TypeVar("R")


def with_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function differentiate, also where its caller has switched gradients off."""

    def ordinary(value: Any) -> Any:
        # Autograd refuses what was made in inference mode.
        made_there = isinstance(value, Tensor) and value.is_inference()
        return value.clone() if made_there else value

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*tree_map(ordinary, args), **tree_map(ordinary, kwargs))

    return call


def present_gradients(
    losses: Tensor, parameters: Mapping[str, Tensor], create_graph: bool = False
) -> dict[str, Tensor]:
    """Differentiate the sum of ``losses (B,)`` by parameters, those alone that influence it."""
    if not losses.requires_grad:
        return {}
    gradients = torch.autograd.grad(
        losses.sum(), list(parameters.values()), create_graph=create_graph, allow_unused=True
    )
    by_name = zip(parameters, gradients, strict=True)
    return {name: gradient for name, gradient in by_name if gradient is not None}


def norms(gradients: Iterable[Tensor]) -> Tensor:
    """Norm ``(B,)`` of every image's gradient over all its parts ``(B, *shape)``."""
    part_norms = [torch.linalg.vector_norm(as_rows(part), dim=1) for part in gradients]
    return torch.stack(part_norms).norm(dim=0)


def as_rows(part: Tensor) -> Tensor:
    """View a part ``(B, *shape)`` as one row per image ``(B, size)``; ``shape`` may be empty."""
    return part.unsqueeze(-1).flatten(1)


def scale(gradients: Mapping[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    """Multiply every image's gradient ``(B, *shape)`` by its own factor ``(B,)``.

    Not in place: autograd may give one tensor as the gradient of two parameters.
    """
    return {
        name: part * factors.view(-1, *[1] * (part.ndim - 1)) for name, part in gradients.items()
    }


def clip_gradients(gradients: Mapping[str, Tensor], largest: float) -> dict[str, Tensor]:
    """Bound the norm of each image's gradient ``(B, *shape)`` separately, differentiably."""
    return scale(gradients, (largest / norms(gradients.values()).clamp_min(1e-12)).clamp_max(1))
