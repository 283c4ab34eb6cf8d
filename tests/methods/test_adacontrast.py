"""AdaContrast: its terms against loops and closed forms, its queue, a stream against copies."""

import copy
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.helpers import networks
from tests.helpers.contract import shifted
from tttlab.adaptation.online import adapt_stream, learning
from tttlab.adaptation.registry import load_method
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import Augmentation, InnerLoop
from tttlab.data.views import random_views
from tttlab.errors import UserError
from tttlab.methods.adacontrast import (
    WEAK_SCALE,
    AdaContrast,
    Memory,
    Queue,
    class_aware_contrast,
    empty_queue,
    negative_marginal_entropy,
    neighbor_vote,
)
from tttlab.networks.network import Bound, Outputs
from tttlab.seeding import torch_generator

BATCHES = [slice(0, 3), slice(3, 5), slice(5, 7)]


def stream():
    return shifted(7)


def streams(part):
    return [torch_generator(0, "views", str(name), 0) for name in range(7)[part]]


def undecided():
    """A network whose predictions differ between images: an untrained one prefers one class."""
    network = copy.deepcopy(networks.source_statistics("resnet")[0]).eval()
    with torch.no_grad():
        network.classifier.bias -= network(stream()).logits.mean(0)
    return network


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_the_neighbours_vote_as_in_a_loop(count):
    """Nearest by angle, whatever the feature's length; all vote if there are too few."""
    features, past = random(5, 4).numpy(), unit(random(9, 4, seed=1).numpy())
    probabilities = random(9, 3, seed=2).softmax(1).numpy()
    votes = neighbor_vote(*map(torch.from_numpy, (features, past, probabilities)), count)
    for vote, feature in zip(votes, features, strict=True):
        order = np.argsort(1 - past @ feature / np.linalg.norm(feature))
        np.testing.assert_allclose(vote, probabilities[order[:count]].mean(0))


def queue_of(keys, labels):
    return Queue(keys, keys, torch.from_numpy(unit(keys.numpy())), torch.tensor(labels))


def test_the_contrast_leaves_out_keys_of_the_same_label_as_in_a_loop():
    features, keys = random(4, 6), unit(random(4, 6, seed=1).numpy())
    labels, queue = [0, 2, 2, 1], queue_of(random(5, 6, seed=2), [0, 2, 2, 1, 2])
    loss = class_aware_contrast(features, torch.from_numpy(keys), torch.tensor(labels), queue, 0.5)
    losses = []
    past = list(zip(queue.keys.numpy(), queue.labels.tolist(), strict=True))
    for query, key, label in zip(unit(features.numpy()), keys, labels, strict=True):
        negatives = [past_key for past_key, past_label in past if past_label != label]
        scores = [math.exp(query @ compared / 0.5) for compared in (key, *negatives)]
        losses.append(-math.log(scores[0] / sum(scores)))
    assert loss.item() == pytest.approx(np.mean(losses))


def test_a_query_without_negatives_has_no_loss_and_no_slope():
    """The queue is empty, as on the first batch, or has no other label."""
    features = random(2, 6).requires_grad_()
    keys = torch.from_numpy(unit(random(2, 6, seed=1).numpy()))
    empty = empty_queue(Outputs(random(2, 3), random(2, 6)))
    for queue in (empty, queue_of(random(4, 6, seed=2), [1] * 4)):
        loss = class_aware_contrast(features, keys, torch.tensor([1, 1]), queue, 0.07)
        (slope,) = torch.autograd.grad(loss, features)
        assert loss.item() == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(slope, torch.zeros_like(slope))


def test_diversity_is_lowest_where_the_classes_are_equally_frequent():
    certain = 1e3 * torch.eye(4, dtype=torch.float64)
    for logits, expected in (
        (certain, -math.log(4)),
        (0 * certain, -math.log(4)),
        (certain[[1, 1, 1, 1]], 0.0),
        (certain[[0, 0, 0, 1]], 0.75 * math.log(0.75) + 0.25 * math.log(0.25)),
    ):
        assert negative_marginal_entropy(logits).item() == pytest.approx(expected, abs=1e-12)


def test_the_queue_keeps_the_latest_images():
    """The last four of seven images stay, in order.

    At learning rate 0 the momentum model is the source network.
    """
    network, method = undecided(), AdaContrast(queue_size=4, warm_up=4)
    with learning(Task(network, method, InnerLoop(lr=0.0)), stream()[:3]) as learner:
        for part in BATCHES:
            learner.adapt(stream()[part], [str(name) for name in range(7)[part]])
    last = slice(3, 7)
    weak, _, key = AdaContrast().views(network, stream()[last], streams(last))
    with torch.no_grad():
        outputs, keys = network(weak[:, 0]), network(key[:, 0]).features.numpy()
    queue = learner.state.queue
    np.testing.assert_allclose(queue.features, unit(outputs.features.numpy()))
    np.testing.assert_allclose(queue.probabilities, outputs.logits.softmax(1))
    np.testing.assert_allclose(queue.keys, unit(keys))
    # Of the second batch, before any vote.
    assert queue.labels[:2].tolist() == outputs.logits[:2].argmax(1).tolist()


def test_an_image_joins_the_queue_once_however_many_steps_are_taken():
    """Otherwise it would vote for itself, and be pushed away from itself."""
    for steps in (1, 3):
        task = Task(undecided(), AdaContrast(), InnerLoop(steps=steps, lr=1e-3))
        with learning(task, stream()[:3]) as learner:
            for part in BATCHES:
                learner.adapt(stream()[part], [str(name) for name in range(7)[part]])
        assert len(learner.state.queue.labels) == 7
        assert len(learner.state.batch.labels) == 0


