"""The agreement of gradients, against autograd on one image at a time."""

import copy

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import networks
from tests.helpers.contract import Unbound, shifted
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.method import Method
from tttlab.adaptation.normalisation import normalised
from tttlab.adaptation.task import Task
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.inner_loop import InnerLoop
from tttlab.experiments.alignment import gradient_alignment
from tttlab.methods.actmad import ActMAD
from tttlab.methods.mae import MAETraining
from tttlab.methods.simclr import SimCLRTraining
from tttlab.seeding import torch_generator

LABELS = torch.tensor([0, 1, 2, 3, 0])


@pytest.mark.parametrize("trainable", ["encoder", "norm"])
@pytest.mark.parametrize("policy", ["source", "shrink"])
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("resnet", SimCLRTraining(num_views=3)),
        ("resnet", ActMAD()),
        ("vit", MAETraining(num_views=2)),
    ],
    ids=str,
)
def test_equals_autograd_on_one_image_at_a_time(kind, method, policy, trainable):
    network, statistics = networks.source_statistics(kind)
    loop, names = InnerLoop(trainable=trainable, normalisation=policy), list("abcde")
    task = Task(network, method, loop, statistics, seed=2)
    alignment = gradient_alignment(task, shifted(), LABELS, names, images_per_step=2)
    trained = select_parameters(network, trainable)
    for index, (image, label) in enumerate(zip(shifted(), LABELS, strict=True)):
        generator = torch_generator(2, "views", names[index], 0)
        views = of_first_image(method.views(network, image[None], [generator]))
        with normalised(network, loop, statistics):
            net = Unbound(network, trained)
            loss, _ = method.loss(net, views, statistics, method.init_state())
            supervised = F.cross_entropy(network(image[None]).logits, label[None])
        first, second = (flat_gradient(value, trained.values()) for value in (loss, supervised))
        inner = first @ second
        cosine = inner / first.norm() / second.norm()
        torch.testing.assert_close(alignment.inner[index], inner, atol=1e-8, rtol=1e-6)
        torch.testing.assert_close(alignment.supervised_loss[index], supervised.detach())
        torch.testing.assert_close(
            alignment.cosine[index], cosine, atol=1e-7, rtol=1e-6, equal_nan=True
        )


def of_first_image(views):
    if isinstance(views, dict):
        return {key: value[0] for key, value in views.items()}
    return views[0]


def flat_gradient(loss, parameters):
    """The gradient as one vector, with zeros for parameters that the loss does not depend on."""
    parameters = list(parameters)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    parts = []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is None:
            gradient = torch.zeros(parameter.numel(), dtype=torch.double)
        parts.append(gradient.flatten())
    return torch.cat(parts)


class Supervised(Method):
    """The supervised loss with a known label: the best possible test-time loss, or the worst."""

    def __init__(self, sign):
        self.sign = sign

    def loss(self, net, views, statistics, state):
        return self.sign * F.cross_entropy(net(views).logits, torch.tensor([1])), state


@pytest.mark.parametrize("sign", [1, -1])
def test_the_supervised_loss_agrees_with_itself(sign):
    network, statistics = networks.source_statistics("resnet")
    labels = torch.ones(5, dtype=torch.long)
    task = Task(network, Supervised(sign), statistics=statistics)
    alignment = gradient_alignment(task, shifted(), labels, "abcde")
    torch.testing.assert_close(alignment.cosine, torch.full((5,), float(sign), dtype=torch.double))


def test_the_inner_product_is_the_first_order_decrease_of_the_supervised_loss():
    network, statistics = networks.source_statistics("resnet")
    method, loop = ActMAD(), InnerLoop(trainable="encoder")
    task = Task(network, method, loop, statistics)
    alignment = gradient_alignment(task, shifted(), LABELS, "abcde")
    lr = 1e-10
    moved = adapt(network, shifted(), method, InnerLoop(steps=1, lr=lr), statistics=statistics)
    after = F.cross_entropy(moved.logits, LABELS, reduction="none")
    decrease = (alignment.supervised_loss - after) / lr
    torch.testing.assert_close(decrease, alignment.inner, rtol=0.02, atol=1e-3)


def test_a_parameter_that_is_a_single_number_counts_too():
    """A learned temperature on the logits: both losses pull it."""
    network, _ = networks.source_statistics("resnet")
    network = copy.deepcopy(network)
    network.classifier = Scaled(network.classifier)
    task = Task(network, Supervised(1), InnerLoop(trainable=("classifier.scale",)))
    result = gradient_alignment(task, shifted(), torch.ones(5, dtype=torch.long), "abcde")
    torch.testing.assert_close(result.cosine, torch.ones(5, dtype=torch.double))


class Scaled(torch.nn.Module):
    """A layer and a learned factor."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.scale = layer, torch.nn.Parameter(torch.tensor(0.7, dtype=torch.double))

    def forward(self, features):
        return self.scale * self.layer(features)


def test_what_the_labels_say_nothing_about_has_no_cosine():
    network, statistics = networks.source_statistics("vit")
    task = Task(network, MAETraining(), InnerLoop(trainable=["head"]), statistics)
    alignment = gradient_alignment(task, shifted(), LABELS, "abcde")
    assert alignment.cosine.isnan().all()
    assert (alignment.inner == 0).all()
    expected = F.cross_entropy(network(shifted()).logits, LABELS, reduction="none")
    torch.testing.assert_close(alignment.supervised_loss, expected.detach())


def test_an_image_without_a_gradient_has_no_cosine():
    network, statistics = networks.source_statistics("resnet")
    task = Task(network, ActMAD(tolerance=1e9), statistics=statistics)
    alignment = gradient_alignment(task, shifted(), LABELS, "abcde")
    assert alignment.cosine.isnan().all()
    assert (alignment.inner == 0).all()
