"""TTT++, against its formulas in NumPy, a queue that is a list, and plain autograd on one network."""

import copy

import numpy as np
import pytest
import torch

from tests.helpers import networks
from tttlab.adaptation.inner_loop import InnerLoop, select_parameters
from tttlab.adaptation.online import adapt_stream
from tttlab.adaptation.registry import load_method
from tttlab.errors import UserError
from tttlab.methods.ttt_plus_plus import (
    NAMES,
    PLACES,
    TTTPlusPlus,
    distances,
    misalignment,
    summarise,
)
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import random_parts
from tttlab.objectives.simclr import nt_xent
from tttlab.seeding import torch_generator

NETWORK = networks.source_statistics("resnet")[0]
BATCHES = [slice(0, 3), slice(3, 5), slice(5, 7)]  # of 7 images, in batches of at most 3


def rows(count, width=5, seed=0):
    return torch.randn(
        count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def stream(count=7):
    return (networks.images(count, seed=50) * 0.4 + 0.6).double()


def statistics_of(method):
    return method.source_statistics(NETWORK, iter(networks.images(64, seed=7).double().split(25)))


def coral(a, b):
    """Sun and Saenko's distance, entry by entry."""
    return sum((x - y) ** 2 for x, y in zip(a.flat, b.flat, strict=True)) / (4 * len(a) ** 2)


def numpy_alignment(values, statistics, place):
    """The published terms of one place."""
    mean, covariance, noise_mean, noise_covariance = (
        statistics[f"alignment.{place}.{name}"].numpy() for name in NAMES
    )
    mmd = np.mean((values.mean(0) - mean) ** 2)
    return (
        coral(np.cov(values, rowvar=False), covariance) / noise_covariance + 0.5 * mmd / noise_mean
    )


def test_distances_are_coral_and_the_mean_square_of_the_means():
    values, other = rows(7).numpy(), rows(40, seed=1).numpy() * 2 + 1
    found = distances(
        torch.tensor(values), torch.tensor(other.mean(0)), torch.tensor(np.cov(other, rowvar=False))
    )
    centred = values - values.mean(0)
    covariance = sum(np.outer(row, row) for row in centred) / 6  # unbiased
    expected = (
        np.mean((values.mean(0) - other.mean(0)) ** 2),
        coral(covariance, np.cov(other, rowvar=False)),
    )
    assert [value.item() for value in found] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("count", "size", "parts"), [(100, 30, 3), (100, 1536, 2), (101, 50, 2)])
def test_source_mini_batches_score_one_on_average(count, size, parts):
    """In each term, exactly: this is what the scales are in units of."""
    values = rows(count)
    source = dict(
        zip((f"alignment.x.{name}" for name in NAMES), summarise(values, size), strict=True)
    )
    split = random_parts(values, parts)
    scores = [misalignment(part, "x", source).item() for part in split]
    assert np.mean(scores) == pytest.approx(1 + 0.5, rel=1e-9)
    covariance = [distances(part, *summarise(values, size)[:2])[1].item() for part in split]
    assert np.mean(covariance) == pytest.approx(
        source["alignment.x.noise_covariance"].item(), rel=1e-9
    )


def test_source_noise_is_that_of_random_mini_batches_whatever_the_order():
    """In order of class the mini-batches would each be of one class, and their means as far apart as the classes."""
    values = rows(3000) + 10 * torch.arange(3).repeat_interleave(1000)[:, None]
    noise = summarise(values, 100)[2].item()
    expected = values.var(0).mean().item() / 100 * (1 - 1 / 30)  # drawn without replacement
    assert noise == pytest.approx(expected, rel=0.5)
    in_order = torch.stack([part.mean(0) for part in values.split(100)])
    assert (in_order - values.mean(0)).square().mean() > 50 * noise


