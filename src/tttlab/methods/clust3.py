"""ClusT3: positions of early feature maps fall into the source clusters, surely and evenly.

Vargas Hakim et al., ICCV 2023, arXiv 2310.12345: minimise H(Z|X) − H(Z), where Z is the cluster
that a linear head gives to the features X at one position of a map. The second entropy is that of
the mean over all positions, here of one image and its views (episodic) or of a batch (online).
Needs nothing from the source domain but the heads.

In params.yaml the rest is the adapter's. The paper's code adapts the first three stages of a
ResNet-50 on batches of 128 un-augmented images, each batch from the source weights on, with
BatchNorm in training mode (nearest: ``normalisation: image``), by Adam with lr 1e-5 and frozen
heads (``trainable: encoder``; stages behind the last head get no gradient), and reports the best of
1 to 100 steps. It adds up the heads' losses; ours takes their mean, which is the same to Adam. Here
the weights go on from batch to batch (online), or every image starts from the source weights
(episodic).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.config.inner_loop import Augmentation
from tttlab.data.views import random_views
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics
from tttlab.objectives.clust3 import lost_information


@dataclass(frozen=True)
class ClusT3Training(Method):
    """Make the clusters at the positions of an image, or of a batch, informative.

    Attributes:
        num_views: V, random views drawn at every step beside the image itself; the paper has none.
    """

    protocols = ("episodic", "online")
    whole_batch = True
    head = "clust3"
    num_views: Annotated[int, Ge(0)] = 0
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Give every image, and fresh views of it: ``(B, 1 + V, 3, H, W)``."""
        if not self.num_views:
            return images.unsqueeze(1)
        drawn = random_views(images, generators, self.num_views, self.augmentation)
        return torch.cat([images.unsqueeze(1), drawn], dim=1)

    def loss(
        self, net: Bound, views: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """H(Z|X) − H(Z) over the positions of ``views (N, 3, H, W)``, of one image or a batch."""
        return lost_information(net(views, branch=True).branch), state
