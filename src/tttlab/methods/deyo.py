"""DeYO: be sure of the test images whose class rests on shape, which shuffling patches destroys.

Lee et al., ICLR 2024, arXiv 2403.07366 ("Destroy Your Object"): an image counts if its entropy lies
below a share of the largest possible one, and if the probability of its predicted class falls far
enough when the patches of a 4×4 grid are shuffled (PLPD, pseudo-label probability difference). Its
weight grows with lower entropy and with larger difference. Nothing is needed of the source domain.

In params.yaml the rest is the adapter's. The published code takes SGD with momentum 0.9, batches of
64, ``lr: 2.5e-4`` for ResNet-50 (1e-3 for ViT-B), and trains the affine parameters of all
normalisation layers except those of the last stage or the last blocks: name the others in
``trainable`` for that, with ``normalisation: image`` for BatchNorm.

What differs: the published code returns the predictions before the step; ours are made after it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.adaptation.method import Method, State, entropy
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


@dataclass(frozen=True)
class DeYO(Method):
    """Minimise the weighted entropy of reliable predictions that rest on shape.

    Attributes:
        margin: share of log K, the largest entropy, beyond which an image is left out.
        weight_margin: share of log K at which the entropy's part of the weight is 1.
        plpd_threshold: fall of the predicted class's probability up to which an image is left out;
            the paper has 0.2, and 0.3 for a ResNet-50 with BatchNorm on streams of one corruption.
        grid: number of patches per side.
    """

    protocols = ("online",)
    whole_batch = True
    margin: Annotated[float, Gt(0)] = 0.5
    weight_margin: Annotated[float, Gt(0)] = 0.4
    plpd_threshold: Annotated[float, Ge(-1), Lt(1)] = 0.2
    grid: Annotated[int, Ge(2)] = 4

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Give the images, and the same with freshly shuffled patches: both ``(B, 1, 3, H, W)``."""
        orders = torch.stack(
            [torch.randperm(self.grid**2, generator=generator) for generator in generators]
        )
        shuffled = shuffle_patches(images, orders.to(images.device), self.grid)
        return images.unsqueeze(1), shuffled.unsqueeze(1)

    def loss(
        self, net: Bound, views: tuple[Tensor, Tensor], statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Weighted entropy, in nats, mean over the selected images; 0 if there is none.

        The views are images and shuffled images, ``(N, 3, H, W)`` each.
        """
        images, shuffled = views
        logits = net(images).logits
        entropies, largest = entropy(logits), math.log(logits.shape[-1])
        reliable = entropies < self.margin * largest
        if not reliable.any():
            return 0 * entropies.sum(), state
        logits, entropies = logits[reliable], entropies[reliable]
        with torch.no_grad():
            # Only the reliable images form this batch and its statistics, as published.
            difference = label_difference(logits, net(shuffled[reliable]).logits)
            selected = difference > self.plpd_threshold
            weights = (self.weight_margin * largest - entropies).exp() + difference.exp()
            weights = weights * selected
        return (weights * entropies).sum() / selected.sum().clamp_min(1), state


def label_difference(logits: Tensor, shuffled: Tensor) -> Tensor:
    """Fall of the predicted class's probability when the patches are shuffled: ``(N,)``.

    Args:
        logits: of the images, ``(N, K)``.
        shuffled: logits of the shuffled images, ``(N, K)``.
    """
    label = logits.argmax(-1, keepdim=True)
    return (logits.softmax(-1).gather(1, label) - shuffled.softmax(-1).gather(1, label))[:, 0]


def shuffle_patches(images: Tensor, orders: Tensor, grid: int) -> Tensor:
    """Cut images into grid × grid patches and put patch ``orders[b, i]`` at position ``i``.

    If the grid does not divide a side, the image is shrunk to a side that it divides, and stretched
    again afterwards, as in the published code.

    Args:
        images: ``(B, C, H, W)``.
        orders: ``(B, grid²)``; patches are numbered row by row.
        grid: number of patches per side.
    """
    size = images.shape[-2:]
    cut = resize(images, [max(side // grid, 1) * grid for side in size])
    # (B, C, H, W) → (B, C, grid, h, grid, w) → (B, grid², C, h, w)
    patches = cut.unflatten(3, (grid, -1)).unflatten(2, (grid, -1))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    shuffled = patches[torch.arange(len(images), device=images.device)[:, None], orders]
    # (B, grid², C, h, w) → (B, C, grid, h, grid, w) → (B, C, H, W)
    shuffled = shuffled.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5)
    return resize(shuffled.flatten(4, 5).flatten(2, 3), size)


def resize(images: Tensor, size: Sequence[int]) -> Tensor:
    """Resample ``images (B, C, H, W)`` to a size, unless they have it."""
    size = tuple(size)
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)
