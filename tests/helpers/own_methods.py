"""Methods such as a user may write, each of which does something that the package's own do not."""

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
    """The prediction for the mirrored image follows that for the image, both by the weights of now."""

    def loss(self, net, views, statistics, state):
        now = net.rebound({name: value.detach() for name, value in net.trained.items()})
        return F.cross_entropy(net(views.flip(-1)).logits, now(views).logits.softmax(-1)), state


@dataclass(frozen=True)
class DetachedFeatures(Method):
    """Features of now without a gradient, through a layer that may be trained, tell what to predict."""

    def loss(self, net, views, statistics, state):
        outputs = net(views)
        taught = F.linear(outputs.features.detach(), classifier(net))
        return F.cross_entropy(outputs.logits, (taught / 0.5).softmax(-1)), state


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
    """Cross-entropy against an average of the weights so far, which begins with the first step's."""

    def loss(self, net, views, statistics, state):
        teacher = net.rebound(state) if state else net.rebound(net.source)
        with torch.no_grad():
            taught = teacher(views.flip(-1)).logits.softmax(-1)
        old = state or net.trained  # at first the weights themselves, memory and all
        average = (
            {name: torch.lerp(value, net.trained[name], 0.3) for name, value in old.items()}
            if state
            else dict(old)
        )
        return F.cross_entropy(net(views).logits, taught), average


@dataclass(frozen=True)
class SleepsAtFirst(Method):
    """The first loss looks at the features alone, or has no slope; from the second on it is the entropy."""

    slope: float = 0.0

    def loss(self, net, views, statistics, state):
        if not state:
            return self.slope * net(views).features.square().mean(), (torch.ones(()),)
        return entropy(net(views).logits).mean(), state


@dataclass(frozen=True)
class MirrorAverage(Method):
    """Predicts the mean of the logits of the image and of its mirror image."""

    protocols = ("episodic", "online")
    trains = False

    def predict(self, net, image, views, statistics):
        return net(torch.stack([image, image.flip(-1)])).logits.mean(0)


@dataclass(frozen=True)
class CosineOfSource(Method):
    """Predicts the cosine of an image's features, and a random view's, with the source network's weight vectors."""

    trains = False

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        noise = torch.stack(
            [torch.rand(images[0].shape, generator=generator) for generator in generators]
        )
        return {"noisy": (images + 0.1 * noise.to(images)).unsqueeze(1)}

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
    """Wrong: under ``vmap`` no tensor says that it requires a gradient, and the sum over none is 0."""

    def distance(self, net):
        return sum(
            (value - net.source[name]).square().sum()
            for name, value in net.trained.items()
            if value.requires_grad
        )


@dataclass(frozen=True)
class AnchoredToItself(Anchored):
    """Wrong: the weights are held back by themselves, at a distance of 0."""

    def distance(self, net):
        return sum(
            (value - net.trained[name]).square().sum() for name, value in net.trained.items()
        )


@dataclass(frozen=True)
class AverageOfTheGroup(MirrorAverage):
    """Wrong: what it looks at is the mean of the images that are worked on together."""

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        return images.mean(0).expand(len(images), 1, -1, -1, -1)

    def predict(self, net, image, views, statistics):
        return net(views).logits[0]


CASES = (  # each on a network of `networks`
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
