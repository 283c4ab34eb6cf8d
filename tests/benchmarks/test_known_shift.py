"""The ceiling of adapting: against BatchNorm's own training mode, closed forms, and the command."""

import copy

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import known_shift
from benchmarks.known_shift import (
    as_batch,
    measure_shift,
    moments_of,
    moments_of_each,
    summarise,
    train,
)
from tests.helpers import networks, trainings
from tests.helpers.execution import write_execution
from tttlab.adaptation.moment_matching import moments_matched
from tttlab.config.params import read_params
from tttlab.errors import UserError
from tttlab.shifts.shift import Shift
from tttlab.workflow import places

FOG = Shift("fog", 5)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(known_shift, "COUNTS", (4, 8))
    monkeypatch.setattr(known_shift, "STEPS", (2, 6))
    monkeypatch.setattr(known_shift, "BATCH", 4)
    monkeypatch.setattr(known_shift, "RATES", (1e-2,))
    monkeypatch.setattr(known_shift, "WAYS", ["none", "normalised_8", "matched_8"])


def normalised_by(network, images):
    """BatchNorm's running statistics are those of these images, variance the population's."""
    normal = copy.deepcopy(network)
    layers = [layer for layer in normal.modules() if isinstance(layer, nn.BatchNorm2d)]
    counts = []
    for layer in layers:
        layer.momentum = 1.0
        layer.register_forward_pre_hook(
            lambda _layer, inputs: counts.append(inputs[0].numel() / inputs[0].shape[1])
        )
    normal.train()
    with torch.no_grad():
        normal(images)
    normal.eval()
    for layer, count in zip(layers, counts, strict=False):
        layer.running_var *= (count - 1) / count
    return normal


def right(network, images, labels):
    with torch.no_grad():
        return network(images).logits.argmax(-1).numpy() == labels


def test_statistics_of_changed_images_are_batch_norms_own():
    network, test, source = networks.resnet(), trainings.image_set(40), trainings.image_set(32, 1)
    looks, changed = as_batch(FOG.apply(test, 3)), as_batch(FOG.apply(source, 4))
    with torch.no_grad():  # untrained, it would say the same of nearly all images
        network.classifier.bias -= network(looks).logits.mean(0)
    each = moments_of_each(network, as_batch(source.pixels))
    found = measure_shift(network, FOG, test, source, each, seed=3)
    assert list(found) == [
        "none",
        *("normalised_4", "matched_4", "normalised_8", "matched_8"),
        *("trained_0.01_2", "trained_0.01_6"),
    ]
    slow = {"none": network}
    slow |= {f"normalised_{count}": normalised_by(network, changed[:count]) for count in (4, 8)}
    for way, net in slow.items():
        same = found[way] == right(net, looks, test.labels)
        assert same.sum() >= len(test) - 1  # two classes may be equal but for rounding
    assert (found["none"] != found["normalised_8"]).sum() > 3


def test_unchanged_images_change_nothing():
    network, images = networks.resnet(), networks.images(6)
    moments = moments_of(moments_of_each(network, images), slice(6))
    with torch.no_grad():
        plain = network(images).logits
        with moments_matched(network, moments) as found:
            torch.testing.assert_close(network(images).logits, plain, atol=1e-4, rtol=1e-4)
    for layer, wanted in moments.items():
        torch.testing.assert_close(found[layer], wanted, atol=1e-4, rtol=1e-4)


def test_a_networks_own_statistics_need_batch_norm():
    network = networks.resnet("groupnorm1")
    source = trainings.image_set(32, 1)
    each = moments_of_each(network, as_batch(source.pixels))
    found = measure_shift(network, FOG, trainings.image_set(9), source, each, seed=3)
    assert "matched_8" in found
    assert not any(way.startswith("normalised") for way in found)


def test_training_lowers_the_loss_on_changed_images_and_leaves_the_network():
    network, source = networks.resnet("groupnorm1"), trainings.image_set(32, 1)
    each = moments_of_each(network, as_batch(source.pixels))
    changed, used = as_batch(FOG.apply(source, 4)), slice(8, 32)
    labels, before = torch.from_numpy(source.labels), copy.deepcopy(network.state_dict())

    def loss(net):
        with torch.no_grad(), moments_matched(net, moments_of(each, used)):
            return F.cross_entropy(net(changed[used]).logits, labels[used]).item()

    losses = [loss(network)]
    for steps, trained in train(network, each, changed, labels, rate=1e-2):
        losses.append(loss(trained))
        assert steps in (2, 6)
    assert losses[0] > losses[1] > losses[2]
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])  # memory that nobody writes to


def test_rate_and_steps_are_chosen_under_the_held_out_shifts_alone():
    ways = {  # right images of ten: under the held-out shift, and under the tested one
        "none": (5, 4),
        "matched_8": (6, 5),
        "trained_0.01_2": (8, 7),
        "trained_0.01_6": (7, 9),
    }
    rows = [
        {"model": "m", "seed": 0, "shift": shift, "chooses": chooses, "image": f"{shift}{number}"}
        | {"way": way, "correct": number < counts[0 if chooses else 1]}
        for way, counts in ways.items()
        for shift, chooses in (("spatter-5", True), ("fog-5", False))
        for number in range(10)
    ]
    found = summarise(pd.DataFrame(rows))
    assert {name: found[name] for name in ("none", "matched_8", "trained", "chosen", "adds")} == {
        "none": 40,
        "matched_8": 50,
        "trained": 70,
        "chosen": "0.01_2",
        "adds": pytest.approx(20),
    }
    assert found["low"] < 20 < found["high"]


def test_images_whose_moments_are_taken_are_not_trained_on(tmp_path, monkeypatch):
    outputs = write_execution(tmp_path)
    monkeypatch.setattr(places, "OUTPUTS", outputs)
    drawn = known_shift.draw_source(read_params(tmp_path / "params.yaml")).image_ids
    assert len(drawn) == 8 + 6 * 4
    assert len(set(drawn[:8])) == 8
    assert set(drawn[8:]) == {*trainings.image_set(12, 1).image_ids} - set(drawn[:8])
    monkeypatch.setattr(known_shift, "COUNTS", (4, 12))
    with pytest.raises(UserError, match="expected more than 12, found 12"):
        known_shift.draw_source(read_params(tmp_path / "params.yaml"))


@pytest.mark.slow
def test_the_command_measures_the_networks_of_an_execution(tmp_path, monkeypatch, capsys):
    outputs = write_execution(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["known_shift", "--images", "9"])
    known_shift.main()
    rows = pd.read_csv(outputs / "known_shift.csv")
    assert set(rows["shift"]) == {"fog-5", *(f"{name}-5" for name in known_shift.HELD_OUT)}
    assert rows.groupby(["shift", "way"])["correct"].count().eq(9).all()
    assert list(rows["way"].unique()) == [
        "none",
        *("matched_4", "matched_8", "trained_0.01_2", "trained_0.01_6"),
    ]
    assert "groupnorm" in capsys.readouterr().out
