"""Steps that stop by a signal: the signal against ActMAD's loss, the rule by hand, the command."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import stopping
from benchmarks.stopping import (
    WithDistance,
    choose,
    judge,
    measure_shift,
    stopping_steps,
    summarise,
    training_pairs,
)
from tests.helpers import networks, trainings
from tests.helpers.execution import write_execution
from tools.stage_code import ROOT
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.signals import logits_and_distance
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import InnerLoop
from tttlab.config.params import read_params
from tttlab.config.values import HELD_OUT
from tttlab.methods.actmad import ActMAD
from tttlab.shifts.shift import Shift


@pytest.mark.numerical
def test_the_distance_after_every_step_is_what_actmad_lowers():
    """On tokens and without tolerance its loss is the sum over two moments, thus twice the mean."""
    network, statistics = networks.source_statistics("vit")
    images = networks.images(3, seed=1).double()
    loop = InnerLoop(steps=2, optimizer="sgd", lr=1e-3, trainable="all")
    found = adapt(
        network,
        images,
        ActMAD(tolerance=0.0, layers="tokens"),
        loop,
        statistics=statistics,
        record=range(3),
        readout=WithDistance(statistics),
    )
    torch.testing.assert_close(2 * found.logits_at[..., -1], found.losses, rtol=1e-6, atol=0)
    assert (found.losses[:, 2] < found.losses[:, 0]).all()
    logits, distance = logits_and_distance(network, images, statistics)
    torch.testing.assert_close(found.source_logits, torch.cat([logits, distance[:, None]], 1))


def test_an_image_stops_where_its_signal_first_looks_unshifted():
    distance = np.array([[5.0, 3.0, 1.0, 4.0], [0.5, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    assert stopping_steps(distance, "distance", 2.0, 3).tolist() == [2, 0, 3]
    assert stopping_steps(distance, "distance", 2.0, 1).tolist() == [1, 0, 1]
    confidence = np.array([[0.2, 0.95, 0.1], [0.3, np.nan, 0.2]])
    assert stopping_steps(confidence, "confidence", 0.9, 2).tolist() == [1, 1]


def found(correct, distance, clean=(), source=None):
    correct, count = np.array(correct, bool), len(correct)
    about = {"clean": np.isin(range(count), clean), "correct": correct}
    source = correct[:, 0] if source is None else np.array(source, bool)
    return about | {"source": source, "distance": np.array(distance, float)}


def test_threshold_and_latest_step_are_those_of_the_highest_score():
    """The first image needs two steps, the second is spoilt by any; their distances tell which."""
    shown = found([[0, 0, 1, 1], [1, 0, 0, 0]], [[8, 6, 4, 4], [2, 2, 2, 2]])
    threshold, latest = choose(shown, "distance", 1.0)
    taken = stopping_steps(shown["distance"], "distance", threshold, latest)
    assert taken.tolist() == [2, 0]
    assert judge(shown, taken, 1.0) == pytest.approx(1.0)
    assert judge(shown, 3, 1.0) == pytest.approx(0.5)  # any fixed number is right on one of them


def test_points_lost_on_clean_images_count_against_a_rule():
    shown = found([[0, 1], [1, 0]], [[8, 4], [2, 2]], clean=[1])
    assert judge(shown, 1, 1.0) == pytest.approx(0.0)
    assert judge(shown, 1, 0.0) == pytest.approx(1.0)
    assert judge(shown, np.array([1, 0]), 1.0) == pytest.approx(1.0)


def test_the_rule_is_chosen_on_validation_images_alone():
    """There a far image needs the step; the tested images are the other way around, and lose."""
    rows = []
    for chooses, images in ((True, "abcdx"), (False, "efghy")):
        for name in images:
            far, clean = name in "abef", name in "xy"
            for steps in range(2):
                right_at = int(far) if chooses else int(not far)
                correct = clean or steps == right_at
                about = {"seed": 0, "shift": "clean" if clean else "fog-5", "image": name}
                about |= {"clean": clean, "source": clean or right_at == 0}
                signals = {"confidence": 0.5, "loss": 1.0, "distance": 9.0 if far else 1.0}
                signals["distance"] /= 1 + steps
                about |= {"run": "r", "model": "m", "chooses": chooses, "steps": steps}
                rows.append(about | signals | {"correct": correct})
    summary = pd.DataFrame(summarise(pd.DataFrame(rows), 1.0)).set_index("signal")
    assert set(summary.index) == set(stopping.ABOVE)
    by_distance = summary.loc["distance"]
    assert by_distance["stopped"] == pytest.approx(0)
    assert by_distance["taken"] == pytest.approx(0.5)
    assert by_distance[["fixed", "before"]].tolist() == pytest.approx([50, 50])
    assert by_distance["adds"] == pytest.approx(-50)
    assert by_distance["low"] < -50.0 < by_distance["high"]
    assert by_distance[["any", "clean"]].tolist() == pytest.approx([100, 100])
    assert summary.loc[["confidence", "loss"], "adds"].tolist() == pytest.approx([0, 0])


def test_rows_are_one_per_image_and_step():
    network, statistics = networks.source_statistics("resnet", torch.float32)
    shift, images = Shift("fog", 5), trainings.image_set(6)
    seen = shift.seen(images, 3)
    loop = InnerLoop(steps=2, optimizer="sgd", lr=1e-3, trainable="norm")
    task = Task(network, ActMAD(), loop, statistics, 3, WithDistance(statistics))
    rows = measure_shift(task, shift, seen, steps=2)
    assert rows["steps"].tolist() == [0, 1, 2] * 6
    first = rows[rows["steps"] == 0]
    pixels = torch.from_numpy(np.ascontiguousarray(seen.pixels))
    looks = pixels.permute(0, 3, 1, 2).float() / 255
    logits, distance = logits_and_distance(network, looks, statistics)
    np.testing.assert_allclose(first["distance"], distance, rtol=1e-3)
    np.testing.assert_allclose(first["confidence"], logits.softmax(1).amax(1), rtol=1e-3)
    # Two classes may be equal but for rounding.
    assert (first["correct"] == (logits.argmax(1).numpy() == images.labels)).sum() >= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected at least 1, found 0"),
        (["--runs", "bn"], "bn: expected a run that trains on single images, found none"),
        (["--runs", "bm"], "unknown run 'bm' in params.yaml; allowed: actmad, bn"),
    ],
)
def test_a_mistake_is_told_before_any_work(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stopping", *arguments])
    with pytest.raises(SystemExit):
        stopping.main()
    assert message in capsys.readouterr().err


def test_a_run_that_moves_no_parameter_has_nothing_to_stop():
    params = read_params(ROOT / "settings" / "robust.yaml")
    runs = params.adapt.runs | {"memo": params.adapt.runs["memo"] | {"trainable": "none"}}
    params = params.model_copy(update={"adapt": params.adapt.model_copy(update={"runs": runs})})
    assert {pair.run for pair in training_pairs(params, [])} == {"actmad"}


@pytest.mark.slow
def test_the_command_measures_the_runs_of_an_execution(tmp_path, monkeypatch, capsys):
    outputs = write_execution(tmp_path, {"actmad": {"lr": 1e-3}})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["stopping", "--images", "9", "--steps", "2", "--runs", "actmad"]
    )
    stopping.main()
    rows = pd.read_csv(outputs / "stopping.csv")
    chosen_on = rows[rows["chooses"]]
    assert set(rows.loc[~rows["chooses"], "shift"]) == {"clean", "fog-5"}
    assert set(chosen_on["shift"]) == {"clean", *(f"{name}-5" for name in HELD_OUT)}
    assert rows.groupby(["chooses", "shift", "steps"]).size().eq(9).all()
    assert rows["loss"].notna().all()
    printed = capsys.readouterr().out
    assert [signal in printed for signal in stopping.ABOVE] == [True] * 3
