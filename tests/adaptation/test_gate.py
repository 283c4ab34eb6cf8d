"""The gate: the signal that it reads, its effect, and its choice."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers import networks
from tests.helpers.contract import shifted
from tttlab.adaptation import signals
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.gate import Gate, adapt_gated, saves_time
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.evaluation.intervals import crossed_standard_error
from tttlab.experiments.gate_choice import (
    by_image_and_type,
    choose_gate,
    fit_threshold,
    leave_one_out,
    score,
)
from tttlab.methods.actmad import ActMAD
from tttlab.methods.simclr import SimCLRTraining
from tttlab.networks.taps import batch_norm_layers, record
from tttlab.runtime.group_size import Groups

LOOP = InnerLoop(steps=2, lr=1e-2, clip=1.0)


def mixed():
    """Three images of the source domain and three shifted ones."""
    return torch.cat([networks.images(3, seed=8).double(), shifted(3)])


@pytest.mark.parametrize("signal", ["confidence", "distance", "loss"])
@pytest.mark.parametrize("method", [ActMAD(), SimCLRTraining(num_views=3)], ids=str)
def test_open_images_are_adapted_as_without_a_gate_and_shut_ones_not_at_all(
    signal, method, monkeypatch
):
    monkeypatch.setattr(time, "perf_counter", time.process_time)  # not the time of other processes
    network, statistics = networks.source_statistics("resnet")
    names = [f"image-{i}" for i in range(6)]
    settings = {"statistics": statistics, "image_ids": names, "seed": 3}
    task = Task(network, method, LOOP, statistics, seed=3)
    _, values = signals.measure_signal(signal, task, mixed(), names)
    gate = Gate(signal, float(values.median()))
    free = adapt(network, mixed(), method, LOOP, **settings, record=(1,))
    gated, opened = adapt_gated(network, mixed(), method, LOOP, gate, **settings, record=(1,))
    assert 0 < opened.sum() < 6
    torch.testing.assert_close(gated.logits[opened], free.logits[opened])
    torch.testing.assert_close(gated.logits_at[opened], free.logits_at[opened])
    torch.testing.assert_close(gated.losses[opened], free.losses[opened])
    torch.testing.assert_close(gated.logits[~opened], free.source_logits[~opened])
    assert gated.losses[~opened].isnan().all()
    assert gated.milliseconds[opened].min() > gated.milliseconds[~opened].max()


def test_a_gate_that_never_opens_costs_one_look_and_changes_nothing():
    network, statistics = networks.source_statistics("vit")
    gate = Gate("distance", 1e9)
    gated, opened = adapt_gated(
        network, mixed(), ActMAD(), LOOP, gate, statistics=statistics, record=(0, 2)
    )
    assert not opened.any()
    assert torch.equal(gated.logits, gated.source_logits)
    assert torch.equal(gated.logits_at, gated.source_logits[:, None].expand(-1, 2, -1))
    assert torch.equal(gated.milliseconds_at, gated.milliseconds[:, None].expand(-1, 2))
    assert gated.losses.shape == (6, 1)


@pytest.mark.parametrize("policy", ["source", "image", "shrink"])
def test_the_loss_that_a_gate_reads_is_that_of_the_first_step(policy):
    network, statistics = networks.source_statistics("resnet")
    method, names = SimCLRTraining(num_views=3), list("abcdef")
    loop = replace(LOOP, normalisation=policy)
    result = adapt(network, mixed(), method, loop, statistics=statistics, image_ids=names, seed=5)
    task = Task(network, method, loop, statistics, seed=5)
    _, values = signals.measure_signal("loss", task, mixed(), names)
    torch.testing.assert_close(values, result.losses[:, 0])


def test_the_distance_is_the_mean_squared_deviation_in_units_of_natural_variation():
    network, statistics = networks.source_statistics("resnet")
    images = mixed()
    layers = [f"{name}.input" for name in batch_norm_layers(network)]
    with record(network, layers) as activations, torch.no_grad():
        network(images)
    squares = []
    for layer in layers:
        values = activations[layer].numpy()
        moments = {"mean": values.mean((2, 3)), "log_variance": np.log(values.var((2, 3)) + 1e-5)}
        for name, moment in moments.items():
            center = statistics[f"{layer}.{name}_center"].numpy()
            scale = statistics[f"{layer}.{name}_scale"].numpy()
            squares.append((((moment - center) / scale) ** 2).mean(1))
    _, distance = signals.logits_and_distance(network, images, statistics)
    np.testing.assert_allclose(distance, np.mean(squares, axis=0), rtol=1e-9)
    assert distance[3:].min() > distance[:3].max()


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_distance_of_source_images_is_about_one(kind):
    network, statistics = networks.source_statistics(kind)
    images = networks.images(64, seed=7).double()  # those that the statistics were measured on
    _, distance = signals.logits_and_distance(network, images, statistics)
    assert distance.mean().item() == pytest.approx(63 / 64, rel=1e-6)


def test_channels_that_never_vary_say_nothing():
    statistics = {
        "x.mean_center": torch.tensor([1.0, 0.0]),
        "x.mean_scale": torch.tensor([2.0, 0.0]),
    }
    assert signals.squared_deviation(torch.tensor([[5.0, 9.0]]), statistics, "x.mean").item() == 4.0
    statistics["x.mean_scale"] = torch.zeros(2)
    assert signals.squared_deviation(torch.tensor([[5.0, 9.0]]), statistics, "x.mean").item() == 1.0


def test_missing_statistics_are_named():
    network, _ = networks.source_statistics("resnet")
    message = r"needs source statistics of \d+ layers that have none, such as encoder\."
    with pytest.raises(UserError, match=message):
        signals.logits_and_distance(network, mixed(), {})


def test_the_side_of_the_threshold_depends_on_the_signal():
    values = torch.tensor([0.2, 0.5, 0.9, float("nan")])
    assert Gate("confidence", 0.5).opens(values).tolist() == [True, True, False, False]
    assert Gate("distance", 0.5).opens(values).tolist() == [False, True, True, False]
    assert Gate("loss", 0.5).opens(values).tolist() == [False, True, True, False]


def test_the_score_subtracts_what_is_lost_on_clean_images():
    source, adapted = np.array([1.0, 1, 0, 0, 1, 1]), np.array([1.0, 1, 1, 0, 1, 0])
    clean = np.array([False, False, False, False, True, True])
    assert score(source, adapted, clean, 1.0) == pytest.approx(0.75 - 0.5)
    assert score(source, adapted, clean, 0.2) == pytest.approx(0.75 - 0.1)
    assert score(source, np.array([1.0, 1, 1, 0, 1, 1]), clean, 1.0) == 0.75
    assert score(adapted, source, clean, 5.0) == 0.5  # a gain on clean images counts for nothing


def choose(values, source, adapted, corruption, *more):
    """Choose a gate where every corruption type shows the same images."""
    image = np.arange(len(corruption)) % (corruption < 0).sum()
    return choose_gate(values, source, adapted, image, corruption, 1.0, *more)


def population(kinds=4, count=200, seed=0):
    """Clean and corrupted images; adapting helps where the distance is above 5 and harms below."""
    rng = np.random.default_rng(seed)
    corruption = np.repeat(np.arange(-1, kinds), count)
    clean, corrupted = rng.uniform(0, 2, len(corruption)), rng.uniform(0, 10, len(corruption))
    distance = np.where(corruption < 0, clean, corrupted)
    source = (rng.random(len(corruption)) < 0.7).astype(float)
    adapted = np.where(distance > 5, 1.0, source * (rng.random(len(corruption)) < 0.8))
    return rng, corruption, distance, source, adapted


def test_the_chosen_gate_keeps_gains_and_avoids_harm():
    rng, corruption, distance, source, adapted = population()
    noise = {"confidence": rng.random(len(source)), "loss": np.full(len(source), np.nan)}
    gate = choose({**noise, "distance": distance}, source, adapted, corruption)
    assert gate.signal == "distance"
    assert 4.4 < gate.threshold < 5.6


def test_a_signal_that_fails_under_another_corruption_is_not_chosen():
    """Confidence is a perfect signal under two corruptions and inverted under the two others."""
    _, corruption, distance, source, adapted = population()
    confidence = np.where(corruption >= 2, distance, 10 - distance) / 10
    values = {"confidence": confidence, "distance": distance}
    gate = choose(values, source, adapted, corruption)
    assert gate.signal == "distance"


def test_a_signal_is_judged_under_each_corruption_by_a_threshold_of_the_others():
    """Adapting helps beyond a distance, harms below it, and each corruption has another one."""
    rng, corruption = np.random.default_rng(0), np.repeat([-1, 0, 1, 2], 100)
    values, clean = rng.uniform(0, 10, 400), corruption < 0
    turn = np.array([5.0, 2.0, 5.0, 8.0])[corruption + 1]
    source = np.where(clean, 1.0, values < turn)
    adapted = np.where(clean, 1.0, values >= turn)
    _, right = leave_one_out("distance", values, source, adapted, corruption, 1.0)
    known = fit_threshold("distance", values, source, adapted, clean, 1.0).threshold
    differ = 0
    for kind in range(3):
        fit, shown = corruption != kind, corruption == kind
        parts = [part[fit] for part in (values, source, adapted, clean)]
        threshold = fit_threshold("distance", *parts, 1.0).threshold
        expected = np.where(values >= threshold, adapted, source)[shown]
        np.testing.assert_array_equal(right[100 * kind : 100 * kind + 100], expected)
        differ += (expected != np.where(values >= known, adapted, source)[shown]).sum()
    assert differ > 10


@pytest.mark.parametrize(("missed", "signal"), [(1, "distance"), (2, "loss")])
def test_a_preferred_signal_may_be_one_standard_error_worse_and_no_more(missed, signal):
    """If c of 100 images are missed under every type, their ratio is √(99 c / (100 − c))."""
    image, corruption = np.tile(np.arange(100), 5), np.repeat(np.arange(-1, 4), 100)
    clean, helped = corruption < 0, image < 50
    source, adapted = np.where(clean, 1.0, ~helped), np.where(clean, 1.0, helped)
    loss = np.where(clean, 0.0, np.where(helped, 8.0, 1.0))
    values = {"loss": loss, "distance": np.where(image < missed, np.minimum(loss, 1.0), loss)}
    assert choose(values, source, adapted, corruption).signal == signal


def test_of_signals_that_cannot_be_told_apart_the_distance_is_taken():
    _, corruption, distance, source, adapted = population()
    values = {"confidence": 10 - distance, "loss": distance, "distance": distance}
    assert choose(values, source, adapted, corruption).signal == "distance"
    values |= {"distance": np.random.default_rng(1).random(len(source))}  # now it says nothing
    assert choose(values, source, adapted, corruption).signal == "loss"


def test_there_is_no_gate_where_adapting_to_all_is_best():
    rng, corruption, _, source, _ = population()
    values, wrong, right = {"distance": rng.random(len(source))}, source * 0, source * 0 + 1
    assert choose(values, wrong, right, corruption) is None
    assert choose({}, source, source, corruption) is None


def test_the_standard_error_of_a_gate_is_over_images_and_types():
    """Ten images, half of them helped, each under four types alike: ten observations, not forty."""
    image, corruption = np.tile(np.arange(10), 4), np.repeat(np.arange(4), 10)
    helped = (image < 5).astype(float)
    cells = by_image_and_type(helped, image, corruption)
    np.testing.assert_allclose(cells, np.tile(np.arange(10) < 5, (4, 1)).T)
    as_ten = np.std(np.arange(10) < 5, ddof=1) / np.sqrt(10)
    assert crossed_standard_error(cells) == pytest.approx(as_ten)
    twice = [np.concatenate([part, part]) for part in (helped, image, corruption)]  # two severities
    np.testing.assert_allclose(by_image_and_type(*twice), cells)


def test_a_gate_that_saves_no_time_is_passed_over():
    _, corruption, distance, source, adapted = population()
    values = {"confidence": 10 - distance, "loss": distance, "distance": distance}
    arguments = values, source, adapted, corruption
    assert choose(*arguments, lambda gate: gate.signal != "distance").signal == "loss"
    assert choose(*arguments, lambda _gate: False) is None


def test_time_is_saved_where_few_images_are_worth_many_steps_and_none_where_all_are(monkeypatch):
    """Of a real adaptation, by a clock that ticks whenever the network is called."""
    network, statistics = networks.source_statistics("resnet", torch.float32)
    images, method = mixed().float(), SimCLRTraining(num_views=2)
    calls = []
    monkeypatch.setattr("tttlab.adaptation.gate.time.perf_counter", lambda: len(calls))
    task = Task(network, method, InnerLoop(steps=4, lr=1e-3), statistics)
    no_steps = Task(network, method, InnerLoop(steps=0), statistics)
    _, values = signals.measure_signal("distance", task, images, "abcdef")
    for_one, for_all = Gate("distance", float(values.max())), Gate("distance", -1.0)
    with network.register_forward_pre_hook(lambda *_: calls.append(1)):
        assert saves_time(task, for_one, images, "abcdef", Groups(1), repeats=1)
        assert not saves_time(no_steps, for_all, images, "abcdef", Groups(1), repeats=1)


@pytest.mark.parametrize(("gated", "saved"), [((3.0, 1.5), True), ((3.0, 2.5), False)])
def test_of_several_timings_the_fastest_counts(gated, saved, monkeypatch):
    """Without a gate it takes 2 and 2.5 s."""
    ticks = iter(np.cumsum([0.0, gated[0], 0.0, 2.0, 0.0, gated[1], 0.0, 2.5]))
    monkeypatch.setattr("tttlab.adaptation.gate.adapt", lambda *_arguments, **_settings: None)
    monkeypatch.setattr("tttlab.adaptation.gate.adapt_gated", lambda *_arguments, **_settings: None)
    monkeypatch.setattr("tttlab.adaptation.gate.time.perf_counter", lambda: next(ticks))
    task, gate = Task(None, ActMAD()), Gate("loss", 0.0)
    assert saves_time(task, gate, mixed(), "abcdef", Groups(1), repeats=2) == saved


def test_there_is_no_gate_where_adapting_changes_nothing():
    _, corruption, distance, source, _ = population()
    assert choose({"distance": distance}, source, source, corruption) is None


def test_one_corruption_is_too_few_to_judge_a_gate():
    _, corruption, distance, source, adapted = population(kinds=1)
    assert choose({"distance": distance}, source, adapted, corruption) is None


def test_of_equal_thresholds_the_one_that_adapts_least_wins():
    source = np.array([1.0] * 8 + [0, 0])
    gate = fit_threshold("distance", np.arange(10.0), source, np.ones(10), np.zeros(10, bool), 1.0)
    assert gate.opens(np.arange(10.0)).sum() == 2
