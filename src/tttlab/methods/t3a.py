"""T3A: classify by the centroids of what the classifier was surest of so far.

Iwasawa and Matsuo, NeurIPS 2021 (Test-Time Classifier Adjustment Module): every class begins with
its weight vector as its only support. Each image of the stream joins the supports of the class that
the classifier predicts. Every class keeps the ``filter_size`` supports with the lowest entropy.
Nothing is trained, and nothing is needed of the source domain.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.adaptation.method import Method, State, entropy
from tttlab.networks.classifiers import linear_classifier
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics


class Supports(NamedTuple):
    """S supports: ``features (S, D)`` of length 1, ``classes (S,)`` and ``entropies (S,)``."""

    features: Tensor
    classes: Tensor
    entropies: Tensor


@dataclass(frozen=True)
class T3A(Method):
    """Classify by centroids of confident features.

    Attributes:
        filter_size: M, largest number of supports of a class.
    """

    protocols = ("online",)
    features = True
    trains = False
    filter_size: Annotated[int, Ge(1)] = 100

    def check(self, network: nn.Module) -> None:
        """Refuse a network whose classifier is not linear: it has no weight vector per class."""
        super().check(network)
        linear_classifier(network)

    def predict_batch(
        self, net: Bound, images: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Add the batch to the supports, and compare its features with their centroids."""
        outputs, classifier = net(images), linear_classifier(net.module)
        past = state or supports_of(classifier.weight, classifier(classifier.weight))
        batch = supports_of(outputs.features, outputs.logits)
        # An image that gives no number would make every centroid none, for good.
        usable = batch.features.isfinite().all(-1) & batch.entropies.isfinite()
        batch = Supports(*(part[usable] for part in batch))
        joined = Supports(*map(torch.cat, zip(past, batch, strict=True)))
        supports = most_confident(joined, self.filter_size)
        members = F.one_hot(supports.classes, outputs.logits.shape[1]).to(supports.features)
        centroids = F.normalize(supports.features.T @ members, dim=0)
        return outputs.features @ centroids, supports


def supports_of(features: Tensor, logits: Tensor) -> Supports:
    """Make supports of features ``(N, D)``, of the classes that logits ``(N, K)`` predict."""
    return Supports(F.normalize(features), logits.argmax(-1), entropy(logits))


def most_confident(supports: Supports, count: int) -> Supports:
    """Keep of every class the ``count`` supports with the lowest entropy."""
    order = supports.entropies.argsort(stable=True)
    classes = supports.classes[order]
    # The rank of a support within its class, from 1.
    rank = F.one_hot(classes).cumsum(0).gather(1, classes[:, None])[:, 0]
    return Supports(*(part[order[rank <= count]] for part in supports))
