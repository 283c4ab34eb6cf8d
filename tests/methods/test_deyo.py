"""DeYO against NumPy loops, plain autograd and torch's SGD."""

import copy
import math

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as vision

from tests.helpers import networks
from tests.helpers.contract import shifted
from tttlab.adaptation.online import adapt_stream
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.inner_loop import InnerLoop
from tttlab.methods.deyo import DeYO, shuffle_patches
from tttlab.networks.network import Outputs
from tttlab.seeding import torch_generator

BATCHES = [slice(0, 3), slice(3, 5), slice(5, 7)]


def stream():
    return shifted(7)


def streams(count, step=0):
    return [torch_generator(0, "views", str(index), step) for index in range(count)]


def permutations(grid, generators):
    return torch.stack([torch.randperm(grid**2, generator=generator) for generator in generators])


class TestShuffling:
    @pytest.mark.parametrize(("height", "width", "grid"), [(16, 16, 4), (8, 12, 4), (6, 9, 3)])
    def test_patches_go_where_a_loop_puts_them(self, height, width, grid):
        images = torch.arange(2 * 3 * height * width).float().view(2, 3, height, width)
        orders = permutations(grid, streams(2))
        views, tall, wide = shuffle_patches(images, orders, grid), height // grid, width // grid

        def patch(image, number):
            row, column = divmod(number, grid)
            return image[:, row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]

        for image, order, shuffled in zip(images, orders.tolist(), views, strict=True):
            for position, origin in enumerate(order):
                assert torch.equal(patch(shuffled, position), patch(image, origin))

    def test_the_grid_is_the_one_that_is_asked_for(self):
        images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        _, shuffled = DeYO(grid=2).views(None, images, streams(5))
        expected = shuffle_patches(images, permutations(2, streams(5)), 2)
        assert torch.equal(shuffled[:, 0], expected)

    def test_views_permute_the_pixels_of_every_image_by_its_own_stream(self):
        images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        same, shuffled = DeYO().views(None, images, streams(5))
        assert torch.equal(same[:, 0], images)
        assert shuffled.shape == (5, 1, 3, 16, 16)
        for image, view in zip(images, shuffled[:, 0], strict=True):
            assert (image != view).float().mean() > 0.5
            assert torch.equal(image.flatten(1).sort(1).values, view.flatten(1).sort(1).values)
        _, alone = DeYO().views(None, images[3:4], streams(5)[3:4])
        assert torch.equal(alone[0], shuffled[3])
        _, again = DeYO().views(None, images, streams(5))
        _, next_step = DeYO().views(None, images, streams(5, step=1))
        assert torch.equal(again, shuffled)
        assert (next_step != shuffled).flatten(1).any(1).all()
        _, of_one_image = DeYO().views(None, images[:1].expand(5, -1, -1, -1), streams(5))
        assert len({tuple(view.flatten().tolist()) for view in of_one_image}) == 5

    def test_where_the_grid_does_not_divide_the_side(self):
        """The image is resized by torchvision, as published, to 8 × 12 pixels and back."""
        images = torch.rand(2, 3, 10, 14, generator=torch.Generator().manual_seed(0))
        orders = permutations(4, streams(2))
        small = vision.resize(images, [8, 12], antialias=True)
        expected = vision.resize(shuffle_patches(small, orders, 4), [10, 14], antialias=True)
        torch.testing.assert_close(shuffle_patches(images, orders, 4), expected)
        assert shuffle_patches(images[..., :3, :2], orders, 4).shape == (2, 3, 3, 2)


def softmax(scores):
    return np.exp(scores) / np.exp(scores).sum()


def reference(logits, shuffled, margin=0.5, weight_margin=0.4, threshold=0.2):
    """Compute loss, its slope by the logits, and which filters every image passes, in a loop.

    d entropy / d logits is −p (log p + H), and the weights have no slope.
    """
    largest, terms, slopes, passed = math.log(logits.shape[1]), [], np.zeros_like(logits), []
    for index, (scores, shuffled_scores) in enumerate(zip(logits, shuffled, strict=True)):
        p, q = softmax(scores), softmax(shuffled_scores)
        entropy, fall = -(p * np.log(p)).sum(), p[p.argmax()] - q[p.argmax()]
        passed.append((bool(entropy < margin * largest), bool(fall > threshold)))
        if all(passed[-1]):
            weight = 1 / math.exp(entropy - weight_margin * largest) + 1 / math.exp(-fall)
            terms.append(weight * entropy)
            slopes[index] = -weight * p * (np.log(p) + entropy)
    return np.mean(terms), slopes / len(terms), passed


def test_filters_and_weights_against_a_loop_over_images():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(24, 5)) * rng.choice([1, 4], size=(24, 1))
    table, calls = torch.tensor(rows, requires_grad=True), []

    def net(images):
        """Look up the logits of images, each of which is the number of its row."""
        numbers = images[:, 0, 0, 0].long()
        calls.append((numbers.tolist(), torch.is_grad_enabled()))
        return Outputs(table[numbers], None)

    images = torch.arange(24.0).view(24, 1, 1, 1)
    loss, _ = DeYO().loss(net, (images[:12], images[12:]), {}, ())
    (slope,) = torch.autograd.grad(loss, table)
    expected, slopes, passed = reference(rows[:12], rows[12:])
    assert set(passed) == {(False, False), (False, True), (True, False), (True, True)}
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(slope[:12], slopes, rtol=1e-9, atol=1e-12)
    assert not slope[12:].any()
    reliable = [12 + index for index, (is_reliable, _) in enumerate(passed) if is_reliable]
    assert calls == [(list(range(12)), True), (reliable, False)]


def test_a_stream_against_autograd_and_torchs_sgd():
    network, _ = networks.source_statistics("resnet")
    method = DeYO(margin=0.999, plpd_threshold=0.0)
    loop = InnerLoop(steps=2, lr=0.05, momentum=0.9, trainable="norm")
    result = adapt_stream(network, stream(), method, loop, batch_size=3)
    slow, logits, losses, kept = copy.deepcopy(network).eval(), [], [], []
    trained = select_parameters(slow, "norm").values()
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    for part in BATCHES:
        for step in range(2):
            orders = permutations(4, streams(7, step)[part])
            scores = slow(stream()[part]).logits
            with torch.no_grad():
                shuffled = slow(shuffle_patches(stream()[part], orders, 4)).logits
            loss, slope, passed = reference(
                scores.detach().numpy(), shuffled.numpy(), margin=0.999, threshold=0.0
            )
            optimizer.zero_grad()
            scores.backward(torch.tensor(slope))
            optimizer.step()
            losses.append(loss)
            kept.append(sum(map(all, passed)) / len(passed))
        with torch.no_grad():
            logits.append(slow(stream()[part]).logits)
    assert min(kept) < 1
    torch.testing.assert_close(result.logits, torch.cat(logits), atol=1e-7, rtol=1e-7)
    assert result.losses[[0, 3, 5]].flatten().tolist() == pytest.approx(losses, rel=1e-7)


@pytest.mark.parametrize(
    "method", [DeYO(margin=1e-3), DeYO(margin=2.0, plpd_threshold=0.999)], ids=["entropy", "plpd"]
)
def test_where_nothing_is_selected_nothing_moves(method):
    network, _ = networks.source_statistics("resnet")
    loop = InnerLoop(steps=1, lr=1.0, trainable="norm")
    result = adapt_stream(network, stream(), method, loop, batch_size=3)
    torch.testing.assert_close(result.logits, result.source_logits)
    assert not result.losses.any()
    assert not result.fell_back.any()
