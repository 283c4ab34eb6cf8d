import math

import numpy as np
import torch

from tests.helpers import trainings
from tttlab.training.probing import Encoded, classification, encode, knn_accuracy


def encoded(count: int, seed: int) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 5, generator=generator)
    # In double precision, so that rounding makes no two features equal.
    features = (noise + 1.2 * torch.eye(5)[labels]).double()
    return Encoded(features, torch.randn(count, 3, generator=generator), labels)


def slow_knn(train: Encoded, test: Encoded, neighbours: int, temperature: float) -> float:
    correct = 0
    for feature, label in zip(test.features.numpy(), test.labels.numpy(), strict=True):
        similarities = []
        for neighbour in train.features.numpy():
            norm = math.sqrt(np.dot(feature, feature) * np.dot(neighbour, neighbour))
            similarities.append(np.dot(feature, neighbour) / norm)
        votes = np.zeros(3)
        for index in np.argsort(similarities)[::-1][:neighbours]:
            votes[train.labels[index]] += math.exp(similarities[index] / temperature)
        correct += votes.argmax() == label
    return correct / len(test.labels)


def test_knn_accuracy_is_that_of_a_slow_loop():
    train, test = encoded(60, 0), encoded(1030, 1)
    for neighbours, temperature in ((1, 0.1), (5, 0.1), (20, 0.5)):
        expected = slow_knn(train, test, neighbours, temperature)
        assert 0.4 < expected < 1
        assert knn_accuracy(train, test, neighbours, temperature) == expected


def test_fewer_images_than_neighbours_all_vote():
    train, test = encoded(6, 0), encoded(40, 1)
    assert knn_accuracy(train, test, 20, 0.1) == slow_knn(train, test, 6, 0.1)


def test_classification_is_cross_entropy_and_accuracy():
    logits = torch.tensor([[2.0, 0.0], [1.0, 3.0], [0.0, 1.0]])
    metrics = classification(Encoded(torch.zeros(3, 1), logits, torch.tensor([0, 1, 0])))
    losses = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))]
    assert math.isclose(metrics["validation_loss"], sum(losses) / 3, rel_tol=1e-6)
    assert math.isclose(metrics["validation_accuracy"], 2 / 3, rel_tol=1e-6)


def test_encoding_uses_running_statistics_whatever_the_batch_size():
    network, _ = trainings.build(trainings.SIMCLR)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    images = trainings.image_set()
    by_fives, automatic = encode(network, images, 5), encode(network, images)
    torch.testing.assert_close(by_fives.features, automatic.features)
    assert by_fives.features.shape == (22, 8)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
