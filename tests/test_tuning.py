"""Tuning: which settings are compared, on what, and that the best on enough images wins."""

import networks
import numpy as np
import pytest
import torch

from tttlab import sweep, tuning
from tttlab.adapter import adapt
from tttlab.arrivals import Stream
from tttlab.data import ImageSet
from tttlab.gate import Gate
from tttlab.inner_loop import InnerLoop
from tttlab.methods.actmad import ActMAD
from tttlab.methods.tent import TENT
from tttlab.params import CORRUPTIONS, HELD_OUT
from tttlab.resuming import Work
from tttlab.sweep import Block, Job, adapt_to_job, list_jobs
from tttlab.tuning import Judge, Outcome, Trial, list_candidates, successive_halving


def outcome(*accuracies: float, count: int = 100, clean_loss: float = 0.0) -> Outcome:
    """Per number of steps an accuracy on shifted images; the clean ones, as many, are all right but for a share."""
    shifted = np.stack([np.arange(count) < round(count * accuracy) for accuracy in accuracies], 1).astype(float)
    clean = np.ones((count, len(accuracies)))
    clean[: round(count * clean_loss)] = 0
    return Outcome(
        corruption=np.r_[np.arange(count) % 2, -np.ones(count, int)],
        source=np.r_[np.arange(count) < count // 2, np.ones(count)].astype(float),
        adapted=np.concatenate([shifted, clean]),
        signals={},
        milliseconds=np.ones(len(accuracies)),
    )


def test_settings_are_judged_under_corruptions_that_no_test_may_use():
    shifts = tuning.held_out_shifts([2, 4])
    assert [shift.name for shift in shifts[:3]] == ["clean", "speckle_noise-2", "speckle_noise-4"]
    assert {shift.corruption for shift in shifts[1:]} == set(HELD_OUT)
    assert not set(HELD_OUT) & set(CORRUPTIONS)


def test_candidates_are_the_default_and_then_the_grid_in_order():
    search = {"steps": (1, 4), "lr": (0.1, 0.2), "trainable": ("norm", "all")}
    found, steps = list_candidates(search, {"steps": 3, "lr": 0.2, "trainable": "norm"}, 10, 0)
    assert steps == (1, 3, 4)
    assert found == [
        {"lr": 0.2, "trainable": "norm"},
        {"lr": 0.1, "trainable": "norm"},
        {"lr": 0.1, "trainable": "all"},
        {"lr": 0.2, "trainable": "all"},
    ]
    assert list_candidates({"prior": (0.1, 0.2)}, {"prior": 0.1}, 10, 0) == ([{"prior": 0.1}, {"prior": 0.2}], (0,))


def test_where_one_pass_shows_one_number_of_steps_they_are_part_of_the_grid():
    search = {"steps": (1, 4), "lr": (0.1, 0.2)}
    found, steps = list_candidates(search, {"steps": 3, "lr": 0.2}, 10, 0, in_one_pass=False)
    assert steps == (0,)
    assert found == [{"steps": 3, "lr": 0.2}, *({"steps": s, "lr": lr} for s in (1, 4) for lr in (0.1, 0.2))]


def test_of_a_large_grid_a_part_is_drawn_that_depends_on_seed_and_run_alone():
    search = {"lr": tuple(range(10)), "clip": tuple(range(10))}
    draws = [list_candidates(search, {"lr": 3, "clip": 3}, 12, *key)[0] for key in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))]
    assert draws[0] == draws[1]
    assert draws[0] not in draws[2:]
    assert all(len(drawn) == 12 and drawn[0] == {"lr": 3, "clip": 3} for drawn in draws)
    assert len({tuple(values.items()) for values in draws[0]}) == 12


def test_halving_keeps_the_best_and_asks_for_more_images_only_for_them():
    truth = [0.5, 0.6, 0.9, 0.7, 0.8, 0.55, 0.65, 0.75]
    asked = []

    def judge(turn, numbers):
        asked.append((turn, tuple(numbers)))
        return {number: outcome(truth[number], 0.1) for number in numbers}

    trials = successive_halving(judge, 8, 3, 0.3, 1.0)
    assert [set(numbers) for _, numbers in asked] == [set(range(8)), {2, 4, 7}, {2}]
    assert [trial.number for trial in trials] == [2, 4, 7, 3, 6, 1, 5, 0]
    assert [len(trial.outcomes) for trial in trials] == [3, 2, 2, 1, 1, 1, 1, 1]


