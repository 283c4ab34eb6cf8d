"""Streams: every batch starts from the last one's weights, as in plain autograd on one network."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import networks
from tests.helpers.contract import shifted
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.method import Method
from tttlab.adaptation.online import adapt_stream
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.methods.actmad import ActMAD
from tttlab.methods.lame import LAME, assign, neighbor_affinities
from tttlab.methods.memo import MEMO
from tttlab.methods.none import NoAdaptation
from tttlab.methods.sar import SAR
from tttlab.methods.simclr import SimCLRTraining
from tttlab.methods.t3a import T3A
from tttlab.methods.tent import TENT
from tttlab.methods.views import ViewAverage
from tttlab.seeding import torch_generator

COUNT, BATCH = 7, 3  # batches of 3, 2 and 2
BATCHES = [slice(0, 3), slice(3, 5), slice(5, 7)]


def stream(count=COUNT):
    return shifted(count)


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


def by_batch_statistics(network: nn.Module) -> nn.Module:
    """Make BatchNorm use PyTorch's batch statistics, without running ones."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return network


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.9), ("adam", 0.0)])
def test_tent_is_entropy_minimisation_by_batch_statistics_along_the_stream(optimizer, momentum):
    """Against PyTorch's BatchNorm, autograd and optimiser, whose state is kept between batches."""
    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(
        steps=2,
        lr=1e-2,
        optimizer=optimizer,
        momentum=momentum,
        trainable="norm",
        normalisation="image",
    )
    result = adapt_stream(network, stream(), TENT(), loop, batch_size=BATCH, statistics=statistics)
    slow = by_batch_statistics(copy.deepcopy(network).eval())
    parameters = list(select_parameters(slow, "norm").values())
    if optimizer == "adam":
        slow_optimizer = torch.optim.Adam(parameters, lr=1e-2)
    else:
        slow_optimizer = torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    logits, losses = [], []
    for part in BATCHES:
        for _ in range(2):
            loss = entropy(slow(stream()[part]).logits).mean()
            losses += [loss.item()]
            slow_optimizer.zero_grad()
            loss.backward()
            slow_optimizer.step()
        with torch.no_grad():
            logits.append(slow(stream()[part]).logits)
    torch.testing.assert_close(result.logits, torch.cat(logits), atol=1e-6, rtol=1e-6)
    assert result.losses[[0, 3, 5]].flatten().tolist() == pytest.approx(losses, rel=1e-6)
    source_logits = adapt(network, stream(), NoAdaptation()).logits
    torch.testing.assert_close(result.source_logits, source_logits, atol=1e-10, rtol=1e-10)
    assert (result.logits - source_logits).abs().max() > 1e-3


def test_tent_without_a_step_is_batch_statistics():
    """At learning rate 0 TENT is "BN adapt": every image is normalised by its batch."""
    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(steps=1, lr=0.0, trainable="norm", normalisation="image")
    logits_at = adapt_stream(
        network, stream(), TENT(), loop, batch_size=BATCH, statistics=statistics, record=(0, 1)
    ).logits_at
    with torch.no_grad():
        slow = by_batch_statistics(copy.deepcopy(network).eval())
        expected = torch.cat([slow(stream()[part]).logits for part in BATCHES])
    torch.testing.assert_close(logits_at[:, 0], expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits_at[:, 1], expected, atol=1e-6, rtol=1e-6)
    assert (expected - adapt(network, stream(), NoAdaptation()).logits).abs().max() > 1e-3


@pytest.mark.parametrize("method", [SimCLRTraining(num_views=3), MEMO(num_views=3)], ids=repr)
def test_a_method_for_one_image_takes_the_mean_of_a_batchs_losses(method):
    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(steps=1, lr=1e-2, clip=0.5)
    result = adapt_stream(network, stream(), method, loop, batch_size=BATCH, statistics=statistics)
    slow, logits = copy.deepcopy(network).eval(), []
    parameters = list(select_parameters(slow, "encoder").values())
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    for part in BATCHES:
        names = [str(index) for index in range(COUNT)[part]]
        generators = [torch_generator(0, "views", name, 0) for name in names]
        views = method.views(slow, stream()[part], generators)
        losses = [method.loss(slow, of_image, statistics, ())[0] for of_image in views]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        with torch.no_grad():
            logits.append(slow(stream()[part]).logits)
        expected = [loss.item() for loss in losses]
        assert result.losses[part, 0].tolist() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(result.logits, torch.cat(logits), atol=1e-6, rtol=1e-6)


