"""AWS: contrast the stream's images, stay near the self-supervised model, and learn from it.

Han, Park, Han and Hwang, 2025, arXiv 2506.23529, "Adapt Without Source pretraining": test-time
adaptation of an encoder that was trained by self-supervision alone (here ``finetune.mode: linear``,
a classifier on the frozen encoder). Two models see each batch, the adapted one and the
self-supervised one, which is here the network with its source weights and never changes:

    loss = contrastive·NT-Xent + distillation·(1 − cos)
           + mutual·(cross-entropy − mutual information)

``NT-Xent``             of two views of every image against the other images of the batch; of the
                        projections where the network has a SimCLR head, else of the features, so
                        that the method works with any backbone.
``1 − cos``             between both models' features of the un-augmented image.
``cross-entropy``       of the adapted model's class probabilities under the source network's.
``mutual information``  between the classes that the two models give the images, from the batch's
                        mean joint probabilities Σₙ pₙ qₙᵀ / N. It is high where the models agree,
                        are sure, and do not give all images one class.

At the source weights the second and the third term have no gradient. A single image has no
negatives and no mutual information. A batch of one is therefore only drawn back to the source
network, and a stream of such batches never leaves it.

REBUILT, NOT REPRODUCED: the paper's body, tables and code were not available. Its abstract and
public reviews name contrastive learning, distillation from the self-supervised model to keep its
generality, and mutual learning (a review: Eq. 5 joins mutual information and cross-entropy),
weighted by λs. Our reading are the form of every term, the equal weights, the prediction by the
adapted model, and that the self-supervised model never changes. According to a review, the latter's
*classifier* is frozen and the adapted model's is not: in the paper its encoder may learn as well,
and so may the adapted classifier, which is ``trainable: [encoder, classifier]``. The paper
classifies by cosine similarity to class means of labeled source features; here a linear layer was
fitted to these features.

Nothing is measured on the source domain. lr, steps, trainable and normalisation are the adapter's;
a review names a search over the learning rates 1e-3 to 1e-6, times batch size / 64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.adaptation.method import Method, State
from tttlab.config.inner_loop import Augmentation
from tttlab.data.views import random_views
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics
from tttlab.objectives.simclr import nt_xent


@dataclass(frozen=True)
class AWS(Method):
    """Refine a self-supervised network's features on a stream, taught by its source weights.

    Attributes:
        contrastive: weight of the contrastive term.
        distillation: weight of the distillation term.
        mutual: weight of the mutual-learning term.
        temperature: τ of NT-Xent.
    """

    protocols = ("online",)
    features = True
    whole_batch = True
    contrastive: Annotated[float, Ge(0)] = 1.0
    distillation: Annotated[float, Ge(0)] = 1.0
    mutual: Annotated[float, Ge(0)] = 1.0
    temperature: Annotated[float, Gt(0)] = 0.5
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Give the ``images (B, 1, 3, H, W)`` and fresh ``pairs (B, 2, 3, H, W)`` of views."""
        return {
            "images": images.unsqueeze(1),
            "pairs": random_views(images, generators, 2, self.augmentation),
        }

    def loss(
        self, net: Bound, views: dict[str, Tensor], statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Weighted sum of the terms for ``images (N, 3, H, W)`` and ``pairs (2N, 3, H, W)``.

        The two views of an image follow each other.
        """
        # Two passes: batch statistics of the images must not depend on the views, since the source
        # network sees the images alone.
        adapted, pairs = net(views["images"]), net(views["pairs"])
        with torch.no_grad():
            source = net.module(views["images"])
        embeddings = pairs.features if pairs.projections is None else pairs.projections
        loss = (
            self.contrastive * nt_xent(embeddings.unflatten(0, (-1, 2)), self.temperature)
            + self.distillation * feature_distance(adapted.features, source.features)
            + self.mutual * mutual_learning(adapted.logits, source.logits)
        )
        return loss, state


def feature_distance(features: Tensor, source: Tensor) -> Tensor:
    """1 − cosine similarity of ``features (N, D)`` to the source network's, mean over images."""
    return (1 - F.cosine_similarity(features, source)).mean()


def mutual_learning(logits: Tensor, source: Tensor) -> Tensor:
    """Cross-entropy under the source network's predictions, minus mutual information with them.

    Args:
        logits: ``(N, K)``, of the adapted model.
        source: ``(N, K)``, logits of the source network.
    """
    targets = source.softmax(-1)
    return F.cross_entropy(logits, targets) - mutual_information(targets, logits.softmax(-1))


def mutual_information(first: Tensor, second: Tensor) -> Tensor:
    """Mutual information, in nats, of two labellings with class probabilities ``(N, K)``."""
    joint = first.T @ second / len(first)
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    smallest = torch.finfo(joint.dtype).tiny  # so that 0·log 0 and its gradient are 0
    return (joint * (joint.clamp_min(smallest).log() - independent.clamp_min(smallest).log())).sum()
