"""TTT-MLP: the inner model has a hidden layer, f(k) = gelu(k W₁ + b₁) W₂ + b₂.

Sun et al. 2023, "Learning to (Learn at Test Time)", arXiv 2310.13807; the hidden layer is
four times as wide as a head. Its initial weights must be learned: from zero no gradient would ever
reach them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.config.mixers import InnerTraining
from tttlab.errors import UserError
from tttlab.mixers.descent import Initial, Weights, descend, gradient_by_output
from tttlab.mixers.ttt_linear import affine, centred

RATIO = 4  # width of the hidden layer ÷ width of a head


class TTTMLP(nn.Module):
    """A perceptron of two layers for each head, trained on the tokens of one image and then asked.

    Args:
        heads: H.
        width: d, of a head.
        inner: how it is trained.

    Raises:
        UserError: its weights are to start at zero.
    """

    def __init__(self, heads: int, width: int, inner: InnerTraining) -> None:
        super().__init__()
        if not inner.learned_init:
            raise UserError(
                "mixer.learned_init: ttt_mlp needs true, for an MLP whose weights are all zero has "
                "no gradient, found false"
            )
        self.inner, hidden = inner, RATIO * width
        shapes = {"weight_1": (heads, width, hidden), "weight_2": (heads, hidden, width)}
        if inner.inner_bias:
            shapes |= {"bias_1": (heads, 1, hidden), "bias_2": (heads, 1, width)}
        self.initial = Initial(True, **shapes)

    def forward(self, keys: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        """Train on keys and targets, then ask queries; all and the result ``(N, H, L, d)``."""
        return self.model(descend(self, keys, targets), queries)

    def model(self, weights: Weights, tokens: Tensor) -> Tensor:
        """Compute f: ``(N, H, L, d)`` → ``(N, H, L, d)``."""
        hidden = F.gelu(affine(tokens, weights["weight_1"], weights.get("bias_1")))
        return affine(hidden, weights["weight_2"], weights.get("bias_2"))

    def gradients(self, weights: Weights, keys: Tensor, targets: Tensor, batch: slice) -> Weights:
        """Differentiate the loss, summed over the tokens of a batch."""
        keys, targets = keys[..., batch, :], targets[..., batch, :]
        norm, last = self.inner.inner_norm, {"weight": weights["weight_2"]}
        if "bias_2" in weights:
            last["bias"] = weights["bias_2"]
        if norm:
            last = centred(last)
        before = affine(keys, weights["weight_1"], weights.get("bias_1"))
        hidden = F.gelu(before)
        by_output = gradient_by_output(affine(hidden, **last), targets, norm)
        by_before = torch.ops.aten.gelu_backward(by_output @ last["weight"].mT, before)
        found = {"weight_1": keys.mT @ by_before, "weight_2": hidden.mT @ by_output}
        if "bias_1" in weights:
            found["bias_1"] = by_before.sum(-2, keepdim=True)
            found["bias_2"] = by_output.sum(-2, keepdim=True)
        return found