@dataclass(frozen=True)
class Counting(Method):
    """The loss is the number of the step times the mean square of the logits."""

    protocols = ("online",)
    whole_batch = True

    def init_state(self):
        return torch.zeros((), dtype=torch.float64)

    def loss(self, net, views, statistics, state):
        return (state + 1) * net(views).logits.square().mean(), state + 1


def test_state_flows_from_step_to_step_and_from_batch_to_batch():
    network, _ = networks.source_statistics("resnet")
    loop = InnerLoop(steps=2, lr=0.0)
    result = adapt_stream(network, stream(), Counting(), loop, batch_size=BATCH)
    losses = torch.stack([result.losses[part.start] for part in BATCHES])
    with torch.no_grad():
        logits = [network.eval()(stream()[part]).logits for part in BATCHES]
    squares = torch.stack([batch.square().mean() for batch in logits])
    steps = torch.arange(1.0, 7).double().view(3, 2)
    torch.testing.assert_close(losses / squares[:, None], steps)


@dataclass(frozen=True)
class OnlyFirst(Counting):
    """There is a gradient at the first step alone."""

    def loss(self, net, views, statistics, state):
        return (state == 0) * net(views).logits.square().mean(), state + 1


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.9), ("adam", 0.0)])
def test_a_batch_that_teaches_nothing_moves_nothing(optimizer, momentum):
    """No step is taken, not even by momentum, as when SAR, EATA or DeYO select no image."""
    network, _ = networks.source_statistics("resnet")
    loop = InnerLoop(steps=1, lr=1e-2, optimizer=optimizer, momentum=momentum)
    images = stream(3)[[0, 1, 2, 0, 1, 2, 0, 1, 2]]
    logits = adapt_stream(network, images, OnlyFirst(), loop, batch_size=BATCH).logits
    assert (logits[:3] - adapt(network, images[:3], NoAdaptation()).logits).abs().max() > 1e-3
    assert torch.equal(logits[:3], logits[3:6])
    assert torch.equal(logits[:3], logits[6:])


@dataclass(frozen=True)
class Failing(Counting):
    """The loss is finite at the first step and infinite at the second."""

    def loss(self, net, views, statistics, state):
        return net(views).logits.square().mean() * (1 if state == 0 else torch.inf), state + 1


def test_a_batch_that_fails_on_the_way_keeps_its_losses_in_shape():
    network, _ = networks.source_statistics("resnet")
    loop = InnerLoop(steps=4, lr=1e-3)
    result = adapt_stream(network, stream(3), Failing(), loop, batch_size=BATCH)
    assert result.losses.shape == (3, 4)
    assert result.losses[:, 0].isfinite().all()
    assert result.losses[:, 1:].isinf().all()
    assert result.fell_back.all()
    assert torch.equal(result.logits, result.source_logits)


def test_a_batch_with_a_loss_that_is_not_finite_gets_the_source_predictions():
    network, statistics = networks.source_statistics("resnet")
    images = stream()
    images[3] = float("nan")  # the second batch
    loop = InnerLoop(steps=1, lr=1e-2, trainable="norm", normalisation="image")
    settings = {"batch_size": BATCH, "statistics": statistics}
    result = adapt_stream(network, images, TENT(), loop, record=(0, 1), **settings)
    assert result.fell_back.tolist() == [False] * 3 + [True] * 2 + [False] * 2
    assert torch.equal(result.logits[4], result.source_logits[4])
    # So is what was recorded: before the step, too, the batch's moments are not finite.
    assert torch.equal(result.logits_at[4], result.source_logits[[4, 4]])
    assert result.logits[5:].isfinite().all()
    # The batches after it are as without it.
    without = adapt_stream(network, images[[0, 1, 2, 5, 6, 6]], TENT(), loop, **settings)
    with_it = adapt_stream(network, images[[0, 1, 2, 3, 3, 3, 5, 6, 6]], TENT(), loop, **settings)
    torch.testing.assert_close(with_it.logits[6:], without.logits[3:])


