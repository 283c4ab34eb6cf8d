"""Streams: every batch starts from the weights that the last one left; the slow path is plain autograd on one network."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import networks
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.inner_loop import InnerLoop, select_parameters
from tttlab.adaptation.method import Method
from tttlab.adaptation.normalisation import Normalisation
from tttlab.adaptation.online import adapt_stream
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
    return (networks.images(count, seed=50) * 0.4 + 0.6).double()


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


def by_batch_statistics(network: nn.Module) -> nn.Module:
    """BatchNorm as in training mode, without moving averages: PyTorch's own batch statistics."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return network


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.9), ("adam", 0.0)])
def test_tent_is_entropy_minimisation_by_batch_statistics_along_the_stream(optimizer, momentum):
    """Against torch's own BatchNorm in training mode, autograd and optimiser, whose moments flow on too."""
    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(
        steps=2,
        lr=1e-2,
        optimizer=optimizer,
        momentum=momentum,
        trainable="norm",
        normalisation=Normalisation("image"),
    )
    found = adapt_stream(network, stream(), TENT(), loop, batch_size=BATCH, statistics=statistics)
    slow = by_batch_statistics(copy.deepcopy(network).eval())
    chosen = list(select_parameters(slow, "norm").values())
    own = (
        torch.optim.Adam(chosen, lr=1e-2)
        if optimizer == "adam"
        else torch.optim.SGD(chosen, lr=1e-2, momentum=0.9)
    )
    logits, losses = [], []
    for part in BATCHES:
        for _ in range(2):
            loss = entropy(slow(stream()[part]).logits).mean()
            losses += [loss.item()]
            own.zero_grad()
            loss.backward()
            own.step()
        with torch.no_grad():
            logits.append(slow(stream()[part]).logits)
    torch.testing.assert_close(found.logits, torch.cat(logits), atol=1e-6, rtol=1e-6)
    assert found.losses[[0, 3, 5]].flatten().tolist() == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(
        found.source_logits, adapt(network, stream(), NoAdaptation()).logits, atol=1e-10, rtol=1e-10
    )
    assert (found.logits - found.source_logits).abs().max() > 1e-3


def test_tent_without_a_step_is_batch_statistics():
    """At learning rate 0 what remains is "BN adapt": every image normalised by its batch."""
    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(steps=1, lr=0.0, trainable="norm", normalisation=Normalisation("image"))
    found = adapt_stream(
        network, stream(), TENT(), loop, batch_size=BATCH, statistics=statistics, record=(0, 1)
    ).logits_at
    with torch.no_grad():
        slow = by_batch_statistics(copy.deepcopy(network).eval())
        expected = torch.cat([slow(stream()[part]).logits for part in BATCHES])
    torch.testing.assert_close(found[:, 0], expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[:, 1], expected, atol=1e-6, rtol=1e-6)
    assert (expected - adapt(network, stream(), NoAdaptation()).logits).abs().max() > 1e-3


@pytest.mark.parametrize("method", [SimCLRTraining(num_views=3), MEMO(num_views=3)], ids=repr)
def test_a_method_for_one_image_takes_the_mean_of_a_batchs_losses(method):
    network, statistics = networks.source_statistics("resnet")
    loop = InnerLoop(steps=1, lr=1e-2, clip=0.5)
    found = adapt_stream(network, stream(), method, loop, batch_size=BATCH, statistics=statistics)
    slow = copy.deepcopy(network).eval()
    chosen = list(select_parameters(slow, "encoder").values())
    own, logits, names = (
        torch.optim.SGD(chosen, lr=1e-2),
        [],
        [str(index) for index in range(COUNT)],
    )
    for part in BATCHES:
        views = method.views(
            slow, stream()[part], [torch_generator(0, "views", name, 0) for name in names[part]]
        )
        losses = [method.loss(slow, each, statistics, ())[0] for each in views]
        own.zero_grad()
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_(chosen, 0.5)
        own.step()
        with torch.no_grad():
            logits.append(slow(stream()[part]).logits)
        assert found.losses[part, 0].tolist() == pytest.approx(
            [loss.item() for loss in losses], rel=1e-6
        )
    torch.testing.assert_close(found.logits, torch.cat(logits), atol=1e-6, rtol=1e-6)


@dataclass(frozen=True)
class Counting(Method):
    """Its loss is the number of steps seen so far, times the mean logit."""

    protocols = ("online",)
    whole_batch = True

    def init_state(self):
        return torch.zeros((), dtype=torch.float64)

    def loss(self, net, views, statistics, state):
        return (state + 1) * net(views).logits.square().mean(), state + 1


