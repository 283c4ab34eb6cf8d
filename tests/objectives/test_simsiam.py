"""SimSiam: closed forms, the stop-gradient, and the two targets at test time."""

import copy
import math

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity

from tests.helpers import networks, trainings
from tttlab.adaptation.adapter import adapt
from tttlab.config.inner_loop import InnerLoop
from tttlab.data.pixels import as_images
from tttlab.errors import UserError
from tttlab.methods.simsiam import SimSiamTraining
from tttlab.objectives.simsiam import SimSiam, disagreement
from tttlab.seeding import torch_generator
from tttlab.training.optimisers import Recipe
from tttlab.training.recipes import pretrain


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_perfect_orthogonal_and_opposite_predictions():
    same = random(1, 6).expand(4, -1)
    assert disagreement(3 * same, same).item() == pytest.approx(-1)  # length does not matter
    assert disagreement(-same, same).item() == pytest.approx(1)
    units = torch.eye(2, 6).double()
    first, second = units[[0, 0]], units[[1, 1]]
    assert disagreement(first, second).item() == pytest.approx(0)
    # A view is not compared with itself: each predicts its own projection, orthogonal to the other.
    assert disagreement(units, units).item() == pytest.approx(0)


def test_every_ordered_pair_counts_once():
    predictions, projections = random(4, 6), random(4, 6, seed=1)
    total = 0.0
    for i in range(4):
        for j in range(4):
            if i != j:
                p, z = predictions[i].numpy(), projections[j].numpy()
                total -= float(p @ z) / math.sqrt(p @ p) / math.sqrt(z @ z)
    assert disagreement(predictions, projections).item() == pytest.approx(total / 12, rel=1e-12)


def test_two_views_are_lightlys_symmetrised_loss():
    network, _ = networks.source_statistics("simsiam")
    views = networks.images(10, seed=3).double().view(5, 2, 3, 16, 16)
    negative_cosine = NegativeCosineSimilarity()
    with torch.no_grad():
        first, second = network(views[:, 0]), network(views[:, 1])
        forwards = negative_cosine(first.predictions, second.projections)
        backwards = negative_cosine(second.predictions, first.projections)
        loss = SimSiam().loss(network, views, torch.Generator())
    torch.testing.assert_close(loss, (forwards + backwards) / 2)


def test_the_gradient_stops_at_the_projections():
    predictions, projections = random(3, 6).requires_grad_(), random(3, 6, seed=1).requires_grad_()
    disagreement(predictions, projections).backward()
    assert projections.grad is None
    assert predictions.grad.abs().max() > 0


def test_the_gradient_is_that_with_the_projections_as_constants():
    network = copy.deepcopy(networks.source_statistics("simsiam")[0])
    views = networks.images(3, seed=4).double()
    parameters = [
        value for name, value in network.named_parameters() if not name.startswith("classifier.")
    ]
    loss, _ = SimSiamTraining().loss(network, views, {}, ())
    gradients = torch.autograd.grad(loss, parameters)
    constants = [
        torch.tensor(row.tolist(), dtype=torch.float64) for row in network(views).projections
    ]
    predictions = network(views).predictions
    terms = [
        torch.nn.functional.cosine_similarity(predictions[i], constants[j], dim=0)
        for i in range(3)
        for j in range(3)
        if i != j
    ]
    expected = torch.autograd.grad(-sum(terms) / 6, parameters)
    for gradient, by_hand in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, by_hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("target", ["self", "source"])
def test_one_image_has_a_gradient_at_the_first_step(target):
    """NT-Xent's gradient is exactly zero there; see tests/objectives/test_objectives.py."""
    network = copy.deepcopy(networks.source_statistics("simsiam")[0])
    method = SimSiamTraining(num_views=2, target=target)
    views = method.views(network, networks.images(1, seed=5).double(), [torch_generator(0)])[0]
    net = type("Net", (), {"module": network, "__call__": lambda _self, images: network(images)})()
    method.loss(net, views, {}, ())[0].backward()
    assert network.encoder.conv1[0].weight.grad.norm() > 1e-4


def adapted_by_hand(network, image, method, steps: int, lr: float, frozen) -> torch.Tensor:
    """Plain autograd on a copy; ``frozen`` gives the network whose projections are predicted."""
    adapted = copy.deepcopy(network)
    for step in range(steps):
        views = method.views(adapted, image[None], [torch_generator(0, "views", "x", step)])[0]
        predictions = torch.nn.functional.normalize(adapted(views).predictions, dim=-1)
        targets = torch.nn.functional.normalize(frozen(adapted)(views).projections.detach(), dim=-1)
        cosines = predictions @ targets.T
        loss = -(cosines.sum() - cosines.trace()) / (len(views) * (len(views) - 1))
        encoder = list(adapted.encoder.parameters())
        gradients = torch.autograd.grad(loss, encoder)
        for parameter, gradient in zip(encoder, gradients, strict=True):
            parameter.data -= lr * gradient
    with torch.no_grad():
        return adapted(image[None]).logits[0]


def test_both_targets_agree_for_a_step_and_part_then():
    network, _ = networks.source_statistics("simsiam")
    image = networks.images(1, seed=6).double() * 0.4 + 0.6
    logits = {}
    for target, frozen in (("self", lambda adapted: adapted), ("source", lambda _adapted: network)):
        method = SimSiamTraining(num_views=3, target=target)
        for steps in (1, 4):
            loop = InnerLoop(steps=steps, lr=0.05)
            logits[target, steps] = adapt(network, image, method, loop, image_ids=["x"]).logits[0]
            expected = adapted_by_hand(network, image[0], method, steps, 0.05, frozen)
            torch.testing.assert_close(logits[target, steps], expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(logits["self", 1], logits["source", 1], rtol=1e-9, atol=1e-12)
    assert (logits["self", 4] - logits["source", 4]).abs().max() > 1e-5


def test_training_keeps_the_projections_apart():
    """The stop-gradient prevents a collapse of all images to one point."""
    options = trainings.SIMSIAM["backbone_options"] | {"channels": [8, 8, 16, 16]}
    network, objective = trainings.build(trainings.SIMSIAM | {"backbone_options": options})
    images, recipe = trainings.image_set(48), Recipe(epochs=20, batch_size=12, lr=1e-2)
    rows = pretrain(
        trainings.trainer(), network, objective, images, (images, images), trainings.VIEWS, recipe
    )
    with torch.no_grad():
        projections = network(as_images(torch.from_numpy(images.pixels))).projections
    spread = torch.nn.functional.normalize(projections, dim=-1).std(0).mean().item()
    assert rows[-1]["loss"] < rows[1]["loss"] - 0.2
    # It is 1/√P for points all over the sphere. Five seeds gave 0.91 to 0.99 of that, and 0.29 to
    # 0.67 without the stop-gradient.
    assert spread > 0.8 / math.sqrt(8)


def test_a_network_without_the_heads_is_refused():
    network, _ = networks.source_statistics("resnet")
    with pytest.raises(UserError, match="needs a network with the head of objective simsiam"):
        adapt(network, networks.images(1).double(), SimSiamTraining())