def test_neighbours_that_could_never_vote_are_refused():
    message = r"adacontrast: warm_up: expected at most queue_size \(50\).*found 100"
    with pytest.raises(UserError, match=message):
        load_method("adacontrast", {"queue_size": 50})


def test_the_current_weights_ask_the_neighbours_and_the_momentum_model_is_remembered():
    """The queue holds the same images as the current weights see them, each with its own class.

    So the nearest neighbour of every image is itself.
    """
    network, teacher = undecided(), networks.resnet().double()
    images = stream()[:4]
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += random(*parameter.shape)
        current, taught = network(images), teacher(images)
    features = F.normalize(current.features)
    past = Queue(features, torch.eye(4, dtype=torch.float64), features, torch.arange(4))
    weights = {name: value.detach() for name, value in teacher.named_parameters()}
    for warm_up, expected in ((4, [0, 1, 2, 3]), (5, current.logits.argmax(1).tolist())):
        method, views = AdaContrast(num_neighbors=1, warm_up=warm_up), (images, images, images)
        _, memory = method.loss(Bound(network, {}), views, {}, Memory(weights, past, past))
        batch = memory.batch
        assert memory.queue is past
        assert batch.labels.tolist() == expected
        torch.testing.assert_close(batch.features, F.normalize(taught.features))
        torch.testing.assert_close(batch.probabilities, taught.logits.softmax(1))
        torch.testing.assert_close(batch.keys, F.normalize(taught.features))


def test_weak_views_keep_colours_and_most_of_the_image():
    """Crops are the published ones, unless strong views keep even more; flips are as in these."""
    images, part = stream()[:2], slice(0, 2)
    for strong, scale in (
        (Augmentation(0.3, True, 0.5), WEAK_SCALE),
        (Augmentation(0.9, False, 0.5), 0.9),
    ):
        views = AdaContrast(augmentation=strong).views(None, images, streams(part))
        generators, weak = streams(part), Augmentation(scale, strong.flip, 0.0)
        expected = [
            random_views(images, generators, 1, strength) for strength in (weak, strong, strong)
        ]
        assert all(torch.equal(*pair) for pair in zip(views, expected, strict=True))
        _, query, key = views
        assert not torch.equal(query, key)


class Past(NamedTuple):
    """A past image as the teacher saw it."""

    feature: torch.Tensor
    probabilities: torch.Tensor
    key: torch.Tensor
    label: int


def nearest_two_vote(feature, past):
    similarities = [F.cosine_similarity(feature, image.feature, dim=0).item() for image in past]
    first, second = sorted(range(len(past)), key=lambda index: -similarities[index])[:2]
    return ((past[first].probabilities + past[second].probabilities) / 2).argmax().item()


def test_a_stream_against_copies_of_the_network_autograd_and_lists():
    """Neighbours vote from the second batch on, and change some pseudo labels."""
    network = undecided()
    method = AdaContrast(
        num_neighbors=2,
        warm_up=3,
        queue_size=4,
        temperature=0.5,
        contrast=0.7,
        diversity=0.3,
        teacher_momentum=0.6,
    )
    loop = InnerLoop(steps=1, lr=1e-2, momentum=0.9, trainable="all")
    result = adapt_stream(network, stream(), method, loop, batch_size=3)
    student, teacher = copy.deepcopy(network), copy.deepcopy(network)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2, momentum=0.9)
    past, logits, refined, negatives = [], [], 0, 0
    for part in BATCHES:
        images = stream()[part]
        weak, query, key = (view[:, 0] for view in method.views(network, images, streams(part)))
        with torch.no_grad():
            asking, taught = student(weak), teacher(weak)
            keys = F.normalize(teacher(key).features)
        labels = asking.logits.argmax(1).tolist()
        if past:
            for index, feature in enumerate(asking.features):
                label = nearest_two_vote(feature, past)
                refined, labels[index] = refined + (label != labels[index]), label
        outputs, losses = student(query), []
        for index, label in enumerate(labels):
            unit_query = outputs.features[index] / outputs.features[index].norm()
            compared = [keys[index], *(image.key for image in past if image.label != label)]
            negatives += len(compared) - 1
            scores = torch.stack([unit_query @ key / 0.5 for key in compared])
            cross_entropy = -outputs.logits[index].log_softmax(0)[label]
            losses.append(cross_entropy - 0.7 * scores.log_softmax(0)[0])
        mean = outputs.logits.softmax(1).mean(0)
        loss = torch.stack(losses).mean() + 0.3 * (mean * mean.log()).sum()
        expected = pytest.approx([loss.item()] * len(images), rel=1e-8)
        assert result.losses[part, 0].tolist() == expected
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        past += map(Past, taught.features, taught.logits.softmax(1), keys, labels)
        past = past[-4:]
        with torch.no_grad():
            for value, old in zip(student.parameters(), teacher.parameters(), strict=True):
                old.copy_(0.6 * old + 0.4 * value)
            logits.append(student(images).logits)
    assert refined
    # Two images have three past ones each, and two have four: some are left out, but not all.
    assert 0 < negatives < 14
    torch.testing.assert_close(result.logits, torch.cat(logits), atol=1e-8, rtol=1e-8)
