"""TTT++ against its formulas in NumPy, a queue that is a list, and plain autograd."""

import copy

import numpy as np
import pytest
import torch

from tests.helpers import networks
from tests.helpers.contract import shifted
from tttlab.adaptation.online import adapt_stream
from tttlab.adaptation.registry import load_method
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.inner_loop import InnerLoop
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
from tttlab.networks.source_statistics import shuffled_parts
from tttlab.objectives.simclr import nt_xent
from tttlab.seeding import torch_generator

NETWORK = networks.source_statistics("resnet")[0]
BATCHES = [slice(0, 3), slice(3, 5), slice(5, 7)]  # of 7 images, in batches of at most 3


def rows(count, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def stream(count=7):
    return shifted(count)


def statistics_of(method):
    return method.source_statistics(NETWORK, iter(networks.images(64, seed=7).double().split(25)))


def coral(a, b):
    """Sun and Saenko's distance, entry by entry."""
    return sum((x - y) ** 2 for x, y in zip(a.flat, b.flat, strict=True)) / (4 * len(a) ** 2)


def numpy_alignment(values, statistics, place):
    """The published terms of one place."""
    mean, covariance, noise_mean, noise_covariance, images = (
        statistics[f"alignment.{place}.{name}"].numpy() for name in NAMES
    )
    covariance_distance = coral(np.cov(values, rowvar=False), covariance)
    mean_distance = np.mean((values.mean(0) - mean) ** 2)
    terms = covariance_distance / noise_covariance + 0.5 * mean_distance / noise_mean
    return terms / (1 / len(values) + 1 / images)


def test_distances_are_coral_and_the_mean_square_of_the_means():
    values, source = rows(7).numpy(), rows(40, seed=1).numpy() * 2 + 1
    source_mean, source_covariance = source.mean(0), np.cov(source, rowvar=False)
    found = distances(*map(torch.tensor, (values, source_mean, source_covariance)))
    centred = values - values.mean(0)
    covariance = sum(np.outer(row, row) for row in centred) / 6  # unbiased
    mean_distance = np.mean((values.mean(0) - source_mean) ** 2)
    expected = [mean_distance, coral(covariance, source_covariance)]
    assert [value.item() for value in found] == pytest.approx(expected, rel=1e-9)


def source_of(values, size):
    """Give the statistics of source rows as the place ``x``."""
    summary = zip(NAMES, summarise(values, size), strict=True)
    return {f"alignment.x.{name}": value for name, value in summary}


@pytest.mark.parametrize(("count", "size", "parts"), [(100, 30, 3), (100, 1536, 2), (101, 50, 2)])
def test_the_noise_is_that_of_one_image(count, size, parts):
    """A mini-batch of p of N images, drawn without replacement, lies off by 1/p − 1/N of it."""
    values = rows(count)
    source = source_of(values, size)
    for number, name in enumerate(("mean", "covariance")):
        noise = [
            distances(part, source["alignment.x.mean"], source["alignment.x.covariance"])[number]
            / (1 / len(part) - 1 / count)
            for part in shuffled_parts(values, parts)
        ]
        expected = torch.stack(noise).mean().item()
        assert source[f"alignment.x.noise_{name}"].item() == pytest.approx(expected, rel=1e-9)
    # Of a normal variable the mean's noise is its variance, here 1.
    whole = source_of(rows(20_000), 100)
    assert whole["alignment.x.noise_mean"].item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("count", [8, 64, 1000])
@pytest.mark.parametrize("source_count", [400, 20_000])
def test_images_without_a_shift_score_one_and_a_half_however_many_there_are(count, source_count):
    source = source_of(rows(source_count, 40), 200)
    scores = [misalignment(rows(count, 40, s + 1), "x", source).item() for s in range(20)]
    assert np.mean(scores) == pytest.approx(1 + 0.5, rel=0.25)


def test_source_noise_is_that_of_random_mini_batches_whatever_the_order():
    """In order of class, the means of mini-batches would be as far apart as those of classes."""
    values = rows(3000) + 10 * torch.arange(3).repeat_interleave(1000)[:, None]
    noise = summarise(values, 100)[2].item()
    assert noise == pytest.approx(values.var(0).mean().item(), rel=0.5)
    in_order = torch.stack([part.mean(0) for part in values.split(100)])
    assert (in_order - values.mean(0)).square().mean() > 50 * noise / 100


def test_statistics_of_all_source_images_none_left_out():
    statistics = statistics_of(TTTPlusPlus(queue_size=30))
    with torch.no_grad():
        outputs = NETWORK.eval()(networks.images(64, seed=7).double())
    for place in PLACES:
        values = getattr(outputs, place).numpy()
        for name, expected in (("mean", values.mean(0)), ("covariance", np.cov(values.T))):
            found = statistics[f"alignment.{place}.{name}"]
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(UserError, match=r"expected 4 source images or more, found 3"):
        TTTPlusPlus().source_statistics(NETWORK, [stream(3)])


def contrast(projections, temperature):
    """NT-Xent of rows in which the two views of an image follow each other."""
    return nt_xent(projections.unflatten(0, (-1, 2)), temperature)


def test_contrast_is_a_loop_over_anchors():
    values, temperature, losses = rows(8), 0.5, []
    unit = values / values.norm(dim=1, keepdim=True)
    for anchor in range(8):
        similarity = {
            row: float(unit[anchor] @ unit[row]) / temperature for row in range(8) if row != anchor
        }
        positive = anchor + 1 if anchor % 2 == 0 else anchor - 1
        log_sum = np.log(sum(np.exp(value) for value in similarity.values()))
        losses.append(log_sum - similarity[positive])
    assert contrast(values, temperature).item() == pytest.approx(np.mean(losses), rel=1e-6)
    lone = rows(2).requires_grad_()
    (slope,) = torch.autograd.grad(contrast(lone, temperature), lone)
    assert not slope.any()  # a single image has no negatives


def step(method, images, state, statistics):
    """Give a step's loss on un-augmented pairs, its state, and the state after the batch."""
    net, views = Bound(NETWORK.eval(), {}), (images, images.repeat_interleave(2, 0))
    loss, state = method.loss(net, views, statistics, state)
    state = type(state)(*(value.detach() for value in state))
    return loss.item(), state, method.predict_batch(net, images, statistics, state)[1]


@pytest.mark.parametrize("queue_size", [2, 4, 6, 100])
def test_target_moments_are_those_of_the_latest_images(queue_size):
    """The queue is compared to lists; the batch itself is never cut."""
    method = TTTPlusPlus(queue_size=queue_size, scale_features=0.7, scale_projections=0.3)
    statistics, state = statistics_of(method), method.init_state()
    features, projections = [], []
    for part in BATCHES:
        images = stream()[part]
        loss, _, state = step(method, images, state, statistics)
        with torch.no_grad():
            outputs = NETWORK.eval()(images)
            pairs = NETWORK(images.repeat_interleave(2, 0)).projections
        features += outputs.features.numpy().tolist()
        projections += outputs.projections.numpy().tolist()
        size = max(queue_size, len(images))
        expected = (
            contrast(pairs, 0.5).item()
            + 0.7 * numpy_alignment(np.array(features[-size:]), statistics, "features")
            + 0.3 * numpy_alignment(np.array(projections[-size:]), statistics, "projections")
        )
        assert loss == pytest.approx(expected, rel=1e-6)
        # First in, first out.
        queue = np.hstack([features[-queue_size:], projections[-queue_size:]])
        np.testing.assert_allclose(state.queue.numpy(), queue, rtol=1e-9, atol=1e-12)


def test_an_image_joins_the_queue_once_however_many_steps_its_batch_takes():
    method = TTTPlusPlus()
    statistics = statistics_of(method)
    first, state, _ = step(method, stream()[:3], method.init_state(), statistics)
    second, state, after = step(method, stream()[:3], state, statistics)
    assert first == pytest.approx(second, rel=1e-12)
    assert after.queue.shape[0] == 3
    assert after.batch.shape[0] == 0


def test_only_the_batch_carries_gradient():
    """The queue's rows pass on no gradient, and nothing of the graph is kept."""
    method = TTTPlusPlus(scale_features=1.0)
    statistics = statistics_of(method)
    leaf = NETWORK.encoder.conv1[0].weight.detach().clone().requires_grad_()
    net = Bound(NETWORK.eval(), {"encoder.conv1.0.weight": leaf})
    views = (stream()[:3], stream()[:3].repeat_interleave(2, 0))
    _, state = method.loss(net, views, statistics, method.init_state())
    assert not any(value.requires_grad for value in state)
    _, state = method.predict_batch(net, views[0], statistics, state)
    assert not any(value.requires_grad for value in state)
    # The gradient is the same with the earlier rows as constants.
    images, pairs = stream()[3:5], stream()[3:5].repeat_interleave(2, 0)
    loss, _ = method.loss(net, (images, pairs), statistics, state)
    (slope,) = torch.autograd.grad(loss, leaf)
    outputs = net(images)
    total = contrast(net(pairs).projections, 0.5)
    with torch.no_grad():
        past = net(stream()[:3])
    for place, scale in zip(PLACES, (1.0, 0.2), strict=True):
        joined = torch.cat([getattr(past, place), getattr(outputs, place)])
        total = total + scale * misalignment(joined, place, statistics)
    torch.testing.assert_close(slope, torch.autograd.grad(total, leaf)[0])


def test_single_images_are_aligned_from_the_second_on():
    """There are no negatives, and at first no covariance: the first loss is 0, none is infinite."""
    method, loop = TTTPlusPlus(), InnerLoop(steps=1, lr=1e-3)
    statistics = statistics_of(method)
    result = adapt_stream(NETWORK, stream(4), method, loop, batch_size=1, statistics=statistics)
    assert not result.fell_back.any()
    assert result.losses[0] == 0
    assert torch.equal(result.logits[0], result.source_logits[0])
    assert (result.losses[1:] > 0).all()
    assert not torch.equal(result.logits[1], result.source_logits[1])


def test_a_broken_batch_leaves_no_trace_in_the_queue():
    method, loop = TTTPlusPlus(), InnerLoop(steps=2, lr=1e-3, momentum=0.9)
    statistics, images = statistics_of(method), stream(9)
    images[4] = torch.nan
    options = {"batch_size": 3, "statistics": statistics}
    result = adapt_stream(NETWORK, images, method, loop, image_ids=list("abcdefghi"), **options)
    assert result.fell_back.tolist() == [False] * 3 + [True] * 3 + [False] * 3
    intact = images[[0, 1, 2, 6, 7, 8]]
    skipped = adapt_stream(NETWORK, intact, method, loop, image_ids=list("abcghi"), **options)
    torch.testing.assert_close(result.logits[6:], skipped.logits[3:])


def test_a_stream_is_that_of_plain_autograd_and_sgd():
    method = TTTPlusPlus(queue_size=4, scale_features=0.1, scale_projections=0.1)
    statistics = statistics_of(method)
    loop = InnerLoop(steps=2, lr=1e-3, momentum=0.9)
    result = adapt_stream(NETWORK, stream(), method, loop, batch_size=3, statistics=statistics)
    slow, logits, losses = copy.deepcopy(NETWORK).eval(), [], []
    past = {place: [] for place in PLACES}
    trained = select_parameters(slow, "encoder").values()
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
    for part in BATCHES:
        for number in range(2):
            generators = [torch_generator(0, "views", str(name), number) for name in range(7)[part]]
            _, pairs = method.views(slow, stream()[part], generators)
            outputs = slow(stream()[part])
            loss = contrast(slow(pairs.flatten(0, 1)).projections, 0.5)
            for place in PLACES:
                joined = torch.cat([*past[place], getattr(outputs, place)])[-4:]
                loss = loss + 0.1 * misalignment(joined, place, statistics)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for place in PLACES:
            past[place].append(getattr(outputs, place).detach())
        with torch.no_grad():
            logits.append(slow(stream()[part]).logits)
    assert result.losses[[0, 3, 5]].flatten().tolist() == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(result.logits, torch.cat(logits), atol=1e-6, rtol=1e-6)
    assert (result.logits - result.source_logits).abs().max() > 1e-4


def test_settings_and_what_is_refused():
    objective = {"name": "simclr", "temperature": 0.2}
    assert load_method("ttt_plus_plus", objective=objective).temperature == 0.2
    message = r"TTTPlusPlus.* needs a network with the head of objective simclr"
    with pytest.raises(UserError, match=message):
        TTTPlusPlus().check(networks.source_statistics("vit")[0])
