"""AdaContrast: learn from labels that the nearest past images vote for, and tell images of different classes apart.

Chen et al., CVPR 2022, arXiv 2204.10377 (Contrastive Test-Time Adaptation). Three views of every image: a weak one, whose
features find the nearest neighbours among past images in a queue; the mean of the neighbours' class probabilities gives the
pseudo label. Two strong ones, a query and a key. The loss is the cross-entropy of the query's prediction with the pseudo label,
plus InfoNCE of the query with its key against the past keys of other pseudo labels, plus the negative entropy of the mean
prediction. Keys and what the queue holds come from a momentum model, an exponential moving average of the weights. Nothing is
needed of the source domain. In params.yaml the rest is the adapter's: ``trainable: all``, ``normalisation: image``, SGD with
momentum 0.9 and lr 2e-4, batches of 128 (the published code adds weight decay, ten times the lr for the last layers, and a
cosine schedule over 15 epochs).

As in the published code, features are those that the classifier reads, of length 1, without a projection head; the neighbours
are those nearest to the features of the current weights, which also make the prediction. What differs: the published queues
begin full, that of the neighbours with the source network's view of all target images, that of the keys with random directions.
Here both begin empty, as on a stream nothing is known before: the first batch has no negatives, and until ``warm_up`` images
have come their own predictions are the pseudo labels (the online benchmark of Marsden and Döbler waits for 1024). The published
strong views also change colours and blur.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.adaptation.method import Method, State
from tttlab.data.views import Augmentation, log_mean_probabilities, random_views
from tttlab.networks.network import Bound, Outputs
from tttlab.networks.source_statistics import Statistics

WEAK_SCALE = (224 / 256) ** 2  # of the published crops


class Queue(NamedTuple):
    """M past images, the oldest first, as the momentum model saw them.

    ``features (M, D)`` of length 1 and ``probabilities (M, K)`` of their weak views; ``keys (M, D)`` of length 1 and
    pseudo ``labels (M,)``.
    """

    features: Tensor
    probabilities: Tensor
    keys: Tensor
    labels: Tensor


class Memory(NamedTuple):
    """The momentum model's trainable weights, none before the first step, the queue, and the batch that will join it."""

    teacher: dict[str, Tensor]
    queue: Queue
    batch: Queue


