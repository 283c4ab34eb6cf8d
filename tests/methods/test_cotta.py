"""CoTTA against plain loops over copies of a network; its teacher's arithmetic and forgetting."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers import networks
from tests.helpers.contract import shifted
from tttlab.adaptation.online import adapt_stream, learning
from tttlab.adaptation.task import Task
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.inner_loop import InnerLoop
from tttlab.data.views import random_views
from tttlab.methods.cotta import CoTTA
from tttlab.networks.network import Bound
from tttlab.seeding import torch_generator

BATCHES = [slice(0, 3), slice(3, 5), slice(5, 7)]


def stream():
    return shifted(7)


def streams(part):
    return [torch_generator(0, "views", str(name), 0) for name in range(7)[part]]


def by_batch_statistics(network: nn.Module) -> nn.Module:
    """A copy whose BatchNorm normalises by the batch, as in training mode, and stores nothing."""
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return network


def confidence(network, images):
    with torch.no_grad():
        return network(images).logits.softmax(1).max(1).values.mean().item()


def test_a_stream_against_copies_of_the_network_autograd_and_an_explicit_average():
    """Without forgetting.

    The threshold lies between the anchor's confidences, so that both kinds of teaching occur.
    """
    network, statistics = networks.source_statistics("resnet")
    student, teacher, anchor = (by_batch_statistics(network) for _ in range(3))
    _, middle, highest = sorted(confidence(anchor, stream()[part]) for part in BATCHES)
    threshold = (middle + highest) / 2
    method = CoTTA(num_views=3, confidence=threshold, restore=0.0, teacher_momentum=0.6)
    loop = InnerLoop(steps=1, lr=0.1, momentum=0.9, trainable="all", normalisation="image")
    result = adapt_stream(network, stream(), method, loop, batch_size=3, statistics=statistics)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    logits, averaged = [], []
    for part in BATCHES:
        images = stream()[part]
        with torch.no_grad():
            averaged.append(confidence(anchor, images) < threshold)
            target = teacher(images).logits
            if averaged[-1]:
                views = random_views(images, streams(part), 3, method.augmentation)
                target = sum(teacher(views[:, number]).logits for number in range(3)) / 3
        loss = nn.functional.cross_entropy(student(images).logits, target.softmax(1))
        expected = pytest.approx([loss.item()] * len(images), rel=1e-6)
        assert result.losses[part, 0].tolist() == expected
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for value, old in zip(student.parameters(), teacher.parameters(), strict=True):
                old.copy_(0.6 * old + 0.4 * value)
            logits.append(teacher(images).logits)
    assert set(averaged) == {True, False}
    torch.testing.assert_close(result.logits, torch.cat(logits), atol=1e-6, rtol=1e-6)


class TestAnchor:
    """The source network decides for the whole batch whether the teacher averages over views."""

    def target_loss(self, logits_of_teacher, student):
        return nn.functional.cross_entropy(student, logits_of_teacher.softmax(1)).item()

    def test_sure(self):
        """The views are not used: they are NaN."""
        network, _ = networks.source_statistics("resnet")
        images, method = stream()[:3], CoTTA(num_views=2, confidence=0.0)
        views = (images, images.repeat(2, 1, 1, 1) * torch.nan)
        loss, _ = method.loss(Bound(network, {}), views, {}, ())
        logits = network(images).logits
        assert loss.item() == pytest.approx(self.target_loss(logits, logits))

    def test_unsure_however_sure_student_and_teacher(self):
        network, _ = networks.source_statistics("resnet")
        images = stream()[:3]
        method = CoTTA(num_views=2, confidence=confidence(network, images) + 1e-3)
        views = random_views(images, streams(slice(0, 3)), 2, method.augmentation)
        weight = network.classifier.weight.detach()
        sure = {"classifier.weight": 8 * weight, "classifier.bias": 0 * weight[:, 0]}
        loss, _ = method.loss(Bound(network, sure), (images, views.flatten(0, 1)), {}, sure)
        teacher = 8 * sum(network(views[:, number]).features for number in range(2)) / 2 @ weight.T
        student = 8 * network(images).features @ weight.T
        assert all(
            logits.softmax(1).amax(1).mean() > method.confidence for logits in (student, teacher)
        )
        assert loss.item() == pytest.approx(self.target_loss(teacher, student))
        assert loss.item() != pytest.approx(self.target_loss(student, student), rel=1e-2)


def test_the_teacher_after_many_steps_is_the_geometric_sum():
    generator, method = torch.Generator().manual_seed(0), CoTTA(teacher_momentum=0.9)
    source, *path = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    teacher = ()
    for value in path:
        _, teacher = method.after_step({"a": value}, {"a": source}, teacher, generator)
    expected = 0.9**5 * source
    for step, value in enumerate(path):
        expected = expected + 0.1 * 0.9 ** (4 - step) * value
    torch.testing.assert_close(teacher["a"], expected)


SOURCE = {"a": torch.zeros(100, 50), "b": torch.zeros(300)}
MOVED = {"a": torch.full((100, 50), 7.0), "b": torch.full((300,), 7.0)}


class TestForgetting:
    def after(self, seed=0, **settings):
        return CoTTA(**settings).after_step(MOVED, SOURCE, (), torch.Generator().manual_seed(seed))

    def test_a_share_of_all_numbers_and_each_on_its_own(self):
        student, teacher = self.after(restore=0.3)
        numbers = torch.cat([student[name].flatten() for name in "ab"])
        assert set(numbers.tolist()) == {0.0, 7.0}
        share, standard_error = (numbers == 0).double().mean().item(), (0.3 * 0.7 / 5300) ** 0.5
        assert share == pytest.approx(0.3, abs=4 * standard_error)
        assert all(0 < (row == 0).sum() < 50 for row in student["a"])
        # The teacher has moved before the student forgets.
        torch.testing.assert_close(teacher["b"], torch.full((300,), 0.007))

    def test_the_same_for_the_same_stream_of_randomness(self):
        first, again, second = (self.after(seed, restore=0.3)[0]["a"] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, second)

    @pytest.mark.parametrize(("restore", "expected"), [(0.0, MOVED), (1.0, SOURCE)])
    def test_nothing_and_everything(self, restore, expected):
        student, _ = self.after(restore=restore)
        assert all(torch.equal(value, expected[name]) for name, value in student.items())

    @pytest.mark.parametrize("restore", [0.0, 1.0])
    def test_on_a_stream_the_student_comes_back_and_the_teacher_does_not(self, restore):
        network, statistics = networks.source_statistics("resnet")
        loop = InnerLoop(steps=1, lr=0.1, momentum=0.9, trainable="norm")
        method, source = CoTTA(num_views=2, restore=restore), select_parameters(network, "norm")
        with learning(Task(network, method, loop, statistics), stream()[:3]) as learner:
            for part in BATCHES:
                learner.adapt(stream()[part], [str(name) for name in range(7)[part]])
                student = {name: value[0] for name, value in learner.parameters.items()}
                back = [torch.equal(value, source[name]) for name, value in student.items()]
                assert all(back) == (restore == 1.0)
            teacher = learner.state
            assert any(not torch.equal(value, source[name]) for name, value in teacher.items())
