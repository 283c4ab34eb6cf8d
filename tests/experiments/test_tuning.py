"""Tuning: which settings are compared, on what, and that the best on enough images wins."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.helpers import networks
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.gate import Gate
from tttlab.adaptation.inner_loop import InnerLoop
from tttlab.adaptation.task import Task
from tttlab.config.values import CORRUPTIONS, HELD_OUT
from tttlab.data.image_sets import ImageSet
from tttlab.evaluation.intervals import crossed_standard_error
from tttlab.experiments import jobs, tuning
from tttlab.experiments.blocks import Block, Job, list_jobs
from tttlab.experiments.jobs import Experiment, adapt_to_job
from tttlab.experiments.search import Search
from tttlab.experiments.trials import Grid, Outcome, Trial, compare, pick
from tttlab.experiments.tuning import Judge, Rounds, list_candidates, successive_halving
from tttlab.methods.actmad import ActMAD
from tttlab.methods.tent import TENT
from tttlab.runtime.group_size import Groups
from tttlab.runtime.machine import Machine
from tttlab.runtime.resuming import Work
from tttlab.shifts.streams import Stream


def outcome(*accuracies: float, count: int = 100, clean_loss: float = 0.0) -> Outcome:
    """Per number of steps an accuracy on images under each of two corruptions; the clean ones are all right but for a share."""
    shifted = np.stack(
        [np.arange(count) < round(count * accuracy) for accuracy in accuracies], 1
    ).astype(float)
    clean = np.ones((count, len(accuracies)))
    clean[: round(count * clean_loss)] = 0
    return Outcome(
        image=np.tile(np.arange(count), 3),
        corruption=np.repeat([0, 1, -1], count),
        source=np.r_[np.tile(np.arange(count) < count // 2, 2), np.ones(count)].astype(float),
        adapted=np.concatenate([shifted, shifted, clean]),
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
    found, steps, own = list_candidates(search, {"steps": 3, "lr": 0.2, "trainable": "norm"}, 10, 0)
    assert (steps, own) == ((1, 3, 4), 1)
    assert found == [
        {"lr": 0.2, "trainable": "norm"},
        {"lr": 0.1, "trainable": "norm"},
        {"lr": 0.1, "trainable": "all"},
        {"lr": 0.2, "trainable": "all"},
    ]
    assert list_candidates({"prior": (0.1, 0.2)}, {"prior": 0.1}, 10, 0) == (
        [{"prior": 0.1}, {"prior": 0.2}],
        (0,),
        0,
    )


def test_where_one_pass_shows_one_number_of_steps_they_are_part_of_the_grid():
    search = {"steps": (1, 4), "lr": (0.1, 0.2)}
    found, steps, own = list_candidates(search, {"steps": 3, "lr": 0.2}, 10, 0, in_one_pass=False)
    assert (steps, own) == ((0,), 0)
    assert found == [
        {"steps": 3, "lr": 0.2},
        *({"steps": s, "lr": lr} for s in (1, 4) for lr in (0.1, 0.2)),
    ]


def test_of_a_large_grid_a_part_is_drawn_that_depends_on_seed_and_run_alone():
    search = {"lr": tuple(range(10)), "clip": tuple(range(10))}
    draws = [
        list_candidates(search, {"lr": 3, "clip": 3}, 12, *key)[0]
        for key in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    ]
    assert draws[0] == draws[1]
    assert draws[0] not in draws[2:]
    assert all(len(drawn) == 12 and drawn[0] == {"lr": 3, "clip": 3} for drawn in draws)
    assert len({tuple(values.items()) for values in draws[0]}) == 12


def test_halving_keeps_the_best_and_the_default_and_asks_for_more_images_only_for_them():
    truth = [0.5, 0.6, 0.9, 0.7, 0.8, 0.55, 0.65, 0.75]
    asked = []

    def judge(turn, numbers):
        asked.append((turn, tuple(numbers)))
        return {number: outcome(truth[number], 0.1) for number in numbers}

    trials = successive_halving(judge, 8, 3, 0.3, 1.0)
    assert [set(numbers) for _, numbers in asked] == [set(range(8)), {0, 2, 4, 7}, {0, 2}]
    assert [trial.number for trial in trials] == [2, 0, 4, 7, 3, 6, 1, 5]
    assert [len(trial.outcomes) for trial in trials] == [3, 3, 2, 2, 1, 1, 1, 1]


def test_of_equal_candidates_the_earlier_and_of_equal_steps_the_fewer_win():
    trials = successive_halving(
        lambda _turn, numbers: {n: outcome(0.3, 0.7, 0.7) for n in numbers}, 4, 2, 0.5, 1.0
    )
    assert trials[0].number == 0
    assert trials[0].best(1.0) == (1, 0.7)


def test_a_setting_that_costs_clean_accuracy_loses_to_one_that_does_not():
    outcomes = {0: outcome(0.80, clean_loss=0.10), 1: outcome(0.75)}
    for penalty, best in ((1.0, 1), (0.2, 0)):
        trials = successive_halving(lambda _turn, _numbers: outcomes, 2, 1, 1.0, penalty)
        assert trials[0].number == best


def test_a_round_that_judges_better_corrects_the_one_before():
    def judge(turn, numbers):
        return {
            number: outcome([0.9, 0.8][number] if turn == 0 else [0.6, 0.7][number])
            for number in numbers
        }

    assert successive_halving(judge, 2, 2, 1.0, 1.0)[0].number == 1


def random_outcome(
    seed: int, count: int = 30, kinds: int = 4, gain: float = 0.0, clean_loss: float = 0.0
) -> Outcome:
    """Images under several corruptions at two severities each; one number of steps, right at random."""
    rng = np.random.default_rng(seed)
    image = np.concatenate([rng.permutation(count) for _ in range(2 * kinds + 1)])
    corruption = np.repeat([*range(kinds), *range(kinds), -1], count)
    right = rng.random(len(image)) < np.where(corruption < 0, 1 - clean_loss, 0.6 + gain)
    source = np.where(corruption < 0, True, rng.random(len(image)) < 0.6)
    return Outcome(
        image, corruption, source.astype(float), right[:, None].astype(float), {}, np.ones(1)
    )


@pytest.mark.parametrize("clean_loss", [0.0, 0.2])
def test_the_cells_of_a_score_are_each_images_under_each_corruption(clean_loss):
    """Against a loop over images and corruptions; their mean is the score."""
    found = random_outcome(1, clean_loss=clean_loss)
    cells = found.cells(0, 0.7)
    for image in range(30):
        clean = (found.image == image) & (found.corruption < 0)
        lost = (found.source[clean] - found.adapted[clean, 0]).item()
        for kind in range(4):
            own = (found.image == image) & (found.corruption == kind)
            assert own.sum() == 2
            assert cells[image, kind] == pytest.approx(found.adapted[own, 0].mean() - 0.7 * lost)
    assert cells.mean() == pytest.approx(found.scores(0.7)[0])


def test_a_gain_on_clean_images_is_no_part_of_the_cells():
    found = random_outcome(1)
    better = dataclasses.replace(found, source=np.where(found.clean, 0.0, found.source))
    np.testing.assert_array_equal(better.cells(0, 1.0), found.cells(0, 1.0))


def test_the_standard_error_of_a_crossed_mean_is_that_of_its_law():
    """Images, corruptions and both together drawn anew 4,000 times: the spread of the mean against the mean estimate."""
    rng, means, variances = np.random.default_rng(0), [], []
    for _ in range(4000):
        cells = rng.normal(0, 1, (12, 1)) + rng.normal(0, 0.5, (1, 6)) + rng.normal(0, 2, (12, 6))
        means.append(cells.mean())
        variances.append(crossed_standard_error(cells) ** 2)
    truth = 1 / 12 + 0.25 / 6 + 4 / 72
    assert np.var(means) == pytest.approx(truth, rel=0.08)
    assert np.mean(variances) == pytest.approx(
        truth, rel=0.08
    )  # hardly above it, for a part of it is never taken for negative


def test_the_standard_error_of_one_row_or_column_is_the_ordinary_one():
    values = np.random.default_rng(1).normal(size=9)
    expected = values.std(ddof=1) / 3
    assert crossed_standard_error(values[:, None]) == pytest.approx(expected)
    assert crossed_standard_error(values[None]) == pytest.approx(expected)
    assert crossed_standard_error(np.ones((1, 1))) == 0.0


def flipped(count: int) -> Outcome:
    """The default's outcome below with ``count`` more images right, each under both corruptions."""
    return outcome(0.5, 0.5 + count / 100)