@dataclass(frozen=True)
class AdaContrast(Method):
    """Train on refined pseudo labels and contrast classes.

    Attributes:
        num_neighbors: past images that vote for a pseudo label.
        warm_up: past images that it takes before they vote; should be many times the number of classes and of neighbours.
        queue_size: most past images that are remembered.
        temperature: τ of the contrast.
        contrast: weight of the contrast, that of the cross-entropy being 1.
        diversity: weight of the negative entropy of the mean prediction.
        teacher_momentum: share of the old momentum model in the new one.
    """

    protocols = ("online",)
    features = True
    whole_batch = True
    num_neighbors: Annotated[int, Ge(1)] = 10
    warm_up: Annotated[int, Ge(1)] = 100
    queue_size: Annotated[int, Ge(1)] = 16384
    temperature: Annotated[float, Gt(0)] = 0.07
    contrast: Annotated[float, Ge(0)] = 1.0
    diversity: Annotated[float, Ge(0)] = 1.0
    teacher_momentum: Annotated[float, Ge(0), Lt(1)] = 0.999
    augmentation: Augmentation = field(default=Augmentation(), kw_only=True)

    def __post_init__(self) -> None:
        if self.warm_up > self.queue_size:
            raise ValueError(
                f"warm_up: expected at most queue_size ({self.queue_size}), or no neighbour would ever vote; "
                f"found {self.warm_up}"
            )

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, ...]:
        """Draw a weak view, a query and a key of every image, ``(B, 1, 3, H, W)`` each."""
        weak = replace(
            self.augmentation, min_scale=max(WEAK_SCALE, self.augmentation.min_scale), jitter=0.0
        )
        strengths = (weak, self.augmentation, self.augmentation)
        return tuple(random_views(images, generators, 1, strength) for strength in strengths)

    def loss(
        self, net: Bound, views: tuple[Tensor, ...], statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Sum the three terms over the batch's weak views, queries and keys, ``(N, 3, H, W)`` each."""
        weak, query, key = views
        with torch.no_grad():
            teacher = net.rebound(state.teacher) if state else net.module
            slow, keys, own = teacher(weak), F.normalize(teacher(key).features), net(weak)
            memory = state or Memory({}, empty_queue(slow), empty_queue(slow))
            labels = self.pseudo_labels(own, memory.queue)
        outputs = net(query)
        loss = F.cross_entropy(outputs.logits, labels)
        loss = loss + self.contrast * class_aware_contrast(
            outputs.features, keys, labels, memory.queue, self.temperature
        )
        loss = loss + self.diversity * negative_marginal_entropy(outputs.logits)
        fresh = Queue(F.normalize(slow.features), slow.logits.softmax(-1), keys, labels)
        return loss, memory._replace(batch=fresh)

    def predict_batch(
        self, net: Bound, images: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Classify the batch, which has taken its steps, and let it join the queue."""
        if state:
            queue = enqueue(state.queue, state.batch, self.queue_size)
            state = state._replace(queue=queue, batch=Queue(*(part[:0] for part in queue)))
        return net(images).logits, state

    def pseudo_labels(self, own: Outputs, queue: Queue) -> Tensor:
        """Classify images by their neighbours once there are enough, before by their own logits: ``(N,)``."""
        if len(queue.features) < self.warm_up:
            return own.logits.argmax(-1)
        return neighbor_vote(
            own.features, queue.features, queue.probabilities, self.num_neighbors
        ).argmax(-1)

    def after_step(
        self,
        parameters: dict[str, Tensor],
        source: dict[str, Tensor],
        state: State,
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], State]:
        """Move the momentum model towards the weights."""
        old = state.teacher or source
        teacher = {
            name: torch.lerp(value, parameters[name], 1 - self.teacher_momentum)
            for name, value in old.items()
        }
        return parameters, state._replace(teacher=teacher)


def neighbor_vote(features: Tensor, past: Tensor, probabilities: Tensor, count: int) -> Tensor:
    """Average the probabilities of the nearest past images.

    Args:
        features: ``(N, D)``.
        past: ``(M, D)``, of length 1.
        probabilities: theirs, ``(M, K)``.
        count: of neighbours, by cosine similarity; all where there are fewer.

    Returns:
        ``(N, K)``.
    """
    nearest = (F.normalize(features) @ past.T).topk(min(count, len(past))).indices
    return probabilities[nearest].mean(1)


def class_aware_contrast(
    features: Tensor, keys: Tensor, labels: Tensor, queue: Queue, temperature: float
) -> Tensor:
    """InfoNCE of queries with their keys against the queue's keys of other pseudo labels, mean over images.

    Args:
        features: of the queries, ``(N, D)``.
        keys: ``(N, D)``, of length 1.
        labels: pseudo labels of the images, ``(N,)``.
        queue: past keys and pseudo labels; a query without negatives has loss 0.
        temperature: τ.
    """
    queries = F.normalize(features)
    positive = (queries * keys).sum(-1, keepdim=True) / temperature
    negatives = (queries @ queue.keys.T / temperature).masked_fill(
        labels[:, None] == queue.labels, -torch.inf
    )
    return (torch.cat([positive, negatives], dim=1).logsumexp(1) - positive[:, 0]).mean()


def negative_marginal_entropy(logits: Tensor) -> Tensor:
    """Negative entropy, in nats, of the mean class probabilities of ``logits (N, K)``: from −log K to 0."""
    log_marginal = log_mean_probabilities(logits)
    return (log_marginal.exp() * log_marginal).sum()


def empty_queue(outputs: Outputs) -> Queue:
    """Make a queue for features and logits like these."""
    nothing = Outputs(outputs.logits[:0], outputs.features[:0])
    return Queue(nothing.features, nothing.logits, nothing.features, nothing.logits.argmax(-1))


def enqueue(queue: Queue, fresh: Queue, size: int) -> Queue:
    """Append images to the queue, and forget the oldest beyond its size."""
    return Queue(*(torch.cat(parts)[-size:] for parts in zip(queue, fresh, strict=True)))
