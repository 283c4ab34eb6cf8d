"""The prediction of an image by its own weights, over the views that it is averaged over, and by the source network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tttlab.adaptation.inner_loop import InnerLoop, Parameters, over_images
from tttlab.adaptation.method import Method
from tttlab.data.views import log_mean_probabilities, random_views
from tttlab.errors import UserError
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


@torch.no_grad()
def predict(
    net: Bound,
    parameters: Parameters,
    looks: Tensor,
    views: Any,
    method: Method,
    statistics: Statistics,
) -> Tensor:
    """Classify every image with its own parameters: logits ``(B, K)``.

    Args:
        net: the source network, as `bind` binds it.
        parameters: name → ``(B, *shape)``; those that are not among them are the source network's.
        looks: the image and the views to average over ``(B, 1 + A, 3, H, W)``; with A > 0 the result are log-probabilities.
        views: what the method drew last, None if it needs none.
        method: whose prediction it is, unless views are averaged.
        statistics: source statistics.
    """

    def one(parameters: dict[str, Tensor], looks: Tensor, views: Any) -> Tensor:
        own = net.rebound(parameters)
        if len(looks) > 1:
            return log_mean_probabilities(own(looks).logits)
        return method.predict(own, looks[0], views, statistics)

    return over_images(one, in_dims=(0, 0, None if views is None else 0))(parameters, looks, views)


def draw_looks(images: Tensor, loop: InnerLoop, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw what predictions look at: every image itself, and the views to average over ``(B, 1 + A, 3, H, W)``."""
    looks = images.unsqueeze(1)
    if not loop.average:
        return looks
    return torch.cat(
        [looks, random_views(images, generators, loop.average, loop.augmentation)], dim=1
    )


def predict_by_source(net: Bound, images: Tensor) -> Tensor:
    """Classify images ``(B, C, H, W)`` by the source network, each on its own: logits ``(B, K)``.

    Raises:
        UserError: the network cannot be vectorised over images.
    """
    try:
        return predict(net, {}, images.unsqueeze(1), None, Method(), {})
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if "vmap" not in reason and "batching rule" not in reason.lower():
            raise
        raise UserError(
            f"this {type(net.module.encoder).__name__} cannot be called for many images at once, as per-image "
            f"adaptation does ({reason}); its forward must not branch on values, draw random numbers or write to "
            "buffers"
        ) from error