def test_state_flows_from_step_to_step_and_from_batch_to_batch():
    network, _ = networks.source_statistics("resnet")
    loop = InnerLoop(steps=2, lr=0.0)
    found = adapt_stream(network, stream(), Counting(), loop, batch_size=BATCH)
    with torch.no_grad():
        own = torch.stack(
            [network.eval()(stream()[part]).logits.square().mean() for part in BATCHES]
        )
    ratio = torch.stack([found.losses[part.start] for part in BATCHES]) / own[:, None]
    torch.testing.assert_close(ratio, torch.arange(1.0, 7).double().view(3, 2))


@dataclass(frozen=True)
class OnlyFirst(Counting):
    """It learns from the first step it sees, and has no gradient ever after."""

    def loss(self, net, views, statistics, state):
        return (state == 0) * net(views).logits.square().mean(), state + 1


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.9), ("adam", 0.0)])
def test_a_batch_that_teaches_nothing_moves_nothing(optimizer, momentum):
    """No step is taken, as where SAR, EATA or DeYO select nothing: neither momentum nor Adam's averages roll on."""
    network, _ = networks.source_statistics("resnet")
    loop = InnerLoop(steps=1, lr=1e-2, optimizer=optimizer, momentum=momentum)
    same = stream(3)[[0, 1, 2, 0, 1, 2, 0, 1, 2]]
    found = adapt_stream(network, same, OnlyFirst(), loop, batch_size=BATCH).logits
    assert (found[:3] - adapt(network, same[:3], NoAdaptation()).logits).abs().max() > 1e-3
    assert torch.equal(found[:3], found[3:6])
    assert torch.equal(found[:3], found[6:])


@dataclass(frozen=True)
class Failing(Counting):
    """Its loss is finite at the first step of a batch of three and infinite at the second."""

    def loss(self, net, views, statistics, state):
        return net(views).logits.square().mean() * (1 if state == 0 else torch.inf), state + 1


def test_a_batch_that_fails_on_the_way_keeps_its_losses_in_shape():
    network, _ = networks.source_statistics("resnet")
    found = adapt_stream(
        network, stream(3), Failing(), InnerLoop(steps=4, lr=1e-3), batch_size=BATCH
    )
    assert found.losses.shape == (3, 4)
    assert found.losses[:, 0].isfinite().all()
    assert found.losses[:, 1:].isinf().all()
    assert found.fell_back.all()
    assert torch.equal(found.logits, found.source_logits)


def test_a_batch_that_cannot_be_learnt_from_gets_the_source_predictions_and_leaves_the_weights_finite():
    network, statistics = networks.source_statistics("resnet")
    images = stream()
    images[3] = float("nan")  # the second batch
    loop = InnerLoop(steps=1, lr=1e-2, trainable="norm", normalisation=Normalisation("image"))
    found = adapt_stream(network, images, TENT(), loop, batch_size=BATCH, statistics=statistics)
    assert found.fell_back.tolist() == [False] * 3 + [True] * 2 + [False] * 2
    assert torch.equal(found.logits[4], found.source_logits[4])
    assert found.logits[5:].isfinite().all()
    skipped = adapt_stream(
        network, stream()[[0, 1, 2, 5, 6, 6]], TENT(), loop, batch_size=BATCH, statistics=statistics
    )
    whole = adapt_stream(
        network,
        images[[0, 1, 2, 3, 3, 3, 5, 6, 6]],
        TENT(),
        loop,
        batch_size=BATCH,
        statistics=statistics,
    )
    torch.testing.assert_close(whole.logits[6:], skipped.logits[3:])  # as if it had not come


@dataclass(frozen=True)
class Overflowing(Method):
    """Its second step is finite, and throws the weights out of all bounds."""

    protocols = ("online",)
    whole_batch = True

    def init_state(self):
        return torch.zeros((), dtype=torch.float64)

    def loss(self, net, views, statistics, state):
        return (1e306 if state == 1 else 1e-6) * net(views).logits.square().mean(), state + 1


def test_weights_that_overflow_go_back_to_the_source_and_the_stream_goes_on():
    network, _ = networks.source_statistics("resnet")
    loop = InnerLoop(steps=1, lr=1e3, momentum=0.9, trainable="norm")
    found = adapt_stream(network, stream(), Overflowing(), loop, batch_size=BATCH)
    assert found.losses.isfinite().all()
    assert found.fell_back.tolist() == [False] * 3 + [True] * 2 + [False] * 2
    torch.testing.assert_close(found.logits[3:5], found.source_logits[3:5])
    alone = adapt_stream(
        network, stream()[5:], Overflowing(), loop, batch_size=BATCH, image_ids=[5, 6]
    )
    torch.testing.assert_close(found.logits[5:], alone.logits)


