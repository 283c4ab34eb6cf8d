"""ClusT3: the places of early feature maps fall into the clusters that the source network learnt, surely and evenly.

Vargas Hakim et al., ICCV 2023, arXiv 2310.12345: minimise H(Z|X) − H(Z), Z being the cluster that a linear head gives to
the features X at one place of a map; the second entropy is that of the mean over all places, here of one image and its
views (episodic) or of a batch (online). Needs nothing from the source domain but the heads.

In params.yaml the rest is the adapter's. The paper's code adapts the first three stages of a ResNet-50 on batches of 128
images, un-augmented, each batch from the source weights on, BatchNorm in training mode (nearest: ``normalisation: image``),
by Adam with lr 1e-5 and frozen heads (``trainable: encoder``; stages behind the last head get no gradient), and reports the
best of 1 to 100 steps. It adds the heads' losses up, which Adam cannot tell from their mean. Here weights go on from batch
to batch (online), or every image starts from the source's (episodic).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from tttlab.adaptation.method import Method, State
from tttlab.data.views import Augmentation, random_views
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics
from tttlab.objectives.clust3 import lost_information


@dataclass(frozen=True)
class ClusT3Training(Method):
    """Make the clusters of an image's, or a batch's, places informative.

    Attributes:
        num_views: random views drawn at every step beside each image itself; the paper has none.
    """

    protocols = ("episodic", "online")
    whole_batch = True
    head = "clust3"
    num_views: Annotated[int, Ge(0)] = 0
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Give every image and, beside it, fresh views: ``(B, 1 + V, 3, H, W)``."""
        if not self.num_views:
            return images.unsqueeze(1)
        drawn = random_views(images, generators, self.num_views, self.augmentation)
        return torch.cat([images.unsqueeze(1), drawn], dim=1)

    def loss(
        self, net: Bound, views: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Lost information over the places of ``views (N, 3, H, W)``, of one image or of a batch."""
        return lost_information(net(views, branch=True).branch), state
