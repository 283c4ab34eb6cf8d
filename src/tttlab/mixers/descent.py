"""Gradient descent of an inner model on the tokens of one image.

For each head alone, with keys kᵢ = φ xᵢ, targets vᵢ = g xᵢ and the weights w of the inner model f,

    L(w) = 1/n Σᵢ ½ ‖LN(f(kᵢ; w)) − vᵢ‖²        over the n tokens of a step,
    w ← w − lr · ∇L(w) / (‖∇L(w)‖ + 1),

the norm being that of all weights of a head. So no step is longer than lr, at any number of tokens
and any scale of the targets; without `scale_gradient` the denominator is 1.

Everything here is a pure function of tokens and weights, made of PyTorch's ordinary operations: the
outer training differentiates through all of it, as often as it likes, also under ``vmap``.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from tttlab.config.mixers import InnerTraining

EPSILON = 1e-5  # of the normalisation, added to the variance
SPREAD = 0.02  # standard deviation of initial weights, timm's for a transformer

Weights = Mapping[str, Tensor]


class InnerModel(Protocol):
    """What a TTT layer trains; tensors of tokens are ``(N, H, L, d)``."""

    inner: InnerTraining

    def initial(self) -> Weights:
        """Give the weights before the first step, ``(H, …)``."""

    def gradients(self, weights: Weights, keys: Tensor, targets: Tensor, batch: slice) -> Weights:
        """Differentiate the loss, summed over the tokens of a batch: ``(N, H, …)``."""

    def losses(self, weights: Weights, keys: Tensor, targets: Tensor) -> Tensor:
        """Give the mean loss over all tokens, ``(N, H)``."""


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
        """Give all weights by name."""
        return {name: getattr(self, name) for name in self.names}


class Reconstruction(nn.Module):
    """The loss of a token, ½ ‖LN(z) − v‖².

    LN is over a head's channels, with the head's own gain. It has no shift: the bias of g, which
    makes the targets, is one.

    Args:
        heads: H.
        width: d.
        norm: False: LN is left out.
    """

    def __init__(self, heads: int, width: int, norm: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(heads, 1, width)) if norm else None

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of every token: ``(N, H, L, d)``, twice, → ``(N, H, L)``."""
        if self.gain is not None:
            outputs = normalise(outputs)[0] * self.gain
        return (outputs - targets).square().sum(-1) / 2

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Differentiate every token's loss by the inner model's output z: ``(N, H, L, d)``."""
        if self.gain is None:
            return outputs - targets
        normed, reciprocal = normalise(outputs)
        by_normed = (normed * self.gain - targets) * self.gain
        along = (by_normed * normed).mean(-1, keepdim=True)
        return (by_normed - by_normed.mean(-1, keepdim=True) - normed * along) * reciprocal


def normalise(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise over the last dimension; give 1 / deviation ``(…, 1)`` too.

    PyTorch's fused layer norm has no right third derivative, and meta-learned fine-tuning needs
    the second one of a gradient.
    """
    centred = outputs - outputs.mean(-1, keepdim=True)
    reciprocal = (centred.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    return centred * reciprocal, reciprocal


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
    for step in range(inner.inner_steps if steps is None else steps):
        batch = batch_of_step(step, length, inner.inner_batch)
        sums = model.gradients(weights, keys, targets, batch)
        count = batch.stop - batch.start
        if not inner.scale_gradient:
            rate = inner.inner_lr / count
            weights = {name: torch.sub(weights[name], sums[name], alpha=rate) for name in sums}
            continue
        rates = inner.inner_lr / (norms(sums) + count)  # lr · (sum / n) / (‖sum / n‖ + 1)
        weights = {
            name: weights[name] - value * rates.reshape(*rates.shape, *[1] * (value.ndim - 2))
            for name, value in sums.items()
        }
    return weights


def norms(gradients: Weights) -> Tensor:
    """Take the norm of every head's gradients, ``(N, H, …)`` each, together: ``(N, H)``."""
    parts = [torch.linalg.vector_norm(value.flatten(2), dim=-1) for value in gradients.values()]
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)


def batch_of_step(step: int, length: int, size: int | None) -> slice:
    """Choose the tokens of a step, counted from 0; the last batch of the tokens may be smaller."""
    if size is None or size >= length:
        return slice(0, length)
    start = step % -(-length // size) * size
    return slice(start, min(start + size, length))


def losses_along(model: InnerModel, keys: Tensor, targets: Tensor, steps: int) -> Tensor:
    """Give the mean loss over all tokens after 0, 1, … ``steps`` steps: ``(steps + 1, N, H)``."""
    trained = (descend(model, keys, targets, count) for count in range(steps + 1))
    return torch.stack([model.losses(weights, keys, targets) for weights in trained])