def test_of_equal_candidates_the_earlier_and_of_equal_steps_the_fewer_win():
    trials = successive_halving(lambda _turn, numbers: {n: outcome(0.3, 0.7, 0.7) for n in numbers}, 4, 2, 0.5, 1.0)
    assert trials[0].number == 0
    assert trials[0].best(1.0) == (1, 0.7)


def test_a_setting_that_costs_clean_accuracy_loses_to_one_that_does_not():
    outcomes = {0: outcome(0.80, clean_loss=0.10), 1: outcome(0.75)}
    for penalty, best in ((1.0, 1), (0.2, 0)):
        trials = successive_halving(lambda _turn, _numbers: outcomes, 2, 1, 1.0, penalty)
        assert trials[0].number == best


def test_a_round_that_judges_better_corrects_the_one_before():
    def judge(turn, numbers):
        return {number: outcome([0.9, 0.8][number] if turn == 0 else [0.6, 0.7][number]) for number in numbers}

    assert successive_halving(judge, 2, 2, 1.0, 1.0)[0].number == 1


def test_what_is_chosen_is_told_with_its_runners_up_and_a_gate():
    best, other = outcome(0.5, 0.9), outcome(0.7, 0.6)
    signals = {"confidence": np.r_[np.arange(100) < 50, np.ones(100)] * 0.5, "distance": np.ones(200), "loss": np.ones(200)}
    best = Outcome(best.corruption, best.source, best.adapted, signals, best.milliseconds)
    trials = [Trial(1, (best,)), Trial(0, (other,))]
    candidates = [{"lr": 0.1}, {"lr": 0.2}]
    found = tuning.choose(trials, candidates, (2, 5), True, 1.0, gate=True)
    assert found["settings"] == {"lr": 0.2, "steps": 5}
    assert found["candidates"] == [{"lr": 0.2, "steps": 5}, {"lr": 0.1, "steps": 2}]
    assert Gate(**found["gate"]) == Gate("confidence", 0.0)  # opens for the second half of the shifted images alone
    assert tuning.choose(trials, candidates, (2, 5), True, 1.0, gate=False)["gate"] is None
    told = tuning.describe(trials, candidates, (2, 5), True, 1.0)
    assert [values for values, _ in told] == [{"lr": 0.2, "steps": 5}, {"lr": 0.1, "steps": 2}]
    expected = {"score": 0.9, "accuracy": 0.9, "gain": 0.4, "clean_change": 0.0, "milliseconds": 1.0}
    assert told[0][1] == {200: pytest.approx(expected)}


@pytest.fixture
def images():
    pixels = (networks.images(8, seed=41).permute(0, 2, 3, 1) * 255).byte().numpy()
    return ImageSet(pixels, np.arange(8) % networks.CLASSES, tuple(f"img-{i}" for i in range(8)), tuple("abcd"), source="made")


CANDIDATES = [{"lr": 1e-3}, {"lr": 1e-2}]


def judged(images, folder, counts=(4, None), method=None, steps=(1, 2), trainable="encoder", **settings):
    network, statistics = networks.source_statistics("resnet", torch.float32)

    def build(values):
        return method or ActMAD(), InnerLoop(steps=2, clip=1.0, trainable=trainable, **values), statistics

    with Work(folder) as work:
        judge = Judge(network, images, counts, [3], CANDIDATES, steps, build, 0, work, "run", **settings)
        return [judge(turn, [0, 1]) for turn in range(len(counts))]