@pytest.mark.parametrize("method", [T3A(), LAME(num_neighbors=2)], ids=repr)
def test_an_image_that_gives_no_number_harms_its_batch_at_most(method):
    network, _ = networks.source_statistics("resnet")
    images = stream()
    images[1] = float("nan")
    result = adapt_stream(network, images, method, InnerLoop(steps=0), batch_size=BATCH)
    assert result.fell_back[1]
    assert not result.fell_back[3:].any()
    assert result.logits[3:].isfinite().all()


@dataclass(frozen=True)
class Overflowing(Method):
    """The second step has a finite loss and makes the weights overflow."""

    protocols = ("online",)
    whole_batch = True

    def init_state(self):
        return torch.zeros((), dtype=torch.float64)

    def loss(self, net, views, statistics, state):
        return (1e306 if state == 1 else 1e-12) * net(views).logits.square().mean(), state + 1


def test_weights_that_overflow_go_back_to_the_source_and_the_stream_goes_on():
    network, _ = networks.source_statistics("resnet")
    loop = InnerLoop(steps=1, lr=1e9, momentum=0.9, trainable="norm")
    result = adapt_stream(network, stream(), Overflowing(), loop, batch_size=BATCH)
    assert result.losses.isfinite().all()
    assert result.fell_back.tolist() == [False] * 3 + [True] * 2 + [False] * 2
    torch.testing.assert_close(result.logits[3:5], result.source_logits[3:5])
    alone = adapt_stream(
        network, stream()[5:], Overflowing(), loop, batch_size=BATCH, image_ids=[5, 6]
    )
    torch.testing.assert_close(result.logits[5:], alone.logits)


@pytest.mark.parametrize("seed", [0, 3])
def test_views_are_averaged_on_a_stream_too(seed):
    """By the seed's own views, which the adapter draws for each image."""
    network, _ = networks.source_statistics("resnet")
    averages = [(NoAdaptation(), InnerLoop(average=3)), (ViewAverage(3), InnerLoop())]
    for method, loop in averages:
        logits = adapt_stream(network, stream(), method, loop, batch_size=BATCH, seed=seed).logits
        alone = adapt(network, stream(), method, loop, seed=seed).logits
        torch.testing.assert_close(logits, alone)
        other = adapt(network, stream(), method, loop, seed=1).logits
        assert (logits - other).abs().max() > 1e-6


@dataclass(frozen=True)
class Stirred(TENT):
    """After every step the weights are moved at random."""

    def after_step(self, parameters, source, state, generator):
        return {
            name: value + 0.01 * torch.rand(value.shape, generator=generator).to(value)
            for name, value in parameters.items()
        }, state


