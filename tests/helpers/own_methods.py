"""Methods as a user may write them; each does something that no method of the package does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.adaptation.method import Method, entropy


def classifier(net: Any) -> Tensor:
    """The classifier's weights ``(K, D)``, the image's own where they are trained."""
    return net.trained.get("classifier.weight", net.source["classifier.weight"])


@dataclass(frozen=True)
class SelfDistilled(Method):
    """The prediction for the mirrored image follows the current prediction for the image."""

    def loss(self, net, views, statistics, state):
        teacher = net.rebound({name: value.detach() for name, value in net.trained.items()})
        targets = teacher(views).logits.softmax(-1)
        return F.cross_entropy(net(views.flip(-1)).logits, targets), state


@dataclass(frozen=True)
class DetachedFeatures(Method):
    """The target comes from features without gradient, through a layer that may be trained."""

    def loss(self, net, views, statistics, state):
        outputs = net(views)
        targets = (F.linear(outputs.features.detach(), classifier(net)) / 0.5).softmax(-1)
        return F.cross_entropy(outputs.logits, targets), state


@dataclass(frozen=True)
class Anchored(Method):
    """Entropy, held back by the squared distance to the source weights (L2-SP)."""

    strength: float = 10.0

    def loss(self, net, views, statistics, state):
        return entropy(net(views).logits).mean() + self.strength * self.distance(net), state

    def distance(self, net):
        return sum((value - net.source[name]).square().sum() for name, value in net.trained.items())


@dataclass(frozen=True)
class FollowedByTeacher(Method):
    """Cross-entropy against an average of the weights so far, from the first step's on."""

    def loss(self, net, views, statistics, state):
        teacher = net.rebound(state or net.source)
        with torch.no_grad():
            targets = teacher(views.flip(-1)).logits.softmax(-1)
        average = dict(net.trained)  # at first the weights themselves, not a copy
        if state:
            average = {
                name: torch.lerp(value, net.trained[name], 0.3) for name, value in state.items()
            }
        return F.cross_entropy(net(views).logits, targets), average


@dataclass(frozen=True)
class SleepsAtFirst(Method):
    """The first loss depends on the features alone, or on nothing; later losses are the entropy."""

    slope: float = 0.0

    def loss(self, net, views, statistics, state):
        if not state:
            return self.slope * net(views).features.square().mean(), (torch.ones(()),)
        return entropy(net(views).logits).mean(), state


@dataclass(frozen=True)
class MirrorAverage(Method):
    """Predicts the mean logits of the image and its mirror image."""

    protocols = ("episodic", "online")
    trains = False

    def predict(self, net, image, views, statistics):
        return net(torch.stack([image, image.flip(-1)])).logits.mean(0)


@dataclass(frozen=True)
class CosineOfSource(Method):
    """Predicts by the cosine of the features of an image and a noisy view with source weights."""

    trains = False

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        noise = [torch.rand(images[0].shape, generator=generator) for generator in generators]
        return {"noisy": (images + 0.1 * torch.stack(noise).to(images)).unsqueeze(1)}

    def predict(self, net, image, views, statistics):
        features = net(torch.cat([image[None], views["noisy"]])).features.mean(0)
        return F.cosine_similarity(features, net.source["classifier.weight"], dim=-1)


@dataclass(frozen=True)
class TrainedThenMirrored(MirrorAverage):
    """Trains as `Anchored` and predicts in its own way."""

    trains = True
    protocols = ("episodic",)

    def loss(self, net, views, statistics, state):
        return Anchored().loss(net, views, statistics, state)


@dataclass(frozen=True)
class AnchoredToNothing(Anchored):
    """Wrong: under ``vmap`` no tensor requires a gradient, and the sum over none is 0."""

    def distance(self, net):
        return sum(
            (value - net.source[name]).square().sum()
            for name, value in net.trained.items()
            if value.requires_grad
        )


@dataclass(frozen=True)
class AnchoredToItself(Anchored):
    """Wrong: the anchor is the weights themselves, at distance 0."""

    def distance(self, net):
        return sum((value - value).square().sum() for value in net.trained.values())


@dataclass(frozen=True)
class AverageOfTheGroup(MirrorAverage):
    """Wrong: the view is the mean of the images that are adapted to together."""

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        return images.mean(0).expand(len(images), 1, -1, -1, -1)

    def predict(self, net, image, views, statistics):
        return net(views).logits[0]


# Each with a kind of `networks`.
CASES = (
    ("resnet", SelfDistilled()),
    ("vit", SelfDistilled()),
    ("resnet", DetachedFeatures()),
    ("vit", DetachedFeatures()),
    ("resnet", Anchored()),
    ("vit", Anchored()),
    ("resnet", FollowedByTeacher()),
    ("resnet", SleepsAtFirst()),
    ("vit", SleepsAtFirst(1.0)),
    ("resnet", TrainedThenMirrored()),
    ("resnet", MirrorAverage()),
    ("vit", CosineOfSource()),
)
