"""The prediction for an image, by its own weights or by the source network's."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tttlab.adaptation.inner_loop import Parameters, over_images
from tttlab.adaptation.method import Method
from tttlab.config.inner_loop import InnerLoop
from tttlab.data.views import log_mean_probabilities, random_views
from tttlab.errors import UserError
from tttlab.networks.classifiers import as_network
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


class Readout:
    """What predictions look at, and what is made of the outputs: here, the class of an image.

    A subclass predicts something else of something else, and the adapter works as before.

    Attributes:
        classifies: whether the network is called with images and gives logits ``(N, K)``.
    """

    classifies: ClassVar[bool] = True

    def network(self, model: nn.Module) -> nn.Module:
        """Put a network behind the interface that the method knows."""
        return as_network(model)

    def looks(self, images: Tensor, loop: InnerLoop, generators: Sequence[torch.Generator]) -> Any:
        """Draw what predictions look at: a pytree of tensors with leading dimension B.

        Args:
            images: ``(B, 3, H, W)``.
            loop: settings of the steps, which say how many views are averaged over.
            generators: B streams, one per image; all randomness comes from them.

        Returns:
            every image before its A random views: ``(B, 1 + A, 3, H, W)``.
        """
        looks = images.unsqueeze(1)
        if not loop.average:
            return looks
        views = random_views(images, generators, loop.average, loop.augmentation)
        return torch.cat([looks, views], dim=1)

    def read(
        self, net: Bound, looks: Any, method: Method, views: Any, statistics: Statistics
    ) -> Tensor:
        """Predict for one image; the adapter vectorises this.

        Args:
            net: the network with this image's parameters.
            looks: this image's part of the result of `looks`, ``(1 + A, 3, H, W)``.
            method: makes the prediction if A = 0.
            views: what the method drew for the first step; None if its prediction needs none.
            statistics: source statistics.

        Returns:
            logits ``(K,)``; with A > 0 log-probabilities.
        """
        if len(looks) > 1:
            return log_mean_probabilities(net(looks).logits)
        return method.predict(net, looks[0], views, statistics)


CLASSES = Readout()


@torch.no_grad()
def predict(
    net: Bound,
    parameters: Parameters,
    looks: Any,
    views: Any,
    method: Method,
    statistics: Statistics,
    readout: Readout = CLASSES,
) -> Tensor:
    """Predict for every image by its own parameters: logits ``(B, K)``.

    Args:
        net: the source network, from `tttlab.adaptation.trainable.bind`.
        parameters: name → ``(B, *shape)``; the source network's take the place of missing ones.
        looks: from `Readout.looks`.
        views: what the method drew for the first step; None if its prediction needs none.
        method: makes the prediction, where the readout leaves it to it.
        statistics: source statistics.
        readout: says what a prediction is.
    """

    def predict_one(parameters: Parameters, looks: Any, views: Any) -> Tensor:
        return readout.read(net.rebound(parameters), looks, method, views, statistics)

    in_dims = (0, 0, None if views is None else 0)
    return over_images(predict_one, in_dims)(parameters, looks, views)


def predict_by_source(net: Bound, looks: Any, readout: Readout = CLASSES) -> Tensor:
    """Predict by the source network, for each image on its own: logits ``(B, K)``.

    Args:
        net: the source network.
        looks: from `Readout.looks`; of a classifier images ``(B, 1, C, H, W)``.
        readout: says what a prediction is.

    Raises:
        UserError: the network cannot be vectorised over images.
    """
    try:
        return predict(net, {}, looks, None, Method(), {}, readout)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if "vmap" not in reason and "batching rule" not in reason.lower():
            raise
        kind = type(getattr(net.module, "encoder", net.module)).__name__
        raise UserError(
            f"this {kind} cannot be called for many images at once, as per-image "
            f"adaptation does ({reason}); its forward must not branch on values, draw random "
            "numbers or write to buffers"
        ) from error
