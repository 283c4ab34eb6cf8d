"""AdaContrast: learn from labels that the nearest past images vote for, and contrast the classes.

Chen et al., CVPR 2022, arXiv 2204.10377 (Contrastive Test-Time Adaptation). Every image has three
views. The features of a weak one find its nearest neighbours in a queue of past images; the mean of
their class probabilities gives the pseudo label. Two strong ones are a query and a key. The loss is
the cross-entropy of the query's prediction with the pseudo label, plus InfoNCE of the query with
its key against the past keys of other pseudo labels, plus the negative entropy of the mean
prediction. The keys and the queue come from a momentum model, an exponential moving average of the
weights. Nothing is needed of the source domain.

In params.yaml the rest is the adapter's: ``trainable: all``, ``normalisation: image``, SGD with
momentum 0.9 and lr 2e-4, batches of 128. The published code adds weight decay, ten times the lr for
the last layers, and a cosine schedule over 15 epochs.

As in the published code, the features are those that the classifier reads, of length 1, without a
projection head; neighbours are searched with the features of the current weights, which also make
the prediction.

What differs: the published queues begin full, the neighbours' with the source network's view of all
target images, the keys' with random directions. Here both begin empty, since on a stream nothing is
known beforehand. So the first batch has no negatives, and the first ``warm_up`` images have their
own predictions as pseudo labels (the online benchmark of Marsden and Döbler waits for 1024 images).
The published strong views also change colours and blur.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.adaptation.method import Method, State, entropy
from tttlab.config.inner_loop import Augmentation
from tttlab.data.views import log_mean_probabilities, random_views
from tttlab.networks.network import Bound, Outputs
from tttlab.networks.source_statistics import Statistics

WEAK_SCALE = (224 / 256) ** 2  # share of the area that the published weak crops keep


class Queue(NamedTuple):
    """M past images, the oldest first, as the momentum model saw them.

    ``features (M, D)`` of length 1 and ``probabilities (M, K)`` are of their weak views;
    ``keys (M, D)`` are of length 1; ``labels (M,)`` are pseudo labels.
    """

    features: Tensor
    probabilities: Tensor
    keys: Tensor
    labels: Tensor


class Memory(NamedTuple):
    """The momentum model's trainable weights, the queue, and the batch that will join it.

    There are no weights before the first step.
    """

    teacher: dict[str, Tensor]
    queue: Queue
    batch: Queue


@dataclass(frozen=True)
class AdaContrast(Method):
    """Train on refined pseudo labels and contrast classes.

    Attributes:
        num_neighbors: past images that vote for a pseudo label.
        warm_up: past images needed before any of them votes; should be many times the number of
            classes and of neighbours.
        queue_size: largest number of past images in the queue.
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
                f"warm_up: expected at most queue_size ({self.queue_size}), or no neighbour would "
                f"ever vote; found {self.warm_up}"
            )

    def views(
        self, network: nn.Module, images: Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, ...]:
        """Draw a weak view, a query and a key of every image, ``(B, 1, 3, H, W)`` each."""
        strong = self.augmentation
        weak = replace(strong, min_scale=max(WEAK_SCALE, strong.min_scale), jitter=0.0)
        strengths = (weak, strong, strong)
        return tuple(random_views(images, generators, 1, strength) for strength in strengths)

    def loss(
        self, net: Bound, views: tuple[Tensor, ...], statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Sum the three terms for weak views, queries and keys, ``(N, 3, H, W)`` each."""
        weak, query, key = views
        with torch.no_grad():
            teacher = net.rebound(state.teacher) if state else net.module
            taught = teacher(weak)
            keys = F.normalize(teacher(key).features)
            memory = state or Memory({}, empty_queue(taught), empty_queue(taught))
            labels = self.pseudo_labels(net(weak), memory.queue)
        queries = net(query)
        cross_entropy = F.cross_entropy(queries.logits, labels)
        contrast = class_aware_contrast(
            queries.features, keys, labels, memory.queue, self.temperature
        )
        diversity = negative_marginal_entropy(queries.logits)
        loss = cross_entropy + self.contrast * contrast + self.diversity * diversity
        batch = Queue(F.normalize(taught.features), taught.logits.softmax(-1), keys, labels)
        return loss, memory._replace(batch=batch)

    def predict_batch(
        self, net: Bound, images: Tensor, statistics: Statistics, state: State
    ) -> tuple[Tensor, State]:
        """Classify the batch after its steps, and let it join the queue."""
        if state:
            queue = enqueue(state.queue, state.batch, self.queue_size)
            state = state._replace(queue=queue, batch=Queue(*(part[:0] for part in queue)))
        return net(images).logits, state

    def pseudo_labels(self, outputs: Outputs, queue: Queue) -> Tensor:
        """Classify N images by their neighbours, or by their logits during warm-up: ``(N,)``."""
        if len(queue.features) < self.warm_up:
            return outputs.logits.argmax(-1)
        votes = neighbor_vote(
            outputs.features, queue.features, queue.probabilities, self.num_neighbors
        )
        return votes.argmax(-1)

    def after_step(
        self,
        parameters: dict[str, Tensor],
        source: dict[str, Tensor],
        state: State,
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], State]:
        """Move the momentum model towards the weights."""
        teacher = {
            name: torch.lerp(value, parameters[name], 1 - self.teacher_momentum)
            for name, value in (state.teacher or source).items()
        }
        return parameters, state._replace(teacher=teacher)


def neighbor_vote(features: Tensor, past: Tensor, probabilities: Tensor, count: int) -> Tensor:
    """Average the probabilities of the nearest past images.

    Args:
        features: ``(N, D)``.
        past: ``(M, D)``, of length 1.
        probabilities: of the past images, ``(M, K)``.
        count: number of neighbours, by cosine similarity; all M if there are fewer.

    Returns:
        ``(N, K)``.
    """
    nearest = (F.normalize(features) @ past.T).topk(min(count, len(past))).indices
    return probabilities[nearest].mean(1)


def class_aware_contrast(
    features: Tensor, keys: Tensor, labels: Tensor, queue: Queue, temperature: float
) -> Tensor:
    """InfoNCE of queries with their keys against the queue's keys of other pseudo labels.

    Args:
        features: of the queries, ``(N, D)``.
        keys: ``(N, D)``, of length 1.
        labels: pseudo labels of the images, ``(N,)``.
        queue: past keys and pseudo labels; a query without negatives has loss 0.
        temperature: τ.

    Returns:
        scalar, mean over images.
    """
    queries = F.normalize(features)
    positive = (queries * keys).sum(-1, keepdim=True) / temperature
    negatives = queries @ queue.keys.T / temperature
    negatives = negatives.masked_fill(labels[:, None] == queue.labels, -torch.inf)
    return (torch.cat([positive, negatives], dim=1).logsumexp(1) - positive[:, 0]).mean()


def negative_marginal_entropy(logits: Tensor) -> Tensor:
    """Negative entropy, in nats, of the mean class probabilities of ``logits (N, K)``."""
    return -entropy(log_mean_probabilities(logits))


def empty_queue(outputs: Outputs) -> Queue:
    """Make an empty queue for features and logits of these widths and types."""
    features, logits = outputs.features[:0], outputs.logits[:0]
    return Queue(features, logits, features, logits.argmax(-1))


def enqueue(queue: Queue, batch: Queue, size: int) -> Queue:
    """Append a batch to the queue, and forget the oldest images beyond its size."""
    return Queue(*(torch.cat(parts)[-size:] for parts in zip(queue, batch, strict=True)))
