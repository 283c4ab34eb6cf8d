"""The agreement of gradients, against autograd on one image at a time."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import networks
from tests.helpers.contract import Unbound, shifted
from tttlab.adaptation.inner_loop import InnerLoop
from tttlab.adaptation.method import Method
from tttlab.adaptation.normalisation import normalised
from tttlab.adaptation.task import Task
from tttlab.adaptation.trainable import select_parameters
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
    found = gradient_alignment(task, shifted(), LABELS, names, images_per_step=2)
    chosen = select_parameters(network, trainable)
    shared = list(chosen.values())
    for place, (image, label) in enumerate(zip(shifted(), LABELS, strict=True)):
        views = method.views(network, image[None], [torch_generator(2, "views", names[place], 0)])
        one = (
            {key: value[0] for key, value in views.items()} if isinstance(views, dict) else views[0]
        )
        with normalised(network, loop, statistics):
            loss, _ = method.loss(Unbound(network, chosen), one, statistics, method.init_state())
            supervised = F.cross_entropy(network(image[None]).logits, label[None])
        first, second = (
            torch.cat(
                [
                    torch.zeros(parameter.numel(), dtype=torch.double)
                    if part is None
                    else part.flatten()
                    for part, parameter in zip(
                        torch.autograd.grad(value, shared, allow_unused=True), shared, strict=True
                    )
                ]
            )
            for value in (loss, supervised)
        )
        torch.testing.assert_close(found.inner[place], first @ second, atol=1e-8, rtol=1e-6)
        torch.testing.assert_close(found.supervised_loss[place], supervised.detach())
        torch.testing.assert_close(
            found.cosine[place],
            first @ second / first.norm() / second.norm(),
            atol=1e-7,
            rtol=1e-6,
            equal_nan=True,
        )


class Supervised(Method):
    """The supervised loss itself, with a known label: the best that a test-time loss could be, or the worst."""

    def __init__(self, sign):
        self.sign = sign

    def loss(self, net, views, statistics, state):
        return self.sign * F.cross_entropy(net(views).logits, torch.tensor([1])), state


@pytest.mark.parametrize("sign", [1, -1])
def test_the_supervised_loss_agrees_with_itself(sign):
    network, statistics = networks.source_statistics("resnet")
    labels = torch.ones(5, dtype=torch.long)
    task = Task(network, Supervised(sign), statistics=statistics)
    found = gradient_alignment(task, shifted(), labels, "abcde")
    torch.testing.assert_close(found.cosine, torch.full((5,), float(sign), dtype=torch.double))


def test_the_inner_product_is_the_first_order_decrease_of_the_supervised_loss():
    network, statistics = networks.source_statistics("resnet")
    method, loop = ActMAD(), InnerLoop(trainable="encoder")
    found = gradient_alignment(Task(network, method, loop, statistics), shifted(), LABELS, "abcde")
    from tttlab.adaptation.adapter import adapt

    lr = 1e-10
    moved = adapt(network, shifted(), method, InnerLoop(steps=1, lr=lr), statistics=statistics)
    after = F.cross_entropy(moved.logits, LABELS, reduction="none")
    torch.testing.assert_close(
        (found.supervised_loss - after) / lr, found.inner, rtol=0.02, atol=1e-3
    )


def test_an_image_without_a_gradient_has_no_cosine():
    network, statistics = networks.source_statistics("resnet")
    task = Task(network, ActMAD(tolerance=1e9), statistics=statistics)
    found = gradient_alignment(task, shifted(), LABELS, "abcde")
    assert found.cosine.isnan().all()
    assert (found.inner == 0).all()
