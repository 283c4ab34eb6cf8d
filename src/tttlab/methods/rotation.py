"""Rotation: views of the image are turned at random, and the network is trained to say by how much.

Sun et al., ICML 2020, arXiv 1909.13231: cross-entropy of four turns on augmented copies of one
image. Each copy is turned at random and anew at every step. The turn is predicted by the branch
that the network was trained with. The branch and the stages that it shares with the classifier are
trained, the classifier never is. Needs nothing from the source domain but that branch.

In params.yaml the rest is the adapter's. The paper's code takes 10 steps of plain SGD with lr 1e-3
on 32 copies (episodic), or one per image (online), of the shared part and the branch:
``trainable: all``; its flag that leaves the branch alone is ``trainable: encoder``. The paper's
networks have GroupNorm; with BatchNorm its code uses and keeps the copies' statistics (nearest:
``normalisation: image``). Here the copies are crops, mirror images and brightness of
`tttlab.data.views`, and the turns are drawn from the image's own stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.adaptation.method import Method, State
from tttlab.config.inner_loop import Augmentation
from tttlab.data.views import random_views
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics
from tttlab.objectives.rotation import TURNS, rotate


@dataclass(frozen=True)
class RotationTraining(Method):
    """Classify the turns of one image's views.

    Attributes:
        num_views: V, views drawn and turned at every step.
    """

    protocols = ("episodic", "online")
    head = "rotation"
    num_views: Annotated[int, Ge(1)] = 32
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Draw fresh ``images (B, V, 3, S, S)``, turned by 90° · ``labels (B, V)``."""
        views = random_views(images, generators, self.num_views, self.augmentation)
        size = (self.num_views,)
        draws = [torch.randint(TURNS, size, generator=generator) for generator in generators]
        labels = torch.stack(draws).to(images.device)
        return {"images": rotate(views, labels), "labels": labels}

    def loss(
        self, net: Bound, views: dict[str, Tensor], statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Cross-entropy of the turns, mean over ``images (V, 3, S, S)`` with ``labels (V,)``."""
        return F.cross_entropy(net(views["images"], branch=True).branch, views["labels"]), state
