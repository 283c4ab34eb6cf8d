"""Norms of per-image gradients; an image's parts ``(B, *shape)`` together are one vector."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


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
