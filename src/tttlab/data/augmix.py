"""AugMix views of many images, each from its own random stream; the operations are torchvision's.

Hendrycks et al., ICLR 2020, arXiv 1912.02781: a view is a mixture of the image and of three chains
of one to three operations each. They are shears, shifts, turns, posterising, solarising, automatic
contrast and equalising: those that are no corruption of the benchmark, as the paper has it. MEMO's
published views are of this kind.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tttlab.config.inner_loop import Augmentation
from tttlab.data.views import random_views
from tttlab.errors import UserError
from tttlab.seeding import global_stream

SEVERITY = 3  # the paper's


def draw_views(
    kind: str,
    images: Tensor,
    generators: Sequence[torch.Generator],
    count: int,
    augmentation: Augmentation,
) -> Tensor:
    """Draw ``count`` views of every image.

    Args:
        kind: ``crops``, those of `random_views` | ``augmix``: the same crops, then AugMix.
        images: ``(B, 3, H, W)`` in [0, 1].
        generators: one CPU stream per image.
        count: V, views per image.
        augmentation: of the crops.

    Returns:
        ``(B, V, 3, H, W)``; those of ``augmix`` have 256 tones.

    Raises:
        UserError: AugMix is to be drawn of images that are not in [0, 1].
    """
    views = random_views(images, generators, count, augmentation)
    if kind == "crops":
        return views
    darkest, brightest = images.aminmax()
    if darkest < 0 or brightest > 1:
        raise UserError(
            "kind: augmix works on images in [0, 1], "
            f"found values from {darkest:.3g} to {brightest:.3g}; "
            "let the network normalise its images itself, or set kind: crops"
        )
    seeds = [torch.randint(2**62, (count,), generator=generator) for generator in generators]
    # On the CPU: torchvision draws from the global streams, of which each device has its own.
    tones = (255 * views.clamp(0, 1)).round().to(torch.uint8).cpu()
    mixed = torch.stack(
        [
            torch.stack([mix_one(view, int(seed)) for view, seed in zip(*pair, strict=True)])
            for pair in zip(tones, seeds, strict=True)
        ]
    )
    return mixed.to(images) / 255


def augmix(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Mix one image ``(H, W, 3)`` uint8 by the image's own stream, as training shows it."""
    image = torch.from_numpy(pixels.copy()).movedim(-1, 0)  # the file behind them is read-only
    return mix_one(image, int(generator.integers(2**62))).movedim(0, -1).numpy()


def mix_one(view: Tensor, seed: int) -> Tensor:
    """Mix one view ``(3, H, W)`` uint8; the global random state does not change."""
    with global_stream(seed):
        return _transform()(view)


@cache
def _transform() -> Callable[[Tensor], Tensor]:
    from torchvision.transforms.v2 import AugMix  # a second of imports, for few methods

    return AugMix(severity=SEVERITY, all_ops=False)