@pytest.mark.parametrize("method", [MEMO(num_views=3), Stirred()], ids=repr)
def test_what_is_drawn_along_a_stream_depends_on_the_seed(method):
    network, _ = networks.source_statistics("resnet")
    loop = InnerLoop(steps=2, lr=1e-2, trainable="norm")
    first, again, other = (
        adapt_stream(network, stream(), method, loop, batch_size=BATCH, seed=seed).logits
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-6


def test_no_images_are_refused():
    network, _ = networks.source_statistics("resnet")
    for function in (adapt, adapt_stream):
        with pytest.raises(UserError, match=r"^expected images, found none$"):
            function(network, stream()[:0], TENT())


def test_what_cannot_be_looked_at_is_refused():
    network, _ = networks.source_statistics("resnet")
    message = (
        r"ActMAD.* is defined for episodic, found online; use tttlab\.adaptation\.adapter\.adapt"
    )
    with pytest.raises(UserError, match=message):
        adapt_stream(network, stream(), ActMAD())
    message = "average: 2 views cannot replace the prediction that LAME"
    with pytest.raises(UserError, match=message):
        adapt_stream(network, stream(), LAME(), InnerLoop(average=2))
    with pytest.raises(UserError, match=r"after 0 and all 4 steps, found \[2\]"):
        adapt_stream(network, stream(), TENT(), InnerLoop(steps=4), record=(0, 2))


def test_entropy_of_a_die_and_of_certainty():
    method, sure = TENT(), torch.tensor([[1e3, 0.0, 0.0, 0.0]], dtype=torch.float64)
    cases = (
        (0 * sure, np.log(4)),
        (sure, 0.0),
        (torch.cat([0 * sure, sure]), np.log(4) / 2),
    )
    for logits, expected in cases:
        loss, _ = method.loss(lambda _views, logits=logits: networks_outputs(logits), None, {}, ())
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        cross_entropy = F.cross_entropy(logits, logits.softmax(-1))
        assert loss.item() == pytest.approx(cross_entropy.item(), abs=1e-12)


class TestSAR:
    def test_a_sharpness_aware_step_from_two_gradients_by_hand(self):
        """The filter is applied again at the perturbed weights."""
        network, statistics = networks.source_statistics("resnet")
        method = SAR(margin=0.957, reset_below=0.0)
        loop = InnerLoop(steps=1, lr=1e-2, trainable="norm", sharpness=0.05, normalisation="image")
        result = adapt_stream(
            network, stream(), method, loop, batch_size=BATCH, statistics=statistics
        )
        slow = by_batch_statistics(copy.deepcopy(network).eval())
        parameters, logits, counts = list(select_parameters(slow, "norm").values()), [], []

        def gradients(part):
            entropies = entropy(slow(stream()[part]).logits)
            reliable = entropies < 0.957 * np.log(networks.CLASSES)
            counts.append((int(reliable.sum()), len(reliable)))
            return torch.autograd.grad(entropies[reliable].mean(), parameters)

        for part in BATCHES:
            weights, first = [value.detach().clone() for value in parameters], gradients(part)
            length = torch.cat([slope.flatten() for slope in first]).norm()
            with torch.no_grad():
                for parameter, slope in zip(parameters, first, strict=True):
                    parameter += 0.05 * slope / length
            second = gradients(part)
            with torch.no_grad():
                for parameter, before, slope in zip(parameters, weights, second, strict=True):
                    parameter.copy_(before - 1e-2 * slope)
                logits.append(slow(stream()[part]).logits)
        assert all(kept > 0 for kept, _ in counts)
        assert sum(kept < size for kept, size in counts) >= 2  # the filter removed images
        torch.testing.assert_close(result.logits, torch.cat(logits), atol=1e-6, rtol=1e-6)

    def test_unreliable_images_teach_nothing(self):
        logits = torch.tensor([[0.0, 0, 0, 0], [9.0, 0, 0, 0]], dtype=torch.float64)
        logits.requires_grad_()
        state = SAR().init_state()
        loss, state = SAR().loss(lambda _views: networks_outputs(logits), None, {}, state)
        assert loss.item() == state.item() == pytest.approx(entropy(logits[1]).item())
        (slope,) = torch.autograd.grad(loss, logits)
        assert not slope[0].any()
        assert slope[1].any()
        state = torch.tensor(0.7)
        loss, state = SAR().loss(lambda _views: networks_outputs(logits[:1]), None, {}, state)
        assert (loss.item(), state.item()) == (0.0, pytest.approx(0.7))

    def test_the_source_weights_come_back_before_the_collapse(self):
        """A threshold that no loss reaches resets weights and momentum before every batch."""
        network, statistics = networks.source_statistics("resnet")
        loop = InnerLoop(steps=1, lr=1e-2, momentum=0.9, trainable="norm", normalisation="image")
        settings = {"batch_size": BATCH, "statistics": statistics}
        method = SAR(margin=2.0, reset_below=100.0)
        result = adapt_stream(network, stream(), method, loop, **settings, record=(0, 1))
        torch.testing.assert_close(result.logits, result.logits_at[:, 0])
        method = SAR(margin=2.0, reset_below=0.0)
        without_resets = adapt_stream(network, stream(), method, loop, **settings)
        assert not torch.allclose(without_resets.logits, result.logits)


class TestT3A:
    def test_against_a_loop_over_images_and_classes(self):
        network, _ = networks.source_statistics("resnet")
        results = adapt_stream(network, stream(9), T3A(filter_size=2), batch_size=3).logits
        weights, bias = (value.detach().numpy() for value in network.classifier.parameters())
        supports = [(row, weights @ row + bias) for row in weights]
        with torch.no_grad():
            outputs = [network.eval()(part) for part in stream(9).split(3)]
        for batch, output in enumerate(outputs):
            features, logits = output.features.numpy(), output.logits.numpy()
            supports += list(zip(features, logits, strict=True))
            centroids = []
            for label in range(networks.CLASSES):
                of_class = [
                    (entropy(torch.tensor(scores)).item(), feature / np.linalg.norm(feature))
                    for feature, scores in supports
                    if scores.argmax() == label
                ]
                of_class.sort(key=lambda pair: pair[0])
                kept = [feature for _, feature in of_class[:2]]
                centroid = np.sum(kept, axis=0) if kept else np.zeros(weights.shape[1])
                centroids.append(centroid / max(np.linalg.norm(centroid), 1e-12))
            scores = features @ np.array(centroids).T
            part = results[3 * batch : 3 * batch + 3]
            np.testing.assert_allclose(part, scores, rtol=1e-8, atol=1e-10)

    def test_it_remembers_what_came_before(self):
        network, _ = networks.source_statistics("resnet")
        whole = adapt_stream(network, stream(9), T3A(), batch_size=3).logits[6:]
        alone = adapt_stream(network, stream(9)[6:], T3A(), batch_size=3).logits
        assert not torch.equal(whole, alone)


class TestLAME:
    ANGLES = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.9, 2.3, 3.0], dtype=torch.float64)
    FEATURES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
    LOGITS = torch.tensor(
        [
            [1.0, 0, 0],
            [0.2, 0.4, 0],
            [0, 0.6, 0.1],
            [0.5, 0, 0.4],
            [0, 0.1, 0.9],
            [0.3, 0, 0.2],
            [0, 0, 1.2],
        ]
    )

    @pytest.mark.parametrize(
        ("symmetric", "expected"),
        [
            (
                False,
                [
                    [0.56621800, 0.26835296],
                    [0.37887904, 0.42335170],
                    [0.28015814, 0.48901034],
                    [0.39999943, 0.31255707],
                    [0.19153173, 0.18267916],
                    [0.22112107, 0.16124178],
                    [0.10467309, 0.09772037],
                ],
            ),
            (
                True,
                [
                    [0.61479675, 0.21517352],
                    [0.43821169, 0.35592312],
                    [0.34702030, 0.41190331],
                    [0.38534472, 0.23885011],
                    [0.13666090, 0.13257895],
                    [0.20256935, 0.14854580],
                    [0.11201111, 0.10590406],
                ],
            ),
        ],
    )
    def test_assignments_are_those_of_the_authors_code(self, symmetric, expected):
        """With two nearest neighbours, with and without forced symmetry."""
        log_q = self.LOGITS.double().log_softmax(-1)
        z = assign(log_q, neighbor_affinities(self.FEATURES, 2, symmetric), 100).exp()
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(z[:, :2], expected, rtol=0, atol=2e-7)
        assert LAME().symmetric is False

    def test_affinities_join_nearest_neighbours_one_way_or_both(self):
        angles = torch.tensor([0.0, 0.1, 0.25, 2.0])
        features = 3 * torch.stack([angles.cos(), angles.sin()], 1)
        one_way = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
        both = torch.tensor([[0, 1, 0, 0], [1, 0, 0.5, 0], [0, 0.5, 0, 0.5], [0, 0, 0.5, 0]])
        torch.testing.assert_close(neighbor_affinities(features, 1), one_way)
        torch.testing.assert_close(neighbor_affinities(features, 1, symmetric=True), both)

    def test_the_fixed_point_of_symmetric_affinities_minimises_the_objective(self):
        """The gradient of the objective, over the logits of the assignments, is zero there."""
        logits = networks.images(1, seed=3).flatten()[:24].double().view(8, 3).mul(4)
        log_q, w = logits.log_softmax(-1), neighbor_affinities(logits, 3, symmetric=True)

        def objective(log_z):
            z = log_z.exp()
            return (z * (log_z - log_q)).sum() - (w * (z @ z.T)).sum() / 2

        log_z = assign(log_q, w, 1000)
        logits = log_z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(objective(logits.log_softmax(-1)), logits)
        assert slope.abs().max() < 1e-4
        assert objective(log_z) < objective(log_q)

    def test_neighbours_outvote_a_doubtful_image(self):
        log_q = torch.tensor([[4.0, 0], [4.0, 0], [4.0, 0], [-0.2, 0]]).log_softmax(-1)
        w = torch.ones(4, 4).fill_diagonal_(0)
        assert log_q.argmax(1).tolist() == [0, 0, 0, 1]
        assert assign(log_q, w, 100).argmax(1).tolist() == [0, 0, 0, 0]
        # Without neighbours nothing changes.
        torch.testing.assert_close(assign(log_q, 0 * w, 100), log_q)


def networks_outputs(logits):
    from tttlab.networks.network import Outputs

    return Outputs(logits, None)