def test_views_are_averaged_on_a_stream_too():
    network, _ = networks.source_statistics("resnet")
    loop = InnerLoop(average=3)
    found = adapt_stream(network, stream(), NoAdaptation(), loop, batch_size=BATCH).logits
    torch.testing.assert_close(found, adapt(network, stream(), NoAdaptation(), loop).logits)
    own = adapt_stream(network, stream(), ViewAverage(3), batch_size=BATCH).logits
    torch.testing.assert_close(own, adapt(network, stream(), ViewAverage(3)).logits)


def test_no_images_are_refused():
    network, _ = networks.source_statistics("resnet")
    for refused in (adapt, adapt_stream):
        with pytest.raises(UserError, match=r"^expected images, found none$"):
            refused(network, stream()[:0], TENT())


def test_what_cannot_be_looked_at_is_refused():
    network, _ = networks.source_statistics("resnet")
    with pytest.raises(
        UserError,
        match=r"ActMAD.* is defined for episodic, found online; use tttlab\.adaptation\.adapter\.adapt",
    ):
        adapt_stream(network, stream(), ActMAD())
    with pytest.raises(
        UserError, match=r"average: 2 views cannot replace the prediction that LAME"
    ):
        adapt_stream(network, stream(), LAME(), InnerLoop(average=2))
    with pytest.raises(UserError, match=r"after 0 and all 4 steps, found \[2\]"):
        adapt_stream(network, stream(), TENT(), InnerLoop(steps=4), record=(0, 2))


def test_entropy_of_a_die_and_of_certainty():
    method, sure = TENT(), torch.tensor([[1e3, 0.0, 0.0, 0.0]], dtype=torch.float64)
    for logits, expected in (
        (0 * sure, np.log(4)),
        (sure, 0.0),
        (torch.cat([0 * sure, sure]), np.log(4) / 2),
    ):
        loss, _ = method.loss(lambda _views, logits=logits: networks_outputs(logits), None, {}, ())
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert loss.item() == pytest.approx(
            F.cross_entropy(logits, logits.softmax(-1)).item(), abs=1e-12
        )


class TestSAR:
    def test_a_sharpness_aware_step_from_two_gradients_by_hand(self):
        """The filter chooses again at the upper point: its images are those reliable there."""
        network, statistics = networks.source_statistics("resnet")
        method = SAR(margin=0.957, reset_below=0.0)
        loop = InnerLoop(
            steps=1, lr=1e-2, trainable="norm", sharpness=0.05, normalisation=Normalisation("image")
        )
        found = adapt_stream(
            network, stream(), method, loop, batch_size=BATCH, statistics=statistics
        )
        slow = by_batch_statistics(copy.deepcopy(network).eval())
        chosen, logits, counts = list(select_parameters(slow, "norm").values()), [], []

        def gradients(part):
            entropies = entropy(slow(stream()[part]).logits)
            reliable = entropies < 0.957 * np.log(networks.CLASSES)
            counts.append((int(reliable.sum()), len(reliable)))
            return torch.autograd.grad(entropies[reliable].mean(), chosen)

        for part in BATCHES:
            here, first = [parameter.detach().clone() for parameter in chosen], gradients(part)
            length = torch.cat([part.flatten() for part in first]).norm()
            with torch.no_grad():
                for parameter, slope in zip(chosen, first, strict=True):
                    parameter += 0.05 * slope / length
            second = gradients(part)
            with torch.no_grad():
                for parameter, before, slope in zip(chosen, here, second, strict=True):
                    parameter.copy_(before - 1e-2 * slope)
                logits.append(slow(stream()[part]).logits)
        assert all(kept > 0 for kept, _ in counts)
        assert sum(kept < size for kept, size in counts) >= 2  # the filter had something to do
        torch.testing.assert_close(found.logits, torch.cat(logits), atol=1e-6, rtol=1e-6)

    def test_unreliable_images_teach_nothing(self):
        logits = torch.tensor(
            [[0.0, 0, 0, 0], [9.0, 0, 0, 0]], dtype=torch.float64, requires_grad=True
        )
        loss, state = SAR().loss(
            lambda _views: networks_outputs(logits), None, {}, SAR().init_state()
        )
        assert loss.item() == state.item() == pytest.approx(entropy(logits[1]).item())
        (slope,) = torch.autograd.grad(loss, logits)
        assert not slope[0].any()
        assert slope[1].any()
        none, kept = SAR().loss(
            lambda _views: networks_outputs(logits[:1]), None, {}, torch.tensor(0.7)
        )
        assert (none.item(), kept.item()) == (0.0, pytest.approx(0.7))

    def test_the_source_weights_come_back_before_the_collapse(self):
        """With a threshold that no loss can reach, every batch starts from the source weights, and without momentum."""
        network, statistics = networks.source_statistics("resnet")
        loop = InnerLoop(
            steps=1, lr=1e-2, momentum=0.9, trainable="norm", normalisation=Normalisation("image")
        )
        method = SAR(margin=2.0, reset_below=100.0)
        found = adapt_stream(
            network, stream(), method, loop, batch_size=BATCH, statistics=statistics, record=(0, 1)
        )
        torch.testing.assert_close(found.logits, found.logits_at[:, 0])
        free = adapt_stream(
            network,
            stream(),
            SAR(margin=2.0, reset_below=0.0),
            loop,
            batch_size=BATCH,
            statistics=statistics,
        )
        assert not torch.allclose(free.logits, found.logits)