def test_statistics_of_all_source_images_none_left_out():
    statistics = statistics_of(TTTPlusPlus(queue_size=30))
    with torch.no_grad():
        outputs = NETWORK.eval()(networks.images(64, seed=7).double())
    for place in PLACES:
        values = getattr(outputs, place).numpy()
        np.testing.assert_allclose(
            statistics[f"alignment.{place}.mean"], values.mean(0), rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(
            statistics[f"alignment.{place}.covariance"], np.cov(values.T), rtol=1e-9, atol=1e-12
        )
    with pytest.raises(UserError, match=r"expected 4 source images or more, found 3"):
        TTTPlusPlus().source_statistics(NETWORK, [stream(3)])


def contrast(projections, temperature):
    """NT-Xent of rows that are two views of each image after each other."""
    return nt_xent(projections.unflatten(0, (-1, 2)), temperature)


def test_contrast_is_a_loop_over_anchors():
    values, temperature, losses = rows(8), 0.5, []
    unit = values / values.norm(dim=1, keepdim=True)
    for anchor in range(8):
        others = [other for other in range(8) if other != anchor]
        similarity = {other: float(unit[anchor] @ unit[other]) / temperature for other in others}
        positive = (
            anchor + 1 if anchor % 2 == 0 else anchor - 1
        )  # the two views of an image follow each other
        losses.append(
            np.log(sum(np.exp(value) for value in similarity.values())) - similarity[positive]
        )
    assert contrast(values, temperature).item() == pytest.approx(np.mean(losses), rel=1e-6)
    lone = rows(2).requires_grad_()
    (slope,) = torch.autograd.grad(contrast(lone, temperature), lone)
    assert not slope.any()  # a single image has no negatives


def step(method, images, state, statistics):
    """One step's loss on un-augmented twins, and the state after the batch."""
    net, views = Bound(NETWORK.eval(), {}), (images, images.repeat_interleave(2, 0))
    loss, state = method.loss(net, views, statistics, state)
    state = type(state)(*(value.detach() for value in state))
    return loss.item(), state, method.predict_batch(net, images, statistics, state)[1]


@pytest.mark.parametrize("queue_size", [2, 4, 6, 100])
def test_target_moments_are_those_of_the_latest_images(queue_size):
    """Against a list; the batch itself is never cut."""
    method = TTTPlusPlus(queue_size=queue_size, scale_features=0.7, scale_projections=0.3)
    statistics, state, past = statistics_of(method), method.init_state(), []
    with torch.no_grad():
        outputs = [NETWORK.eval()(stream()[part]) for part in BATCHES]
        contrasts = [
            contrast(NETWORK(stream()[part].repeat_interleave(2, 0)).projections, 0.5).item()
            for part in BATCHES
        ]
    for part, output, expected in zip(BATCHES, outputs, contrasts, strict=True):
        found, _, state = step(method, stream()[part], state, statistics)
        own = list(zip(output.features.numpy(), output.projections.numpy(), strict=True))
        past += own
        latest = past[-max(queue_size, len(own)) :]
        for place, scale, values in zip(PLACES, (0.7, 0.3), zip(*latest, strict=True), strict=True):
            expected += scale * numpy_alignment(np.array(values), statistics, place)
        assert found == pytest.approx(expected, rel=1e-6)
        kept = np.array(
            [np.concatenate(pair) for pair in past[-queue_size:]]
        )  # first in, first out
        np.testing.assert_allclose(state.queue.numpy(), kept, rtol=1e-9, atol=1e-12)


def test_an_image_joins_the_queue_once_however_many_steps_its_batch_takes():
    method = TTTPlusPlus()
    statistics = statistics_of(method)
    first, state, _ = step(method, stream()[:3], method.init_state(), statistics)
    second, state, after = step(method, stream()[:3], state, statistics)
    assert first == pytest.approx(second, rel=1e-12)
    assert after.queue.shape[0] == 3
    assert after.batch.shape[0] == 0


def test_only_the_batch_carries_gradient():
    """The queue's rows, given a gradient, do not pass it on; and nothing of the graph is kept."""
    method = TTTPlusPlus(scale_features=1.0)
    statistics = statistics_of(method)
    leaf = NETWORK.encoder.conv1[0].weight.detach().clone().requires_grad_()
    net = Bound(NETWORK.eval(), {"encoder.conv1.0.weight": leaf})
    views = (stream()[:3], stream()[:3].repeat_interleave(2, 0))
    _, state = method.loss(net, views, statistics, method.init_state())
    assert not any(value.requires_grad for value in state)
    _, state = method.predict_batch(net, views[0], statistics, state)
    assert not any(value.requires_grad for value in state)
    # With the same rows as constants, by hand, the gradient is the same.
    loss, _ = method.loss(
        net, (stream()[3:5], stream()[3:5].repeat_interleave(2, 0)), statistics, state
    )
    (found,) = torch.autograd.grad(loss, leaf)
    output = net(stream()[3:5])
    total = contrast(net(stream()[3:5].repeat_interleave(2, 0)).projections, 0.5)
    with torch.no_grad():
        past = net(stream()[:3])
    for place, scale in zip(PLACES, (1.0, 0.2), strict=True):
        joined = torch.cat([getattr(past, place), getattr(output, place)])
        total = total + scale * misalignment(joined, place, statistics)
    torch.testing.assert_close(found, torch.autograd.grad(total, leaf)[0])


def test_single_images_are_aligned_from_the_second_on():
    """Without negatives, and at first without a covariance: the loss is 0 and finite, and nothing breaks."""
    method = TTTPlusPlus()
    loop = InnerLoop(steps=1, lr=1e-3)
    found = adapt_stream(
        NETWORK, stream(4), method, loop, batch_size=1, statistics=statistics_of(method)
    )
    assert not found.fell_back.any()
    assert found.losses[0] == 0
    assert torch.equal(found.logits[0], found.source_logits[0])
    assert (found.losses[1:] > 0).all()
    assert not torch.equal(found.logits[1], found.source_logits[1])


def test_a_broken_batch_leaves_no_trace_in_the_queue():
    method, loop = TTTPlusPlus(), InnerLoop(steps=2, lr=1e-3, momentum=0.9)
    statistics, images = statistics_of(method), stream(9)
    images[4] = torch.nan
    found = adapt_stream(
        NETWORK,
        images,
        method,
        loop,
        batch_size=3,
        statistics=statistics,
        image_ids=list("abcdefghi"),
    )
    assert found.fell_back.tolist() == [False] * 3 + [True] * 3 + [False] * 3
    kept = [0, 1, 2, 6, 7, 8]
    skipped = adapt_stream(
        NETWORK,
        images[kept],
        method,
        loop,
        batch_size=3,
        statistics=statistics,
        image_ids=list("abcghi"),
    )
    torch.testing.assert_close(found.logits[6:], skipped.logits[3:])


def test_a_stream_is_that_of_plain_autograd_and_sgd():
    method = TTTPlusPlus(queue_size=4, scale_features=0.1, scale_projections=0.1)
    statistics = statistics_of(method)
    loop = InnerLoop(steps=2, lr=1e-3, momentum=0.9)
    found = adapt_stream(NETWORK, stream(), method, loop, batch_size=3, statistics=statistics)
    slow, logits, losses, past = (
        copy.deepcopy(NETWORK).eval(),
        [],
        [],
        {place: [] for place in PLACES},
    )
    own = torch.optim.SGD(select_parameters(slow, "encoder").values(), lr=1e-3, momentum=0.9)
    for part in BATCHES:
        for turn in range(2):
            generators = [
                torch_generator(0, "views", str(name), turn)
                for name in range(part.start, part.stop)
            ]
            pairs = method.views(slow, stream()[part], generators)[1]
            output = slow(stream()[part])
            loss = contrast(slow(pairs.flatten(0, 1)).projections, 0.5)
            for place in PLACES:
                joined = torch.cat([*past[place], getattr(output, place)])[-4:]
                loss = loss + 0.1 * misalignment(joined, place, statistics)
            losses.append(loss.item())
            own.zero_grad()
            loss.backward()
            own.step()
        for place in PLACES:
            past[place].append(getattr(output, place).detach())
        with torch.no_grad():
            logits.append(slow(stream()[part]).logits)
    assert found.losses[[0, 3, 5]].flatten().tolist() == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(found.logits, torch.cat(logits), atol=1e-6, rtol=1e-6)
    assert (found.logits - found.source_logits).abs().max() > 1e-4


def test_settings_and_what_is_refused():
    assert (
        load_method("ttt_plus_plus", objective={"name": "simclr", "temperature": 0.2}).temperature
        == 0.2
    )
    with pytest.raises(
        UserError, match=r"TTTPlusPlus.* needs a network with the head of objective simclr"
    ):
        TTTPlusPlus().check(networks.source_statistics("vit")[0])
