"""IT3: what the network says of an image should not change when the network is told it.

Durasov et al., ICML 2025, arXiv 2410.04201: the network f(x, y) takes an image and class probabilities, neutral ones at
first, and was trained to give the label either way. Its prediction y₀ = f(x, 0) is given back to it, y₁ = F(x, y₀), and the
distance between the two is minimised, until telling it changes nothing (f(x, ·) is idempotent). F has the frozen weights of
the source network, else it could learn to repeat whatever it is told; the gradient goes into f's weights through y₀ both as
what is compared and as what is given. The prediction is f(x, 0). Needs nothing from the source domain but the layer that
takes the probabilities in, which is why the network must be fine-tuned with objective it3.

That is the paper, and the authors' code for MNIST. Their code for CIFAR-10, and torch-ttt, use f for both and differentiate
both: ``second: adapted``. Their distance is between probabilities, ``ag`` for images, the squared one in torch-ttt; for small
distances ``js`` and ``ag`` agree, but only ``ag`` has no bound.

In params.yaml the rest is the adapter's. The authors' code takes one step (CIFAR-10) or 11 (MNIST) of Adam with lr 1e-3 on
batches of 64 images, each from the source weights on, of all weights (``trainable: all``), with BatchNorm in training mode
(nearest: ``normalisation: image``). It compares that with the network in evaluation mode, so that its gain holds the one of
the batch's statistics. What differs: it reports the accuracy of y₁ as it was before the last step; here an image alone, or a
stream whose weights go on; the paper's variant for streams has F follow f by a moving average, here it stays.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tttlab.adaptation.method import Method, State
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


@dataclass(frozen=True)
class IT3Training(Method):
    """Make an image's prediction a fixed point.

    Attributes:
        second: the weights of the second application: the source network's, frozen, or the adapted ones.
        distance: between the two predictions: ``js`` Jensen–Shannon's divergence, ``ag`` the arithmetic–geometric one, ``l2``
            the squared Euclidean distance of the probabilities.
    """

    protocols = ("episodic", "online")
    head = "it3"
    second: Literal["source", "adapted"] = "source"
    distance: Literal["js", "ag", "l2"] = "js"

    def loss(
        self, net: Bound, views: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Distance between the prediction for ``views (1, 3, H, W)`` and that of the network which is told it."""
        logits = net(views).logits
        second = net.rebound(net.source) if self.second == "source" else net
        again = second(views, given=logits.softmax(-1)).logits
        return distance(logits, again, self.distance), state


def distance(first: Tensor, second: Tensor, kind: str) -> Tensor:
    """Measure how far the class probabilities p, q of two ``logits (N, K)`` are apart.

    With m = (p + q) / 2 and divergences in nats, ``js``: (KL(p‖m) + KL(q‖m)) / 2, at most log 2; ``ag``:
    (KL(m‖p) + KL(m‖q)) / 2; ``l2``: Σ (p − q)².

    Returns:
        scalar, mean over images.
    """
    logs = first.log_softmax(-1), second.log_softmax(-1)
    p, q = (log.exp() for log in logs)
    if kind == "l2":
        return (p - q).square().sum(-1).mean()
    log_m = logs[0].logaddexp(logs[1]) - math.log(2)
    if kind == "ag":
        return (log_m.exp() * (log_m - (logs[0] + logs[1]) / 2)).sum(-1).mean()
    return (p * (logs[0] - log_m) + q * (logs[1] - log_m)).sum(-1).mean() / 2
