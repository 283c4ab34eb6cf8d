"""IT3: classify an image that comes with its label, so that a prediction can be given back to the network.

Durasov et al., ICML 2025, arXiv 2410.04201, on the training of their ZigZag: one network f(x, y) is trained to give the
label y both when it gets it, f(x, y) ≈ y, and when it gets a neutral signal instead, f(x, 0) ≈ y. Here the first is this
objective and the second is the classification loss of joint training. It is no self-supervised objective: images without
labels teach it nothing, so that it has no pretraining.

As in the authors' code for CIFAR-10, y is a vector of class probabilities, the neutral one is the uniform distribution, and
what a linear layer makes of it is added to all places of the activation in the middle of the network. Here that layer sees
how far y is from uniform and has no bias, so that f(x, 0) is the network itself: to classify, and for every other method, the
head need not be there. The authors' layer has a bias and a leaky ReLU behind it.

What differs in training: BatchNorm's running statistics are those of images without labels alone, as the network classifies
them (on digits, its loss on clean images is then a third lower). And the authors' code draws for each batch whether the first
of two passes gets the uniform distribution (80 %) or the labels, gives its prediction to the second pass, and adds up the
cross-entropy of both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from tttlab.errors import UserError
from tttlab.networks.network import Network, pooled_features
from tttlab.networks.objective import Objective
from tttlab.networks.stages import stage_places, stage_widths
from tttlab.runtime.ranks import Share


class LabelInjection(nn.Module):
    """What is added to the output of a stage: a linear map from class probabilities, less the uniform ones, to channels."""

    objective = "it3"

    def __init__(self, encoder: nn.Module, num_classes: int, stage: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stage = encoder.feature_info[stage_places(encoder)[stage - 1]]["module"]
        self.embedding = nn.Linear(num_classes, stage_widths(encoder)[stage - 1], bias=False)

    def features_given(self, encoder: nn.Module, images: Tensor, given: Tensor) -> Tensor:
        """Encode images together with class probabilities.

        Args:
            encoder: whose stage it is.
            images: ``(N, 3, H, W)`` as the encoder wants them.
            given: class probabilities ``(N, K)``.

        Returns:
            features ``(N, D)``.

        Raises:
            UserError: the stage does not give one activation.
        """
        added = self.embedding(given.to(self.embedding.weight.dtype) - 1 / self.num_classes)
        reached = []

        def add(_stage: nn.Module, _inputs: tuple, output: Tensor) -> Tensor | None:
            if not isinstance(output, Tensor):
                return None
            reached.append(self.stage)
            last = output.ndim == 3 or getattr(encoder, "output_fmt", "NCHW") == "NHWC"
            places = [1] * (output.ndim - 2)
            return output + (
                added.view(len(added), *places, -1) if last else added.view(*added.shape, *places)
            )

        handle = encoder.get_submodule(self.stage).register_forward_hook(add)
        try:
            with statistics_kept(encoder):
                features = pooled_features(encoder, images)
        finally:
            handle.remove()
        if not reached:
            raise UserError(
                f"objective it3: expected one activation from {self.stage} of this {type(encoder).__name__}, found "
                "none; choose another stage or backbone"
            )
        return features


@contextmanager
def statistics_kept(encoder: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise with the batch's statistics, in training, and leave its running ones as they are."""
    layers = {
        layer: layer.momentum
        for layer in encoder.modules()
        if isinstance(layer, _BatchNorm) and layer.training
    }
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in layers.items():
            layer.momentum = momentum


@dataclass(frozen=True)
class IT3(Objective):
    """The objective of images that come with their labels.

    Attributes:
        stage: number of the stage (residual stage, transformer block) behind which labels come in; None: half of them, rounded
            up: a ResNet's second, with the channels and places that the authors chose in their network.
    """

    stage: int | None = None
    labels = True

    def head(self, encoder: nn.Module, num_classes: int) -> LabelInjection:
        """Build the map from labels to channels.

        Raises:
            UserError: the encoder has fewer stages.
        """
        count = len(stage_places(encoder))
        stage = -(-count // 2) if self.stage is None else self.stage
        if not 1 <= stage <= count:
            raise UserError(
                f"objective.stage: expected null or 1 to {count}, the stages of this {type(encoder).__name__}, found {stage}"
            )
        return LabelInjection(encoder, num_classes, stage)

    def loss(
        self,
        network: Network,
        views: Tensor,
        generator: torch.Generator,
        share: Share | None = None,
        *,
        labels: Tensor,
    ) -> Tensor:
        """Cross-entropy of images that come with their labels.

        Args:
            network: with a `LabelInjection`.
            views: ``(N, 1, 3, H, W)``.
            generator: unused; objectives share one signature.
            share: unused: the whole batch's loss is the mean of the parts'.
            labels: ``(N,)``.

        Returns:
            scalar, mean over images.
        """
        del generator, share
        given = F.one_hot(labels, network.head.num_classes)
        return F.cross_entropy(network(views[:, 0], given=given).logits, labels)
