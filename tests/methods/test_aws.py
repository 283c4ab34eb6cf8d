"""AWS: its terms against loops and closed forms, and a stream against plain autograd."""

import copy

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from tests.helpers import networks
from tests.helpers.contract import shifted
from tttlab.adaptation.online import adapt_stream
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.inner_loop import InnerLoop
from tttlab.methods.aws import AWS, feature_distance, mutual_information, mutual_learning
from tttlab.networks.network import Bound
from tttlab.objectives.simclr import nt_xent
from tttlab.seeding import torch_generator


def rows(count, width, seed, scale=3.0):
    values = np.random.default_rng(seed).normal(scale=scale, size=(count, width))
    return torch.tensor(values, requires_grad=True)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def cosine(first, second):
    return first @ second / np.linalg.norm(first) / np.linalg.norm(second)


def bound(network, moved=0.0):
    """The network's encoder as leaves, moved away from the source weights."""
    generator, leaves = torch.Generator().manual_seed(5), {}
    for name, value in select_parameters(network, "encoder").items():
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        leaves[name] = (value.detach() + moved * noise).requires_grad_()
    return Bound(network, leaves), leaves


def drawn(method, network, images):
    generators = [torch_generator(0, "views", str(index), 0) for index in range(len(images))]
    views = method.views(network, images, generators)
    return {name: part.flatten(0, 1) for name, part in views.items()}


class TestTerms:
    def test_nt_xent_against_a_double_loop(self):
        projections = rows(6, 5, seed=0)
        z, losses = projections.detach().numpy(), []
        for anchor, positive in ((0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)):
            scores = {
                row: np.exp(cosine(z[anchor], z[row]) / 0.3) for row in range(6) if row != anchor
            }
            losses.append(-np.log(scores[positive] / sum(scores.values())))
        loss = nt_xent(projections.unflatten(0, (-1, 2)), 0.3)
        assert loss.item() == pytest.approx(np.mean(losses), rel=1e-12)

    def test_one_image_has_no_negatives_and_teaches_nothing_by_contrast(self):
        """Pitfall 1: on a single image the other two terms are left, and nothing is infinite."""
        projections = rows(2, 5, seed=1)
        loss = nt_xent(projections.unflatten(0, (-1, 2)), 0.5)
        (slope,) = torch.autograd.grad(loss, projections)
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert slope.abs().max() < 1e-12

    def test_the_distance_of_features_is_of_their_directions(self):
        first, second = rows(4, 5, seed=2), rows(4, 5, seed=3)
        pairs = zip(first.detach().numpy(), second.detach().numpy(), strict=True)
        expected = [1 - cosine(*pair) for pair in pairs]
        assert feature_distance(first, second).item() == pytest.approx(np.mean(expected), rel=1e-12)
        assert feature_distance(first, 7 * first).item() == pytest.approx(0, abs=1e-12)

    def test_mutual_information_of_known_tables(self):
        eye = torch.eye(3, dtype=torch.float64)
        balanced = eye.repeat(2, 1)
        renamed, unsure = balanced.roll(1, 1), torch.full_like(balanced, 1 / 3)
        one_class = eye[[1] * 6]
        three_of_four = 0.5 * np.log(4 / 3) + 0.25 * np.log(2) + 0.25 * np.log(2 / 3)
        for first, second, expected in (
            (balanced, balanced, np.log(3)),
            (balanced, renamed, np.log(3)),
            (balanced, unsure, 0),
            (balanced, one_class, 0),
            (eye[[0, 0, 1, 1]], eye[[0, 0, 1, 0]], three_of_four),
        ):
            found = mutual_information(first, second).item()
            assert found == pytest.approx(expected, abs=1e-12)

    def test_mutual_learning_against_a_loop_over_images_and_classes(self):
        logits, source = rows(5, 3, seed=4), rows(5, 3, seed=5)
        q, p = softmax(logits.detach().numpy()), softmax(source.detach().numpy())
        cross = -sum(p[n, k] * np.log(q[n, k]) for n in range(5) for k in range(3)) / 5
        joint = np.array(
            [[sum(p[n, i] * q[n, j] for n in range(5)) / 5 for j in range(3)] for i in range(3)]
        )
        shared = sum(
            joint[i, j] * np.log(joint[i, j] / joint[i].sum() / joint[:, j].sum())
            for i in range(3)
            for j in range(3)
        )
        assert mutual_learning(logits, source).item() == pytest.approx(cross - shared, rel=1e-12)

    def test_certainty_is_no_reason_for_what_is_not_finite(self):
        """In single precision these probabilities are exactly 0 and 1."""
        logits = (1e3 * torch.eye(4)[[0, 0, 1]]).requires_grad_()
        loss = mutual_learning(logits, logits.detach())
        (slope,) = torch.autograd.grad(loss, logits)
        assert loss.item() == pytest.approx(-(np.log(3) - 2 / 3 * np.log(2)), rel=1e-5)
        assert slope.isfinite().all()


