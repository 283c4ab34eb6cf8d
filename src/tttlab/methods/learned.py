"""A learned task at test time: reconstruct what training found worth reconstructing.

After Sun et al. 2023 ("Learning to (Learn at Test Time)", arXiv 2310.13807), for the whole network
in place of one layer: the head's decoder and its projection of the pixels were trained so that a
step on this loss lowers the classification loss; see `tttlab.objectives.learned`. Take the step
that training took: the same ``steps``, ``lr`` and ``trainable``, plain SGD, and ``clip: 10.0``.
"""

from dataclasses import dataclass

from torch import Tensor

from tttlab.adaptation.method import Method, State
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics
from tttlab.objectives.learned import reconstruction_error


@dataclass(frozen=True)
class LearnedTraining(Method):
    """Lower the learned reconstruction error of the image itself."""

    protocols = ("episodic", "online")
    head = "learned"

    def loss(
        self, net: Bound, views: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Compute the error of the reconstruction of ``views (1, 3, H, W)``."""
        return reconstruction_error(*net(views, branch=True).branch), state
