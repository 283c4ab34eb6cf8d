"""IT3: classify an image given its label, so that a prediction can be fed back to the network.

Durasov et al., ICML 2025, arXiv 2410.04201, with the training of their ZigZag: one network f(x, y)
is trained to predict the label y both given y, f(x, y) ≈ y, and given a neutral signal instead,
f(x, 0) ≈ y. Here the first term is this objective, and the second is the classification loss of
joint training. The objective needs labels, so it has no self-supervised pretraining.

As in the authors' code for CIFAR-10, y is a vector of class probabilities, the neutral signal is
the uniform distribution, and a linear layer's output is added to all positions of the activation in
the middle of the network. Here the layer's input is y minus the uniform distribution and it has no
bias, so that f(x, 0) is the network without this head, which classification and all other methods
use. The authors' layer has a bias, followed by a leaky ReLU.

The training differs in two ways. BatchNorm's running statistics are measured only on images without
labels, as at classification (on digits, this lowers the loss on clean images by a third). The
authors' code draws for each batch whether the first of two passes gets the uniform distribution
(80 %) or the labels, feeds its prediction to the second pass, and adds both cross-entropies.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from tttlab.errors import UserError
from tttlab.networks.network import Network, pooled_features
from tttlab.networks.objective import Objective
from tttlab.networks.stages import find_stage_indices, stage_widths
from tttlab.runtime.ranks import Share


class LabelInjection(nn.Module):
    """Adds to a stage's output a linear map of the class probabilities minus the uniform ones."""

    objective = "it3"

    def __init__(self, encoder: nn.Module, num_classes: int, stage: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stage = encoder.feature_info[find_stage_indices(encoder)[stage - 1]]["module"]
        self.embedding = nn.Linear(num_classes, stage_widths(encoder)[stage - 1], bias=False)

    def features_given(self, encoder: nn.Module, images: Tensor, given: Tensor) -> Tensor:
        """Encode images together with class probabilities.

        Args:
            encoder: the encoder.
            images: ``(N, 3, H, W)``, standardised for the encoder.
            given: class probabilities ``(N, K)``.

        Returns:
            features ``(N, D)``.

        Raises:
            UserError: the stage's output is not a single tensor.
        """
        offsets = self.embedding(given.to(self.embedding.weight.dtype) - 1 / self.num_classes)
        reached = []

        def add(_stage: nn.Module, _inputs: tuple, output: Tensor) -> Tensor | None:
            if not isinstance(output, Tensor):
                return None
            reached.append(self.stage)
            positions = [1] * (output.ndim - 2)
            if output.ndim == 3 or getattr(encoder, "output_fmt", "NCHW") == "NHWC":
                return output + offsets.view(len(offsets), *positions, -1)  # channels last
            return output + offsets.view(*offsets.shape, *positions)

        handle = encoder.get_submodule(self.stage).register_forward_hook(add)
        try:
            with statistics_kept(encoder):
                features = pooled_features(encoder, images)
        finally:
            handle.remove()
        if not reached:
            raise UserError(
                f"objective it3: expected one activation from {self.stage} "
                f"of this {type(encoder).__name__}, found none; choose another stage or backbone"
            )
        return features


@contextmanager
def statistics_kept(encoder: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics unchanged in training, inside the context."""
    momenta = {
        layer: layer.momentum
        for layer in encoder.modules()
        if isinstance(layer, _BatchNorm) and layer.training
    }
    try:
        for layer in momenta:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum


@dataclass(frozen=True)
class IT3(Objective):
    """The objective of classifying images given their labels.

    Attributes:
        stage: number of the stage (residual stage, transformer block) after which the labels enter;
            None: half the number of stages, rounded up. For a ResNet this is the second stage, with
            the channels and positions of the authors' choice.
    """

    stage: Annotated[int, Ge(1)] | None = None
    labels = True

    def head(self, encoder: nn.Module, num_classes: int) -> LabelInjection:
        """Build the map from labels to channels.

        Raises:
            UserError: the encoder does not have this stage.
        """
        count = len(find_stage_indices(encoder))
        stage = math.ceil(count / 2) if self.stage is None else self.stage
        if not 1 <= stage <= count:
            raise UserError(
                f"objective.stage: expected null or 1 to {count}, "
                f"the stages of this {type(encoder).__name__}, found {stage}"
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
        """Compute the cross-entropy of images given their labels.

        Args:
            network: with a `LabelInjection`.
            views: ``(N, 1, 3, H, W)``.
            generator: unused; objectives share one signature.
            share: unused; the whole batch's loss is the mean of the parts' losses.
            labels: ``(N,)``.

        Returns:
            scalar, mean over images.
        """
        del generator, share
        given = F.one_hot(labels, network.head.num_classes)
        return F.cross_entropy(network(views[:, 0], given=given).logits, labels)
