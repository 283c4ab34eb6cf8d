"""TENT: be sure of the test images, by the normalisation layers' affine parameters.

Wang et al., ICLR 2021, arXiv 2006.10726: minimise the mean entropy of a batch's predictions, with
activations normalised by the batch's own statistics. Nothing is needed of the source domain. In
params.yaml the rest is the adapter's: ``trainable: norm``, ``normalisation: image``,
``adapt.protocol: online``. The paper's code returns the predictions before the step; ours are made
after it.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tttlab.adaptation.method import Method, State, entropy
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


@dataclass(frozen=True)
class TENT(Method):
    """Minimise the mean entropy of the predictions."""

    protocols = ("episodic", "online")
    whole_batch = True

    def loss(
        self, net: Bound, views: Any, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Entropy, in nats, of the class probabilities, mean over ``views (N, 3, H, W)``."""
        return entropy(net(views).logits).mean(), state