class TestT3A:
    def test_against_a_loop_over_images_and_classes(self):
        network, _ = networks.source_statistics("resnet")
        found = adapt_stream(network, stream(9), T3A(filter_size=2), batch_size=3).logits
        weights, bias = (value.detach().numpy() for value in network.classifier.parameters())
        supports = [(row, weights @ row + bias) for row in weights]
        with torch.no_grad():
            outputs = [network.eval()(part) for part in stream(9).split(3)]
        for batch, output in enumerate(outputs):
            features, logits = output.features.numpy(), output.logits.numpy()
            supports += list(zip(features, logits, strict=True))
            centroids = []
            for label in range(networks.CLASSES):
                own = [
                    (entropy(torch.tensor(scores)).item(), feature)
                    for feature, scores in supports
                    if scores.argmax() == label
                ]
                kept = [
                    feature / np.linalg.norm(feature)
                    for _, feature in sorted(own, key=lambda pair: pair[0])[:2]
                ]
                centroid = np.sum(kept, axis=0) if kept else np.zeros(weights.shape[1])
                centroids.append(centroid / max(np.linalg.norm(centroid), 1e-12))
            np.testing.assert_allclose(
                found[3 * batch : 3 * batch + 3],
                features @ np.array(centroids).T,
                rtol=1e-8,
                atol=1e-10,
            )

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
        """Their functions, run on these features and logits: two nearest neighbours, with and without forced symmetry."""
        log_q = self.LOGITS.double().log_softmax(-1)
        found = assign(log_q, neighbor_affinities(self.FEATURES, 2, symmetric), 100).exp()
        torch.testing.assert_close(
            found[:, :2], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-7
        )
        assert LAME().symmetric is False

    def test_affinities_join_nearest_neighbours_one_way_or_both(self):
        angles = torch.tensor([0.0, 0.1, 0.25, 2.0])
        features = 3 * torch.stack([angles.cos(), angles.sin()], 1)
        one_way = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
        both = torch.tensor([[0, 1, 0, 0], [1, 0, 0.5, 0], [0, 0.5, 0, 0.5], [0, 0, 0.5, 0]])
        torch.testing.assert_close(neighbor_affinities(features, 1), one_way)
        torch.testing.assert_close(neighbor_affinities(features, 1, symmetric=True), both)

    def test_the_fixed_point_of_symmetric_affinities_minimises_the_objective(self):
        """Its gradient over softmax-parametrised assignments, by autograd, is zero there."""
        logits = networks.images(1, seed=3).flatten()[:24].double().view(8, 3).mul(4)
        log_q, w = logits.log_softmax(-1), neighbor_affinities(logits, 3, symmetric=True)

        def objective(log_z):
            z = log_z.exp()
            return (z * (log_z - log_q)).sum() - (w * (z @ z.T)).sum() / 2

        found = assign(log_q, w, 1000)
        free = found.clone().requires_grad_()
        (slope,) = torch.autograd.grad(objective(free.log_softmax(-1)), free)
        assert slope.abs().max() < 1e-4
        assert objective(found) < objective(log_q)

    def test_neighbours_outvote_a_doubtful_image(self):
        log_q = torch.tensor([[4.0, 0], [4.0, 0], [4.0, 0], [-0.2, 0]]).log_softmax(-1)
        w = torch.ones(4, 4).fill_diagonal_(0)
        assert log_q.argmax(1).tolist() == [0, 0, 0, 1]
        assert assign(log_q, w, 100).argmax(1).tolist() == [0, 0, 0, 0]
        torch.testing.assert_close(
            assign(log_q, 0 * w, 100), log_q
        )  # without neighbours nothing changes


def networks_outputs(logits):
    from tttlab.networks.network import Outputs

    return Outputs(logits, None)
