"""Random views of many images in one call, each image from its own random stream."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tttlab.config.inner_loop import Augmentation


def random_views(
    images: Tensor, generators: Sequence[torch.Generator], count: int, augmentation: Augmentation
) -> Tensor:
    """Draw ``count`` views of every image.

    Args:
        images: ``(B, C, H, W)``, in [0, 1] or normalised (then brightness acts about the mean).
        generators: one CPU stream per image, so that a view depends on its image's stream alone.
        count: V, views per image.
        augmentation: the strength.

    Returns:
        ``(B, V, C, H, W)``, bilinear, on the images' device.
    """
    draws = torch.stack([torch.rand(count, 6, generator=generator) for generator in generators])
    draws = draws.to(images)
    batch, channels, height, width = images.shape
    transforms = crop_transforms(draws[..., :4].flatten(0, 1), augmentation)
    grid = F.affine_grid(transforms, [batch * count, channels, height, width], False)
    repeated = images.unsqueeze(1).expand(-1, count, -1, -1, -1).flatten(0, 1)
    views = F.grid_sample(
        repeated, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    views = jitter(views, draws[..., 4:].flatten(0, 1), augmentation.jitter)
    return views.unflatten(0, (batch, count))


def log_mean_probabilities(logits: Tensor) -> Tensor:
    """Average the class probabilities of views: logits ``(V, K)`` → log-probabilities ``(K,)``."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def crop_transforms(draws: Tensor, augmentation: Augmentation) -> Tensor:
    """Turn uniform draws ``(M, 4)`` into affine maps ``(M, 2, 3)``.

    The draws are area, horizontal and vertical position, and flip. A crop of area share ``s`` is a
    zoom by ``√s`` about a centre that keeps the crop inside the image.
    """
    side = (augmentation.min_scale + (1 - augmentation.min_scale) * draws[:, 0]).sqrt()
    mirror = torch.ones_like(side)
    if augmentation.flip:
        mirror = torch.where(draws[:, 3] < 0.5, -1.0, 1.0)
    transforms = torch.zeros(len(draws), 2, 3, dtype=draws.dtype, device=draws.device)
    transforms[:, 0, 0] = side * mirror
    transforms[:, 1, 1] = side
    transforms[:, :, 2] = (2 * draws[:, 1:3] - 1) * (1 - side)[:, None]
    return transforms


def jitter(views: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Scale brightness and contrast of views ``(M, C, H, W)`` by uniform draws ``(M, 2)``."""
    if strength == 0:
        return views
    factors = 1 + 0.8 * strength * (2 * draws - 1)
    brightness, contrast = factors[:, 0, None, None, None], factors[:, 1, None, None, None]
    mean = views.mean((1, 2, 3), keepdim=True)
    return ((views - mean) * contrast + mean) * brightness


def random_masks(
    generators: Sequence[torch.Generator], count: int, patches: int, ratio: float
) -> tuple[Tensor, Tensor]:
    """Draw ``count`` random masks per image, as MAE does.

    A mask is a permutation of the patches of which the first part is kept.

    Args:
        generators: one stream per image.
        count: V, masks per image.
        patches: L, patch tokens per image.
        ratio: share of patches hidden, in (0, 1); at least one patch stays and one goes.

    Returns:
        kept ``(B, V, L_keep)`` and hidden ``(B, V, L − L_keep)`` patch numbers in ``[0, L)``.
    """
    kept = min(max(int(patches * (1 - ratio)), 1), patches - 1)
    order = torch.stack(
        [torch.rand(count, patches, generator=generator) for generator in generators]
    ).argsort(-1)
    return order[..., :kept], order[..., kept:]
