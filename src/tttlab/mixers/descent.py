"""Gradient descent of an inner model on the tokens of one image.

For each head alone, with keys kᵢ = φ xᵢ, targets vᵢ = g xᵢ and the inner model f, whose
weights are w,

    L(w) = 1/n Σᵢ ½ ‖LN(f(kᵢ; w)) − vᵢ‖²        over the n tokens of a step,
    w ← w − lr · ∇L(w) / (‖∇L(w)‖ + 1),

the norm being that of all weights of a head. So no step is longer than lr, at any number of tokens
and any scale of the targets; without `scale_gradient` the denominator is 1. LN has neither gain nor
shift: g is learned, so targets have any scale.

Everything here is a pure function of tokens and weights, made of PyTorch's ordinary operations: the
outer training differentiates through all of it, as often as it likes, also under ``vmap``.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from tttlab.config.mixers import InnerTraining
from tttlab.runtime.precision import at_least_single

EPSILON = 1e-5  # of LN, added to the variance
SPREAD = 0.02  # standard deviation of initial weights, timm's for a transformer

Weights = Mapping[str, Tensor]


class InnerModel(Protocol):
    """What a TTT layer trains; tensors of tokens are ``(N, H, L, d)``."""

    inner: InnerTraining

    def initial(self) -> Weights:
        """Give the weights before the first step, ``(H, …)``."""

    def model(self, weights: Weights, tokens: Tensor) -> Tensor:
        """Compute f."""

    def gradients(self, weights: Weights, keys: Tensor, targets: Tensor, batch: slice) -> Weights:
        """Differentiate the loss, summed over the tokens of a batch: ``(N, H, …)``.

        With LN the targets come without their mean over the channels, which no output can reach.
        """


class Initial(nn.Module):
    """Weights that an inner model starts from: learned by the outer training, or zero.

    Learned ones start as normal with deviation `SPREAD`, biases at 0.

    Args:
        learned: whether they are learned.
        shapes: name → shape, by head; names of biases begin with ``bias``.
    """

    def __init__(self, learned: bool, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            value = torch.zeros(shape)
            if not learned:
                self.register_buffer(name, value, persistent=False)
                continue
            if not name.startswith("bias"):
                nn.init.normal_(value, std=SPREAD)
            self.register_parameter(name, nn.Parameter(value))

    def forward(self) -> dict[str, Tensor]:
        """Give all weights by name, in single precision at least, as tokens come."""
        return {name: at_least_single(getattr(self, name)) for name in self.names}


def centre(values: Tensor) -> Tensor:
    """Subtract the mean over the last dimension."""
    return values - values.mean(-1, keepdim=True)


def token_losses(outputs: Tensor, targets: Tensor, norm: bool) -> Tensor:
    """Compute every token's loss: ``(N, H, L, d)``, twice, → ``(N, H, L)``."""
    if norm:
        outputs = centre(outputs)
        outputs = outputs * (outputs.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    return (outputs - targets).square().sum(-1) / 2


def gradient_by_output(centred: Tensor, targets: Tensor, norm: bool) -> Tensor:
    """Differentiate every token's loss by the inner model's output: ``(N, H, L, d)``.

    The gradient of ½ ‖LN(z) − v‖² by z is, with c = z − mean(z), r = 1 / √(mean(c²) + ε) and
    means over the d channels,

        r² (1 + r mean(c v) − r² mean(c²)) c − r v        if the mean of v is 0.

    This form passes over the tokens half as often as one that makes LN(z) first. (PyTorch's fused
    layer norm has no right third derivative, which meta-learned fine-tuning needs.)

    Args:
        centred: the outputs z; with LN, c.
        targets: v; with LN, without their mean.
        norm: whether there is LN.
    """
    if not norm:
        return centred - targets
    width = centred.shape[-1]
    square = (centred * centred).sum(-1, keepdim=True) / width
    product = (centred * targets).sum(-1, keepdim=True) / width
    reciprocal = (square + EPSILON).rsqrt()
    factor = reciprocal.square() * (1 + reciprocal * (product - reciprocal * square))
    return torch.addcmul(centred * factor, targets, reciprocal, value=-1)


def descend(model: InnerModel, keys: Tensor, targets: Tensor, steps: int | None = None) -> Weights:
    """Train an inner model on the tokens of every image.

    Args:
        model: the inner model with its settings.
        keys: ``(N, H, L, d)``.
        targets: ``(N, H, L, d)``.
        steps: how many; None: as many as the settings say.

    Returns:
        name → ``(N, H, …)``, each image's own weights.
    """
    inner, weights, length = model.inner, model.initial(), keys.shape[-2]
    if inner.inner_norm:
        targets = centre(targets)
    for step in range(inner.inner_steps if steps is None else steps):
        batch = batch_of_step(step, length, inner.inner_batch)
        sums = model.gradients(weights, keys, targets, batch)
        weights = update(weights, sums, batch.stop - batch.start, inner)
    return weights


def update(weights: Weights, sums: Weights, count: int, inner: InnerTraining) -> Weights:
    """Take a step along gradients that are summed over ``count`` tokens."""
    if not inner.scale_gradient:
        rate = inner.inner_lr / count
        return {name: torch.sub(weights[name], value, alpha=rate) for name, value in sums.items()}
    parts = [torch.linalg.vector_norm(value.flatten(2), dim=-1) for value in sums.values()]
    norms = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)
    rates = inner.inner_lr / (norms + count)  # lr · (sum / n) / (‖sum / n‖ + 1), by head
    return {
        name: torch.addcmul(
            weights[name], value, rates.reshape(*rates.shape, *[1] * (value.ndim - 2)), value=-1
        )
        for name, value in sums.items()
    }


def batch_of_step(step: int, length: int, size: int | None) -> slice:
    """Choose the tokens of a step, counted from 0; the last batch of the tokens may be smaller."""
    if size is None or size >= length:
        return slice(0, length)
    start = step % -(-length // size) * size
    return slice(start, min(start + size, length))


def mean_losses(model: InnerModel, weights: Weights, keys: Tensor, targets: Tensor) -> Tensor:
    """Give the mean loss over all tokens, ``(N, H)``."""
    return token_losses(model.model(weights, keys), targets, model.inner.inner_norm).mean(-1)


def losses_along(model: InnerModel, keys: Tensor, targets: Tensor, steps: int) -> Tensor:
    """Give the mean loss over all tokens after 0, 1, … ``steps`` steps: ``(steps + 1, N, H)``."""
    trained = (descend(model, keys, targets, count) for count in range(steps + 1))
    return torch.stack([mean_losses(model, weights, keys, targets) for weights in trained])
