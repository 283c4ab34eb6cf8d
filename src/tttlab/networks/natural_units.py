"""Distances in units of natural variation: of a moment's spread between source images."""

import torch
from torch import Tensor

NEVER = 1e-6  # a standard deviation up to this is rounding


def varies(scale: Tensor) -> Tensor:
    """Mark the channels ``(C,)`` whose moment varies between source images at all.

    One that never does has no natural unit. Where a layer has a single position, for example, the
    variance of a single image is zero whatever the image, and that of its views is not.

    Args:
        scale: the moment's standard deviation over source images ``(C,)``.
    """
    return scale > NEVER


def natural_distance(deviation: Tensor, scale: Tensor) -> Tensor:
    """Square a deviation ``(…, C)`` in units of natural variation, mean over channels ``(…)``.

    Channels that never vary are left out; without any other the distance is 0.

    Args:
        deviation: of a moment from the typical source image.
        scale: the moment's standard deviation over source images ``(C,)``.
    """
    varying = varies(scale)
    squares = torch.where(varying, deviation / scale.clamp_min(NEVER), 0).square()
    return squares.sum(-1) / varying.sum().clamp_min(1)
