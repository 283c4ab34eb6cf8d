"""T3A: classify by the centroids of what the classifier was surest of so far.

Iwasawa and Matsuo, NeurIPS 2021 (Test-Time Classifier Adjustment Module): every class begins with its weight vector as the one
support, each image of the stream joins the supports of the class that the classifier gives it, and of these only the
``filter_size`` with the lowest entropy count. Nothing is trained and nothing is needed of the source domain.
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
    """S supports: ``features (S, D)`` of length 1, their ``classes (S,)`` and ``entropies (S,)``."""

    features: Tensor
    classes: Tensor
    entropies: Tensor


@dataclass(frozen=True)
class T3A(Method):
    """Classify by centroids of confident features.

    Attributes:
        filter_size: M, most supports of a class.
    """

    protocols = ("online",)
    features = True
    trains = False
    filter_size: Annotated[int, Ge(1)] = 100

    def check(self, network: nn.Module) -> None:
        """Refuse a network whose classifier is not linear, and so has no weight vector for every class."""
        super().check(network)
        linear_classifier(network)

    def predict_batch(
        self, net: Bound, images: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Add the batch to the supports, and compare its features with their centroids."""
        outputs, classifier = net(images), linear_classifier(net.module)
        known = state or supports_of(classifier.weight, classifier(classifier.weight))
        fresh = supports_of(outputs.features, outputs.logits)
        state = most_confident(
            Supports(*map(torch.cat, zip(known, fresh, strict=True))), self.filter_size
        )
        members = F.one_hot(state.classes, outputs.logits.shape[1]).to(state.features)
        return outputs.features @ F.normalize(state.features.T @ members, dim=0), state


def supports_of(features: Tensor, logits: Tensor) -> Supports:
    """Make supports of features ``(N, D)``, each of the class that its logits ``(N, K)`` are for."""
    return Supports(F.normalize(features), logits.argmax(-1), entropy(logits))


def most_confident(supports: Supports, count: int) -> Supports:
    """Keep the ``count`` supports of the lowest entropy of every class."""
    order = supports.entropies.argsort(stable=True)
    classes = supports.classes[order]
    rank = (
        F.one_hot(classes).cumsum(0).gather(1, classes[:, None])[:, 0]
    )  # within its class, from 1
    return Supports(*(part[order[rank <= count]] for part in supports))
