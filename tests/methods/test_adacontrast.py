"""AdaContrast's three terms against loops and closed forms, its queue, and a stream against copies of the network."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.helpers import networks
from tttlab.adaptation.inner_loop import InnerLoop
from tttlab.adaptation.online import adapt_stream, learning
from tttlab.adaptation.registry import load_method
from tttlab.adaptation.task import Task
from tttlab.data.views import Augmentation, random_views
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
    return (networks.images(7, seed=50) * 0.4 + 0.6).double()


def streams(part):
    return [torch_generator(0, "views", str(name), 0) for name in range(7)[part]]


def undecided():
    """A network whose predictions differ from image to image: an untrained one has a favourite class."""
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
    """Nearest by angle, whatever the length of a feature; with a count beyond the queue all of it votes."""
    features, past = random(5, 4).numpy(), unit(random(9, 4, seed=1).numpy())
    probabilities = random(9, 3, seed=2).softmax(1).numpy()
    found = neighbor_vote(*map(torch.from_numpy, (features, past, probabilities)), count)
    for row, feature in zip(found, features, strict=True):
        order = sorted(
            range(9), key=lambda index: 1 - feature @ past[index] / np.linalg.norm(feature)
        )
        np.testing.assert_allclose(
            row, np.mean([probabilities[index] for index in order[:count]], axis=0)
        )


def queue_of(keys, labels):
    return Queue(keys, keys, torch.from_numpy(unit(keys.numpy())), torch.tensor(labels))


def test_the_contrast_leaves_out_keys_of_the_same_label_as_in_a_loop():
    features, keys = random(4, 6), unit(random(4, 6, seed=1).numpy())
    labels, queue = [0, 2, 2, 1], queue_of(random(5, 6, seed=2), [0, 2, 2, 1, 2])
    found = class_aware_contrast(features, torch.from_numpy(keys), torch.tensor(labels), queue, 0.5)
    losses = []
    for query, key, label in zip(unit(features.numpy()), keys, labels, strict=True):
        others = [
            past
            for past, other in zip(queue.keys.numpy(), queue.labels.tolist(), strict=True)
            if other != label
        ]
        scores = [math.exp(query @ each / 0.5) for each in (key, *others)]
        losses.append(-math.log(scores[0] / sum(scores)))
    assert found.item() == pytest.approx(np.mean(losses))


def test_a_query_without_negatives_has_no_loss_and_no_slope():
    """None in the queue, as on the first batch, or none of another label."""
    features, keys = (
        random(2, 6).requires_grad_(),
        torch.from_numpy(unit(random(2, 6, seed=1).numpy())),
    )
    for queue in (
        empty_queue(Outputs(random(2, 3), random(2, 6))),
        queue_of(random(4, 6, seed=2), [1] * 4),
    ):
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
    """At learning rate 0 the momentum model is the source network; of seven images the last four stay, in order."""
    network = undecided()
    task = Task(network, AdaContrast(queue_size=4, warm_up=4), InnerLoop(lr=0.0))
    with learning(task, stream()[:3]) as learner:
        for part in BATCHES:
            learner.adapt(stream()[part], [str(name) for name in range(7)[part]])
    last = slice(3, 7)
    weak, _, key = (
        view[:, 0] for view in AdaContrast().views(network, stream()[last], streams(last))
    )
    with torch.no_grad():
        outputs, keys = network(weak), network(key).features.numpy()
    queue = learner.state.queue
    np.testing.assert_allclose(queue.features, unit(outputs.features.numpy()))
    np.testing.assert_allclose(queue.probabilities, outputs.logits.softmax(1))
    np.testing.assert_allclose(queue.keys, unit(keys))
    assert (
        queue.labels[:2].tolist() == outputs.logits[:2].argmax(1).tolist()
    )  # of the second batch, before any vote


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
    with pytest.raises(
        UserError, match=r"adacontrast: warm_up: expected at most queue_size \(50\).*found 100"
    ):
        load_method("adacontrast", {"queue_size": 50})


def test_the_current_weights_ask_the_neighbours_and_the_momentum_model_is_remembered():
    """Every image is the nearest neighbour of itself as the current weights see it, and each votes for a class of its own."""
    network, other = undecided(), networks.resnet().double()
    images = stream()[:4]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += random(*parameter.shape)
        now, slow = network(images), other(images)
    past = Queue(
        F.normalize(now.features),
        torch.eye(4, dtype=torch.float64),
        F.normalize(now.features),
        torch.arange(4),
    )
    for warm_up, expected in ((4, [0, 1, 2, 3]), (5, now.logits.argmax(1).tolist())):
        method = AdaContrast(num_neighbors=1, warm_up=warm_up)
        memory = Memory(
            {name: value.detach() for name, value in other.named_parameters()}, past, past
        )
        _, (_, queue, batch) = method.loss(Bound(network, {}), (images, images, images), {}, memory)
        assert queue is past
        assert batch.labels.tolist() == expected
        torch.testing.assert_close(batch.features, F.normalize(slow.features))
        torch.testing.assert_close(batch.probabilities, slow.logits.softmax(1))
        torch.testing.assert_close(batch.keys, F.normalize(slow.features))


def test_weak_views_keep_colours_and_most_of_the_image():
    """Their crops are the published ones, unless the strong views keep even more; mirrored only if these are."""
    images = stream()[:2]
    for strong, scale in (
        (Augmentation(0.3, True, 0.5), WEAK_SCALE),
        (Augmentation(0.9, False, 0.5), 0.9),
    ):
        weak, query, key = AdaContrast(augmentation=strong).views(
            None, images, streams(slice(0, 2))
        )
        own = streams(slice(0, 2))
        expected = [
            random_views(images, own, 1, each)
            for each in (Augmentation(scale, strong.flip, 0.0), strong, strong)
        ]
        assert all(torch.equal(*pair) for pair in zip((weak, query, key), expected, strict=True))
        assert not torch.equal(query, key)


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
    found = adapt_stream(network, stream(), method, loop, batch_size=3)
    student, teacher = copy.deepcopy(network), copy.deepcopy(network)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2, momentum=0.9)
    past, logits, refined, negatives = (
        [],
        [],
        0,
        0,
    )  # past: (feature, probabilities, key, label) of an image
    for part in BATCHES:
        images = stream()[part]
        weak, query, key = (view[:, 0] for view in method.views(network, images, streams(part)))
        with torch.no_grad():
            own, slow, keys = student(weak), teacher(weak), F.normalize(teacher(key).features)
        labels = own.logits.argmax(1).tolist()
        if past:
            for index, feature in enumerate(own.features):
                near = sorted(
                    past, key=lambda each: -F.cosine_similarity(feature, each[0], dim=0).item()
                )[:2]
                label = ((near[0][1] + near[1][1]) / 2).argmax().item()
                refined, labels[index] = refined + (label != labels[index]), label
        outputs, losses = student(query), []
        for index, label in enumerate(labels):
            unit_query = outputs.features[index] / outputs.features[index].norm()
            others = [each[2] for each in past if each[3] != label]
            negatives += len(others)
            scores = torch.stack([unit_query @ each / 0.5 for each in (keys[index], *others)])
            losses.append(
                -outputs.logits[index].log_softmax(0)[label] - 0.7 * scores.log_softmax(0)[0]
            )
        mean = outputs.logits.softmax(1).mean(0)
        loss = torch.stack(losses).mean() + 0.3 * (mean * mean.log()).sum()
        assert found.losses[part, 0].tolist() == pytest.approx(
            [loss.item()] * len(images), rel=1e-8
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        past += zip(slow.features, slow.logits.softmax(1), keys, labels, strict=True)
        past = past[-4:]
        with torch.no_grad():
            for value, old in zip(student.parameters(), teacher.parameters(), strict=True):
                old.copy_(0.6 * old + 0.4 * value)
            logits.append(student(images).logits)
    assert refined
    assert (
        0 < negatives < 14
    )  # of three and then four past images, for two each: some are left out, not all
    torch.testing.assert_close(found.logits, torch.cat(logits), atol=1e-8, rtol=1e-8)