class TestOnANetwork:
    @pytest.mark.parametrize("kind", ["resnet", "vit"])
    def test_distillation_rests_at_the_source_weights_and_holds_to_them(self, kind):
        network, _ = networks.source_statistics(kind)
        method = AWS(contrastive=0.0, mutual=0.0)
        views = drawn(method, network, shifted(3))
        slopes = {}
        for moved in (0.0, 0.05):
            net, leaves = bound(network, moved)
            loss, _ = method.loss(net, views, {}, ())
            gradient = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            slopes[moved] = max(slope.abs().max().item() for slope in gradient if slope is not None)
            assert (loss.item() < 1e-12) == (moved == 0)
        assert slopes[0.0] < 1e-7  # rounding, where the cosine is 1
        assert slopes[0.05] > 1e-3

    def test_the_source_network_teaches_without_learning(self):
        network, _ = networks.source_statistics("resnet")
        net, leaves = bound(network, 0.05)
        loss, _ = AWS().loss(net, drawn(AWS(), network, shifted(3)), {}, ())
        loss.backward()
        assert any(leaf.grad is not None and leaf.grad.any() for leaf in leaves.values())
        parameters = dict(network.named_parameters())
        assert all(parameter.requires_grad for parameter in parameters.values())
        assert all(parameters[name].grad is None for name in leaves)
        network.zero_grad(set_to_none=True)

    @pytest.mark.parametrize(
        ("kind", "contrasted"), [("resnet", "projections"), ("vit", "features")]
    )
    def test_a_stream_is_plain_gradient_descent_on_a_copy_beside_the_network(
        self, kind, contrasted
    ):
        network, _ = networks.source_statistics(kind)
        method, parts = AWS(0.7, 2.0, 0.4, temperature=0.3), [slice(0, 3), slice(3, 5)]
        loop = InnerLoop(steps=2, lr=0.002, momentum=0.9, trainable=("encoder", "classifier"))
        result = adapt_stream(network, shifted(5), method, loop, batch_size=3)
        slow = copy.deepcopy(network).eval()
        trained = [*slow.encoder.parameters(), *slow.classifier.parameters()]
        optimizer, logits, losses = torch.optim.SGD(trained, lr=0.002, momentum=0.9), [], []
        for part in parts:
            images = shifted(5)[part]
            with torch.no_grad():
                source = network(images)
            for step in range(2):
                generators = [
                    torch_generator(0, "views", str(index), step) for index in range(5)[part]
                ]
                pairs = method.views(slow, images, generators)["pairs"]
                adapted = slow(images)
                z = F.normalize(getattr(slow(torch.cat(pairs.unbind(1))), contrasted), dim=1)
                alike = (z @ z.T / 0.3).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
                contrast = F.cross_entropy(alike, torch.arange(len(z)).roll(len(images)))
                apart = F.normalize(adapted.features) - F.normalize(source.features)
                distance = apart.square().sum(1).mean() / 2
                p, q = source.logits.softmax(1), adapted.logits.softmax(1)
                joint = torch.einsum("ni,nj->nij", p, q).mean(0)
                shared = entropy(p.mean(0)) + entropy(q.mean(0)) - entropy(joint.flatten())
                cross = entropy(p).mean() + kl_divergence(Categorical(p), Categorical(q)).mean()
                loss = 0.7 * contrast + 2.0 * distance + 0.4 * (cross - shared)
                losses.append(loss.item())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                logits.append(slow(images).logits)
        assert result.losses[[0, 3]].flatten().tolist() == pytest.approx(losses, rel=1e-9)
        torch.testing.assert_close(result.logits, torch.cat(logits), atol=1e-8, rtol=1e-8)
        assert (result.logits - result.source_logits).abs().max() > 1e-3

    def test_under_batch_statistics_both_models_see_the_same_batch(self):
        """The views must not enter the images' moments: the models would differ before any step."""
        network, statistics = networks.source_statistics("resnet")
        loop = InnerLoop(steps=1, lr=0.0, normalisation="image")
        method = AWS(contrastive=0.0, mutual=0.0)
        result = adapt_stream(
            network, shifted(5), method, loop, batch_size=3, statistics=statistics
        )
        assert result.losses.abs().max() < 1e-12

    def test_a_batch_of_one_image_draws_back_to_the_source_network(self):
        """Without negatives and a joint table, distance and divergence from the source are left.

        At the source weights these two have no slope.
        """
        network, _ = networks.source_statistics("resnet")
        views = drawn(AWS(), network, shifted(1))
        net, leaves = bound(network, 0.05)
        loss, _ = AWS().loss(net, views, {}, ())
        with torch.no_grad():
            adapted, source = net(shifted(1)), network(shifted(1))
        p, q = source.logits[0].softmax(0), adapted.logits[0].softmax(0)
        distance = 1 - cosine(adapted.features[0].numpy(), source.features[0].numpy())
        expected = distance - (p * q.log()).sum().item()
        assert loss.item() == pytest.approx(expected, rel=1e-9)
        slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        assert all(slope.isfinite().all() for slope in slopes if slope is not None)
        result = adapt_stream(network, shifted(2), AWS(), InnerLoop(steps=2, lr=1e-2), batch_size=1)
        assert not result.fell_back.any()
        torch.testing.assert_close(result.logits, result.source_logits, atol=1e-9, rtol=0)


def entropy(probabilities):
    return Categorical(probabilities).entropy()