@pytest.mark.parametrize(("count", "chosen"), [(0, 0), (1, 0), (3, 1), (30, 1)])
def test_the_default_stays_unless_another_is_better_by_more_than_one_standard_error(count, chosen):
    """With c of 100 images helped, and the same under both corruptions, their ratio is √(99 c / (100 − c)): 1 for one image."""
    trials = [Trial(1, (flipped(count),)), Trial(0, (outcome(0.5, 0.5),))]
    difference, error = compare(trials[0], 1, trials[1], 1, 1.0)
    assert difference == pytest.approx(count / 100)
    assert error == pytest.approx(np.sqrt(count / 100 * (1 - count / 100) / 99))
    rank, place = pick(trials, 1, 1.0)
    assert trials[rank].number == chosen
    assert place == 1


def test_another_number_of_steps_replaces_the_runs_own_by_the_same_rule():
    for accuracies, place in (((0.50, 0.51), 0), ((0.50, 0.60), 1)):
        assert pick([Trial(0, (outcome(*accuracies),))], 0, 1.0) == (0, place)


def test_a_candidate_is_compared_on_the_images_that_it_saw():
    """One that fell out in the first round is compared with what the default did there."""
    early, late = outcome(0.6, count=20), outcome(0.5, count=100)
    out, default = Trial(1, (outcome(0.8, count=20),)), Trial(0, (early, late))
    assert compare(out, 0, default, 0, 1.0)[0] == pytest.approx(0.2)


