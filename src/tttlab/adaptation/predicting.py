"""The prediction of an image, by its own weights or by the source network's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tttlab.adaptation.inner_loop import Parameters, over_images
from tttlab.adaptation.method import Method
from tttlab.config.inner_loop import InnerLoop
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
        net: the source network, from `tttlab.adaptation.trainable.bind`.
        parameters: name → ``(B, *shape)``; the source network's take the place of missing ones.
        looks: every image followed by its views to average over, ``(B, 1 + A, 3, H, W)``, from
            `draw_looks`. With A > 0 the results are log-probabilities.
        views: what the method drew last; None if its prediction needs none.
        method: makes the prediction if A = 0.
        statistics: source statistics.
    """

    def predict_one(parameters: Parameters, looks: Tensor, views: Any) -> Tensor:
        adapted = net.rebound(parameters)
        if len(looks) > 1:
            return log_mean_probabilities(adapted(looks).logits)
        return method.predict(adapted, looks[0], views, statistics)

    in_dims = (0, 0, None if views is None else 0)
    return over_images(predict_one, in_dims)(parameters, looks, views)


def draw_looks(images: Tensor, loop: InnerLoop, generators: Sequence[torch.Generator]) -> Tensor:
    """Put every image before its A random views to average over: ``(B, 1 + A, 3, H, W)``."""
    looks = images.unsqueeze(1)
    if not loop.average:
        return looks
    views = random_views(images, generators, loop.average, loop.augmentation)
    return torch.cat([looks, views], dim=1)


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
            f"this {type(net.module.encoder).__name__} cannot be called for many images at once, "
            f"as per-image adaptation does ({reason}); its forward must not branch on values, draw "
            "random numbers or write to buffers"
        ) from error
