"""TTT-Linear: the inner model is a linear map, f(k) = k W + b.

Sun et al. 2023, "Learning to (Learn at Test Time)", arXiv 2310.13807. From W = 0, without bias and
normalisation, one full-batch step with lr 1 along the plain gradient gives

    W' = 1/n Σᵢ kᵢᵀ vᵢ,    f'(q) = 1/n Σᵢ (q · kᵢ) vᵢ,

which is linear attention (`tttlab.mixers.linear_attention`, feature map ``identity``).
"""

import torch
from torch import Tensor, nn

from tttlab.config.mixers import InnerTraining
from tttlab.mixers.descent import Initial, Weights, centre, descend, gradient_by_output


class TTTLinear(nn.Module):
    """A linear map for each head, trained on the tokens of one image and then asked.

    Args:
        heads: H.
        width: d, of a head.
        inner: how it is trained.
    """

    def __init__(self, heads: int, width: int, inner: InnerTraining) -> None:
        super().__init__()
        self.inner = inner
        biases = {"bias": (heads, 1, width)} if inner.inner_bias else {}
        self.initial = Initial(inner.learned_init, weight=(heads, width, width), **biases)

    def forward(self, keys: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        """Train on keys and targets, then ask queries; all and the result ``(N, H, L, d)``."""
        return self.model(descend(self, keys, targets), queries)

    def model(self, weights: Weights, tokens: Tensor) -> Tensor:
        """Compute f: ``(N, H, L, d)`` → ``(N, H, L, d)``."""
        return affine(tokens, weights["weight"], weights.get("bias"))

    def gradients(self, weights: Weights, keys: Tensor, targets: Tensor, batch: slice) -> Weights:
        """Differentiate the loss, summed over the tokens of a batch."""
        keys, targets = keys[..., batch, :], targets[..., batch, :]
        norm = self.inner.inner_norm
        outputs = self.model(centred(weights) if norm else weights, keys)
        by_output = gradient_by_output(outputs, targets, norm)
        found = {"weight": keys.mT @ by_output}
        if "bias" in weights:
            found["bias"] = by_output.sum(-2, keepdim=True)
        return found


def centred(weights: Weights) -> Weights:
    """Take the mean over the channels from a map: cheaper than from what it makes of tokens."""
    return {name: centre(value) for name, value in weights.items()}


def affine(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``tokens @ weight + bias`` of tokens ``(N, H, L, d)``, in one operation.

    Args:
        tokens: ``(N, H, L, d)``.
        weight: ``(N, H, d, e)``, or without N: the same for all images.
        bias: ``(N, H, 1, e)``, or without N.
    """
    if bias is None:
        return tokens @ weight
    shape = tokens.shape[:2]
    weight, bias = (value.expand(*shape, *value.shape[-2:]) for value in (weight, bias))
    parts = (value.flatten(0, 1) for value in (bias, tokens, weight))
    return torch.baddbmm(*parts).unflatten(0, shape)