def test_a_setting_must_hold_under_several_corruptions():
    """The same mean gain, from one corruption alone or from all four: corruptions are drawn at random too."""
    default, base = random_outcome(3), np.zeros(30 * 9)
    gains = []
    for helped in ([0], [0, 1, 2, 3]):
        adapted = base.copy()
        for kind in helped:
            rows = np.flatnonzero(default.corruption == kind)
            adapted[rows[: 48 // len(helped)]] = 1.0
        trial = Trial(1, (dataclasses.replace(default, adapted=adapted[:, None]),))
        nothing = Trial(0, (dataclasses.replace(default, adapted=base[:, None]),))
        gains.append(compare(trial, 0, nothing, 0, 0.0))
    (one, one_error), (four, four_error) = gains
    assert one == pytest.approx(four)
    assert one < one_error
    assert four > 3 * four_error


def searched(best: Outcome, other: Outcome) -> Search:
    """Two candidates, the second the better, each after 2 and 5 steps, of which the run's own are 2."""
    grid = Grid([{"lr": 0.1}, {"lr": 0.2}], (2, 5), 0)
    return Search([Trial(1, (best,)), Trial(0, (other,))], grid, True, 1.0)


def test_what_is_chosen_is_told_with_scores_the_grid_and_a_gate():
    best, other = outcome(0.5, 0.9), outcome(0.7, 0.6)
    confidence = np.r_[np.tile(np.arange(100) < 50, 2), np.ones(100)] * 0.5
    signals = {"confidence": confidence, "distance": np.ones(300), "loss": np.ones(300)}
    search = searched(dataclasses.replace(best, signals=signals), other)
    asked = []
    found = search.choose(lambda values, gate: not asked.append((values, gate)))
    assert found["settings"] == {"lr": 0.2, "steps": 5}
    assert [told["settings"] for told in found["candidates"]] == [
        {"lr": 0.2, "steps": 5},
        {"lr": 0.1, "steps": 2},
    ]
    expected = {
        "score": 0.9,
        "images": 100,
        "above_default": 0.2,
        "standard_error": np.sqrt(0.2 * 0.8 / 99),
    }
    assert {key: found["candidates"][0][key] for key in expected} == pytest.approx(expected)
    assert [found["candidates"][1][key] for key in ("above_default", "standard_error")] == [0, 0]
    assert found["search"] == {"lr": [0.1, 0.2], "steps": [2, 5]}
    assert found["without_influence"] == []
    assert Gate(**found["gate"]) == Gate(
        "confidence", 0.0
    )  # opens for the second half of the shifted images alone
    assert asked == [({"lr": 0.2, "steps": 5}, Gate("confidence", 0.0))]
    told = search.describe()
    assert [values for values, _ in told] == [{"lr": 0.2, "steps": 5}, {"lr": 0.1, "steps": 2}]
    expected = {
        "score": 0.9,
        "accuracy": 0.9,
        "gain": 0.4,
        "clean_change": 0.0,
        "milliseconds": 1.0,
    }
    assert told[0][1] == {300: pytest.approx(expected)}
    assert search.chosen() == pytest.approx(expected)


def test_there_is_no_gate_where_none_is_wanted_or_where_it_costs_more_than_it_saves():
    signals = {"confidence": np.r_[np.tile(np.arange(100) < 50, 2), np.ones(100)] * 0.5}
    search = searched(dataclasses.replace(outcome(0.5, 0.9), signals=signals), outcome(0.7, 0.6))
    assert search.choose(None)["gate"] is None
    assert search.choose(lambda _values, _gate: False)["gate"] is None


def test_what_stays_is_told_beside_what_was_a_little_better():
    search = searched(outcome(0.5, 0.61), outcome(0.6, 0.1))
    found = search.choose(None)
    assert found["settings"] == {"lr": 0.1, "steps": 2}  # the run's own
    assert found["candidates"][0]["settings"] == {"lr": 0.2, "steps": 5}
    assert search.chosen()["score"] == pytest.approx(0.6)


def test_values_are_told_in_their_order_numbers_before_words():
    grid = Grid([{"prior": 0.4, "layers": "norm"}, {"prior": 0.02, "layers": ("a", "b")}], (0,), 0)
    trials = [Trial(0, (outcome(0.5),)), Trial(1, (outcome(0.5),))]
    found = Search(trials, grid, False, 1.0).tried_values()
    assert found == {"prior": [0.02, 0.4], "layers": [("a", "b"), "norm"]}


def searched_among(trials, candidates, steps=(0,), trains=False) -> Search:
    return Search(trials, Grid(candidates, steps, 0), trains, 1.0)


def tied(accuracy, candidates, rounds=1, steps=(0,), trains=False) -> list[str]:
    """Name the settings without influence where a candidate's accuracy, per step, is a function of its values."""
    trials = [
        Trial(
            number, (outcome(*np.atleast_1d(accuracy(**values))),) * (rounds if number == 0 else 1)
        )
        for number, values in enumerate(candidates)
    ]
    return searched_among(trials, candidates, steps, trains).without_influence()


class TestWithoutInfluence:
    GRID = [{"lr": lr, "filter": size} for lr in (0.1, 0.2) for size in (1, 5, 20)]  # noqa: RUF012

    def test_a_setting_whose_values_all_tie_whatever_the_others_are(self):
        assert tied(lambda lr, filter: 0.5 + lr, self.GRID) == ["filter"]
        assert tied(lambda lr, filter: 0.5, self.GRID) == ["lr", "filter"]
        assert (
            tied(lambda lr, filter: 0.5 + 0.01 * filter * (lr > 0.1), self.GRID) == []
        )  # acts beside one learning rate

    def test_only_rounds_that_both_took_part_in_are_compared(self):
        later = {0.5: outcome(0.5), 0.6: outcome(0.6)}
        trials = [Trial(0, (later[0.5], later[0.6])), Trial(1, (later[0.5],))]
        assert searched_among(trials, [{"lr": 0.1}, {"lr": 0.2}]).without_influence() == ["lr"]
        trials = [Trial(0, (later[0.5], later[0.6])), Trial(1, (later[0.5], later[0.5]))]
        assert searched_among(trials, [{"lr": 0.1}, {"lr": 0.2}]).without_influence() == []

    def test_what_was_not_compared_is_not_said_to_tie(self):
        assert tied(lambda lr, filter: 0.5, self.GRID[:1]) == []
        diagonal = [{"lr": 0.1, "filter": 1}, {"lr": 0.2, "filter": 5}]
        assert tied(lambda lr, filter: 0.5, diagonal) == []
        assert (
            tied(lambda lr, filter: 0.5, [*self.GRID[:2], self.GRID[5]]) == []
        )  # filter 20 beside lr 0.2 alone

    def test_numbers_of_steps_are_values_too(self):
        candidates = [{"lr": 0.1}, {"lr": 0.2}]
        assert tied(lambda lr: [0.5 + lr] * 2, candidates, steps=(1, 4), trains=True) == ["steps"]
        assert tied(lambda lr: [0.5, 0.6], candidates, steps=(1, 4), trains=True) == ["lr"]

    def test_is_told_with_what_was_chosen(self):
        trials = [Trial(number, (outcome(0.7),)) for number in (0, 1)]
        assert searched_among(trials, [{"lr": 0.1}, {"lr": 0.2}]).choose(None)[
            "without_influence"
        ] == ["lr"]


@pytest.fixture
def images():
    pixels = (networks.images(8, seed=41).permute(0, 2, 3, 1) * 255).byte().numpy()
    return ImageSet(
        pixels,
        np.arange(8) % networks.CLASSES,
        tuple(f"img-{i}" for i in range(8)),
        tuple("abcd"),
        source="made",
    )


CANDIDATES = [{"lr": 1e-3}, {"lr": 1e-2}]


def judged(
    images,
    folder,
    counts=(4, None),
    method=None,
    steps=(1, 2),
    trainable="encoder",
    stream=None,
    workers=0,
    on_images=lambda _count: None,
):
    network, statistics = networks.source_statistics("resnet", torch.float32)

    def build(values):
        loop = InnerLoop(steps=2, clip=1.0, trainable=trainable, **values)
        return Task(network, method or ActMAD(), loop, statistics)

    rounds = Rounds(images, counts, [3], 0, stream)
    grid, machine = Grid(CANDIDATES, steps, 0), Machine(workers=workers)
    with Work(folder) as work:
        judge = Judge(rounds, grid, build, work, "run", machine, on_images)
        return [judge(turn, [0, 1]) for turn in range(len(counts))]


def assert_same(one: Outcome, other: Outcome) -> None:
    for name in ("image", "corruption", "source", "adapted"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name, values in one.signals.items():
        np.testing.assert_allclose(values, other.signals[name], rtol=1e-5)


def test_an_outcome_is_what_the_adapter_gives_on_the_held_out_corruptions(images, tmp_path):
    found = judged(images, tmp_path / "work", counts=(None,))[0][1]
    network, statistics = networks.source_statistics("resnet", torch.float32)
    for place, shift in enumerate(tuning.held_out_shifts([3])):
        pixels = torch.from_numpy(shift.apply(images, 0)).permute(0, 3, 1, 2).float() / 255
        loop = InnerLoop(steps=2, clip=1.0, lr=1e-2)
        own = adapt(
            network,
            pixels,
            ActMAD(),
            loop,
            statistics=statistics,
            image_ids=images.image_ids,
            record=(1, 2),
        )
        part = slice(8 * place, 8 * place + 8)
        labels = torch.from_numpy(images.labels)
        np.testing.assert_array_equal(
            found.adapted[part], (own.logits_at.argmax(-1) == labels[:, None]).numpy()
        )
        np.testing.assert_array_equal(
            found.source[part], (own.source_logits.argmax(-1) == labels).numpy()
        )
        np.testing.assert_array_equal(
            found.corruption[part], HELD_OUT.index(shift.corruption) if shift.severity else -1
        )
    np.testing.assert_allclose(found.signals["loss"][-8:], own.losses[:, 0], rtol=1e-4)


def test_later_rounds_add_images_and_repeat_none(images, tmp_path, monkeypatch):
    whole = judged(images, tmp_path / "whole", counts=(None,))[0]
    sizes = []

    def counting(network, pixels, *arguments, **settings):
        sizes.append(len(pixels))
        return adapt(network, pixels, *arguments, **settings)

    monkeypatch.setattr(jobs, "adapt", counting)
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
    stream = {
        "stream": Stream(2, shifts=shifts),
        "method": TENT(),
        "steps": (0,),
        "trainable": "norm",
    }
    rounds, alone = (
        judged(images, tmp_path / str(len(counts)), counts, **stream)[-1]
        for counts in ((4, None), (None,))
    )
    for number in (0, 1):
        assert_same(rounds[number], alone[number])
        assert len(rounds[number].clean) == 8 * 5
    network, statistics = networks.source_statistics("resnet", torch.float32)
    held_out = Job(
        tuple(Block(shift, 0, range(8)) for shift in tuning.held_out_shifts([3])[1:]), None
    )
    (job,) = [
        job
        for job in list_jobs(held_out.blocks, stream["stream"])
        if job.blocks[-1].shift.corruption == HELD_OUT[-1]
    ]
    loop = InnerLoop(steps=2, clip=1.0, trainable="norm", **CANDIDATES[1])
    task = Task(network, TENT(), loop, statistics)
    own = adapt_to_job(Experiment(task, images, stream["stream"], record=(2,)), job, Groups())
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

    monkeypatch.setattr(jobs, "adapt", dying)
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
    for one, other in zip(
        judged(images, tmp_path / "a"), judged(images, tmp_path / "b", workers=2), strict=True
    ):
        for number in (0, 1):
            assert_same(one[number], other[number])


def test_the_work_ahead_is_counted():
    assert (
        tuning.pairs_to_judge(8, 100, (10, 40, None), (3, 5), 0.25)
        == (8 * 10 + 3 * 30 + 2 * 60) * 9
    )
    assert tuning.pairs_to_judge(8, 20, (10, 40), (3,), 0.5) == (8 * 10 + 5 * 10) * 5
    assert (
        tuning.pairs_to_judge(8, 100, (10, 40, None), (3, 5), 0.25, anew=True)
        == (8 * 10 + 3 * 40 + 2 * 100) * 9
    )