def assert_same(one: Outcome, other: Outcome) -> None:
    for name in ("corruption", "source", "adapted"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name, values in one.signals.items():
        np.testing.assert_allclose(values, other.signals[name], rtol=1e-5)


def test_an_outcome_is_what_the_adapter_gives_on_the_held_out_corruptions(images, tmp_path):
    found = judged(images, tmp_path / "work", counts=(None,))[0][1]
    network, statistics = networks.source_statistics("resnet", torch.float32)
    for place, shift in enumerate(tuning.held_out_shifts([3])):
        pixels = torch.from_numpy(shift.apply(images, 0)).permute(0, 3, 1, 2).float() / 255
        loop = InnerLoop(steps=2, clip=1.0, lr=1e-2)
        own = adapt(network, pixels, ActMAD(), loop, statistics=statistics, image_ids=images.image_ids, record=(1, 2))
        part = slice(8 * place, 8 * place + 8)
        labels = torch.from_numpy(images.labels)
        np.testing.assert_array_equal(found.adapted[part], (own.logits_at.argmax(-1) == labels[:, None]).numpy())
        np.testing.assert_array_equal(found.source[part], (own.source_logits.argmax(-1) == labels).numpy())
        np.testing.assert_array_equal(found.corruption[part], HELD_OUT.index(shift.corruption) if shift.severity else -1)
    np.testing.assert_allclose(found.signals["loss"][-8:], own.losses[:, 0], rtol=1e-4)


def test_later_rounds_add_images_and_repeat_none(images, tmp_path, monkeypatch):
    whole = judged(images, tmp_path / "whole", counts=(None,))[0]
    sizes = []

    def counting(network, pixels, *arguments, **settings):
        sizes.append(len(pixels))
        return adapt(network, pixels, *arguments, **settings)

    monkeypatch.setattr(sweep, "adapt", counting)
    first, second = judged(images, tmp_path / "rounds")
    assert sizes == [4] * 10 + [4] * 10
    assert len(first[0].clean) == 4 * 5
    for number in (0, 1):
        for name in ("source", "adapted"):
            totals = [getattr(outcomes[number], name).sum(0) for outcomes in (second, whole)]
            np.testing.assert_array_equal(*totals)


@pytest.mark.parametrize("shifts", ["separate", "continual"])
def test_on_streams_every_round_begins_anew_with_all_its_images(images, tmp_path, shifts):
    """The last round is what it would be alone: one stream over all images, which says more than several short ones."""
    stream = {"stream": Stream(2, shifts=shifts), "method": TENT(), "steps": (0,), "trainable": "norm"}
    rounds, alone = (judged(images, tmp_path / str(len(counts)), counts, **stream)[-1] for counts in ((4, None), (None,)))
    for number in (0, 1):
        assert_same(rounds[number], alone[number])
        assert len(rounds[number].clean) == 8 * 5
    network, statistics = networks.source_statistics("resnet", torch.float32)
    held_out = Job(tuple(Block(shift, 0, range(8)) for shift in tuning.held_out_shifts([3])[1:]), None)
    (job,) = [job for job in list_jobs(held_out.blocks, stream["stream"]) if job.blocks[-1].shift.corruption == HELD_OUT[-1]]
    loop = InnerLoop(steps=2, clip=1.0, trainable="norm", **CANDIDATES[1])
    own = adapt_to_job(network, TENT(), loop, images, job, stream["stream"], 1, statistics=statistics, seed=0, record=(2,))
    assert len(own) == (4 if shifts == "continual" else 1)
    right = own[job.blocks[-1].shift]["adapted_prediction"].numpy() == images.labels
    np.testing.assert_array_equal(rounds[1].adapted[-8:, 0], right)


def test_a_killed_tuning_goes_on_where_it_was(images, tmp_path, monkeypatch):
    whole = judged(images, tmp_path / "whole")
    calls = []

    def dying(*arguments, **settings):
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return adapt(*arguments, **settings)

    monkeypatch.setattr(sweep, "adapt", dying)
    with pytest.raises(KeyboardInterrupt):
        judged(images, tmp_path / "killed")
    done = []
    resumed = judged(images, tmp_path / "killed", on_images=done.append)
    assert len(calls) == 20 + 1
    assert sum(done) == 20 * 4
    for one, other in zip(whole, resumed, strict=True):
        for number in (0, 1):
            assert_same(one[number], other[number])


def test_workers_change_nothing(images, tmp_path):
    for one, other in zip(judged(images, tmp_path / "a"), judged(images, tmp_path / "b", workers=2), strict=True):
        for number in (0, 1):
            assert_same(one[number], other[number])


def test_the_work_ahead_is_counted():
    assert tuning.pairs_to_judge(8, 100, (10, 40, None), (3, 5), 0.25) == (8 * 10 + 2 * 30 + 1 * 60) * 9
    assert tuning.pairs_to_judge(8, 20, (10, 40), (3,), 0.5) == (8 * 10 + 4 * 10) * 5
    assert tuning.pairs_to_judge(8, 100, (10, 40, None), (3, 5), 0.25, anew=True) == (8 * 10 + 2 * 40 + 1 * 100) * 9
