"""Tuning: which settings are compared, on what, and that the best on enough images wins."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.helpers import networks
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.gate import Gate
from tttlab.adaptation.online import adapt_stream
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import InnerLoop
from tttlab.config.values import CORRUPTIONS, HELD_OUT
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.data.splits import balanced_subset
from tttlab.evaluation.intervals import crossed_standard_error
from tttlab.experiments import blocks, jobs, tuning
from tttlab.experiments.blocks import Block, list_jobs
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
    """An accuracy per number of steps, under each of two corruptions.

    Args:
        accuracies: one per number of steps.
        count: number of images.
        clean_loss: share of the clean images that are wrong after adaptation.
    """
    columns = [np.arange(count) < round(count * accuracy) for accuracy in accuracies]
    shifted = np.stack(columns, 1).astype(float)
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
    assert {shift.strength for shift in shifts} == {"own"}
    for published in (
        tuning.held_out_shifts([2], "cifar10_c"),
        Rounds(None, (), [2], 0, strength="cifar10_c").shifts,
    ):
        assert {shift.strength for shift in published[1:]} == {"cifar10_c"}


def test_candidates_are_the_default_and_then_the_grid_in_order():
    search = {"steps": (1, 4), "lr": (0.1, 0.2), "trainable": ("norm", "all")}
    default = {"steps": 3, "lr": 0.2, "trainable": "norm"}
    candidates, steps, default_index = list_candidates(search, default, 10, 0)
    assert (steps, default_index) == ((1, 3, 4), 1)
    assert candidates == [
        {"lr": 0.2, "trainable": "norm"},
        {"lr": 0.1, "trainable": "norm"},
        {"lr": 0.1, "trainable": "all"},
        {"lr": 0.2, "trainable": "all"},
    ]
    grid = list_candidates({"prior": (0.1, 0.2)}, {"prior": 0.1}, 10, 0)
    assert grid == ([{"prior": 0.1}, {"prior": 0.2}], (0,), 0)


def test_where_one_pass_shows_one_number_of_steps_they_are_part_of_the_grid():
    search, default = {"steps": (1, 4), "lr": (0.1, 0.2)}, {"steps": 3, "lr": 0.2}
    grid = list_candidates(search, default, 10, 0, in_one_pass=False)
    assert grid[1:] == ((0,), 0)
    assert grid.candidates == [
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
    assert all(len(candidates) == 12 for candidates in draws)
    assert all(candidates[0] == {"lr": 3, "clip": 3} for candidates in draws)
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
    accuracies = [[0.9, 0.8], [0.6, 0.7]]

    def judge(turn, numbers):
        return {number: outcome(accuracies[turn][number]) for number in numbers}

    assert successive_halving(judge, 2, 2, 1.0, 1.0)[0].number == 1


def random_outcome(
    seed: int, count: int = 30, kinds: int = 4, gain: float = 0.0, clean_loss: float = 0.0
) -> Outcome:
    """Random results of one number of steps, under several corruptions at two severities each."""
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
    result = random_outcome(1, clean_loss=clean_loss)
    cells = result.cells(0, 0.7)
    for image in range(30):
        clean = (result.image == image) & (result.corruption < 0)
        lost = (result.source[clean] - result.adapted[clean, 0]).item()
        for kind in range(4):
            pairs = (result.image == image) & (result.corruption == kind)
            assert pairs.sum() == 2
            accuracy = result.adapted[pairs, 0].mean()
            assert cells[image, kind] == pytest.approx(accuracy - 0.7 * lost)
    assert cells.mean() == pytest.approx(result.scores(0.7)[0])


def test_a_gain_on_clean_images_is_no_part_of_the_cells():
    result = random_outcome(1)
    better = dataclasses.replace(result, source=np.where(result.clean, 0.0, result.source))
    np.testing.assert_array_equal(better.cells(0, 1.0), result.cells(0, 1.0))


def test_the_standard_error_of_a_crossed_mean_is_that_of_its_law():
    """The spread of 4,000 means of random images, corruptions and cells, against the estimate."""
    rng, means, variances = np.random.default_rng(0), [], []
    for _ in range(4000):
        cells = rng.normal(0, 1, (12, 1)) + rng.normal(0, 0.5, (1, 6)) + rng.normal(0, 2, (12, 6))
        means.append(cells.mean())
        variances.append(crossed_standard_error(cells) ** 2)
    truth = 1 / 12 + 0.25 / 6 + 4 / 72
    assert np.var(means) == pytest.approx(truth, rel=0.08)
    # Barely above the truth: the estimate never takes a part of the variance for negative.
    assert np.mean(variances) == pytest.approx(truth, rel=0.08)


def test_the_standard_error_of_one_row_or_column_is_the_ordinary_one():
    values = np.random.default_rng(1).normal(size=9)
    expected = values.std(ddof=1) / 3
    assert crossed_standard_error(values[:, None]) == pytest.approx(expected)
    assert crossed_standard_error(values[None]) == pytest.approx(expected)
    assert crossed_standard_error(np.ones((1, 1))) == 0.0


def flipped(count: int) -> Outcome:
    """The default's outcome below, with ``count`` more images right under both corruptions."""
    return outcome(0.5, 0.5 + count / 100)


@pytest.mark.parametrize(("count", "best"), [(0, 0), (1, 0), (3, 1), (30, 1)])
def test_the_default_stays_unless_another_is_better_by_more_than_one_standard_error(count, best):
    """If c of 100 images are helped under both corruptions, their ratio is √(99 c / (100 − c)).

    This is 1 for one image.
    """
    trials = [Trial(1, (flipped(count),)), Trial(0, (outcome(0.5, 0.5),))]
    difference, error = compare(trials[0], 1, trials[1], 1, 1.0)
    assert difference == pytest.approx(count / 100)
    assert error == pytest.approx(np.sqrt(count / 100 * (1 - count / 100) / 99))
    rank, step_index = pick(trials, 1, 1.0)
    assert trials[rank].number == best
    assert step_index == 1


def test_another_number_of_steps_replaces_the_runs_own_by_the_same_rule():
    for accuracies, step_index in (((0.50, 0.51), 0), ((0.50, 0.60), 1)):
        assert pick([Trial(0, (outcome(*accuracies),))], 0, 1.0) == (0, step_index)


@pytest.mark.parametrize("clean_loss", [0.0, 0.3])
def test_the_error_of_a_lead_is_that_of_a_comparison_with_the_source_network(clean_loss):
    found = random_outcome(5, gain=0.1, clean_loss=clean_loss)
    source = dataclasses.replace(found, adapted=found.source[:, None])
    lead, error = compare(Trial(1, (found,)), 0, Trial(0, (source,)), 0, 1.0)
    summary = found.summary(0, 1.0)
    assert lead == pytest.approx(summary["score"] - (summary["accuracy"] - summary["gain"]))
    assert found.lead_error(0, 1.0) == pytest.approx(error)
    assert error > 0


def test_a_candidate_is_compared_on_the_images_that_it_saw():
    """A candidate that fell out in the first round is compared with the default in that round."""
    early, late = outcome(0.6, count=20), outcome(0.5, count=100)
    trial, default = Trial(1, (outcome(0.8, count=20),)), Trial(0, (early, late))
    assert compare(trial, 0, default, 0, 1.0)[0] == pytest.approx(0.2)


def test_a_setting_must_hold_under_several_corruptions():
    """The same mean gain from one corruption and from four: corruptions are a random sample too."""
    template, zeros = random_outcome(3), np.zeros(30 * 9)
    gains = []
    for helped in ([0], [0, 1, 2, 3]):
        adapted = zeros.copy()
        for kind in helped:
            rows = np.flatnonzero(template.corruption == kind)
            adapted[rows[: 48 // len(helped)]] = 1.0
        trial = Trial(1, (dataclasses.replace(template, adapted=adapted[:, None]),))
        default = Trial(0, (dataclasses.replace(template, adapted=zeros[:, None]),))
        gains.append(compare(trial, 0, default, 0, 0.0))
    (gain_of_one, error_of_one), (gain_of_four, error_of_four) = gains
    assert gain_of_one == pytest.approx(gain_of_four)
    assert gain_of_one < error_of_one
    assert gain_of_four > 3 * error_of_four


def search_of_two(best: Outcome, default: Outcome) -> Search:
    """Two candidates after 2 and 5 steps, the second the better; the run's own steps are 2."""
    grid = Grid([{"lr": 0.1}, {"lr": 0.2}], (2, 5), 0)
    return Search([Trial(1, (best,)), Trial(0, (default,))], grid, True, 1.0)


def test_what_is_chosen_is_told_with_scores_the_grid_and_a_gate():
    best, default = outcome(0.5, 0.9), outcome(0.7, 0.6)
    confidence = np.r_[np.tile(np.arange(100) < 50, 2), np.ones(100)] * 0.5
    signals = {"confidence": confidence, "distance": np.ones(300), "loss": np.ones(300)}
    search = search_of_two(dataclasses.replace(best, signals=signals), default)
    asked = []
    choice = search.choose(lambda values, gate: not asked.append((values, gate)))
    candidates = choice["candidates"]
    assert choice["settings"] == {"lr": 0.2, "steps": 5}
    assert [candidate["settings"] for candidate in candidates] == [
        {"lr": 0.2, "steps": 5},
        {"lr": 0.1, "steps": 2},
    ]
    expected = {
        "score": 0.9,
        "images": 100,
        "above_default": 0.2,
        "standard_error": np.sqrt(0.2 * 0.8 / 99),
    }
    assert {key: candidates[0][key] for key in expected} == pytest.approx(expected)
    assert [candidates[1][key] for key in ("above_default", "standard_error")] == [0, 0]
    assert choice["search"] == {"lr": [0.1, 0.2], "steps": [2, 5]}
    assert choice["without_influence"] == []
    # It opens only for the second half of the shifted images.
    gate = Gate("confidence", 0.0)
    assert Gate(**choice["gate"]) == gate
    assert asked == [({"lr": 0.2, "steps": 5}, gate)]
    descriptions = search.describe()
    settings = [values for values, _ in descriptions]
    assert settings == [{"lr": 0.2, "steps": 5}, {"lr": 0.1, "steps": 2}]
    expected = {
        "score": 0.9,
        "accuracy": 0.9,
        "gain": 0.4,
        "clean_change": 0.0,
        "milliseconds": 1.0,
    }
    assert descriptions[0][1] == {300: pytest.approx(expected)}
    assert search.chosen() == pytest.approx(expected)


def test_the_lead_is_what_is_won_above_the_source_network_less_what_clean_images_lose():
    best = outcome(0.5, 0.9, clean_loss=0.1)
    choice = search_of_two(best, outcome(0.7, 0.6)).choose(None)
    assert choice["score"] == pytest.approx(0.8)
    assert choice["lead"] == pytest.approx(0.8 - 0.5)


def test_the_gate_is_that_of_the_settings_which_stay_not_of_the_best_candidates():
    confidence = np.r_[np.tile(np.arange(100) < 50, 2), np.ones(100)] * 0.5
    default = dataclasses.replace(outcome(0.6, 0.1), signals={"confidence": confidence})
    choice = search_of_two(outcome(0.5, 0.61), default).choose(lambda _values, _gate: True)
    assert choice["settings"] == {"lr": 0.1, "steps": 2}
    assert choice["gate"] == {"signal": "confidence", "threshold": 0.0}


def test_a_gate_pays_the_clean_penalty_like_every_other_setting():
    """Every shifted image is helped, and clean ones, all nearer than 1, are harmed."""
    near = np.where(np.arange(100) < 10, 0.5, 8.0)
    result = outcome(1.0, clean_loss=0.3)
    result = dataclasses.replace(
        result,
        source=np.where(result.clean, 1.0, 0.0),
        signals={"distance": np.r_[near, near, np.linspace(1, 0, 100)]},
    )
    gates = [Trial(0, (result,)).gate(0, penalty, lambda _gate: True) for penalty in (1.0, 0.0)]
    assert gates[0].threshold > 1
    assert gates[1].threshold == 0.5


def test_there_is_no_gate_where_none_is_wanted_or_where_it_costs_more_than_it_saves():
    signals = {"confidence": np.r_[np.tile(np.arange(100) < 50, 2), np.ones(100)] * 0.5}
    best = dataclasses.replace(outcome(0.5, 0.9), signals=signals)
    search = search_of_two(best, outcome(0.7, 0.6))
    assert search.choose(None)["gate"] is None
    assert search.choose(lambda _values, _gate: False)["gate"] is None


def test_what_stays_is_told_beside_what_was_a_little_better():
    search = search_of_two(outcome(0.5, 0.61), outcome(0.6, 0.1))
    choice = search.choose(None)
    assert choice["settings"] == {"lr": 0.1, "steps": 2}  # the run's own
    assert choice["candidates"][0]["settings"] == {"lr": 0.2, "steps": 5}
    assert search.chosen()["score"] == pytest.approx(0.6)
    assert choice["score"] == pytest.approx(0.6)
    # The error too is that of what stays: ten of a hundred images are helped.
    assert choice["lead"] == pytest.approx(0.1)
    assert choice["lead_error"] == pytest.approx(np.sqrt(0.1 * 0.9 / 99))


def test_values_are_told_in_their_order_numbers_before_words():
    grid = Grid([{"prior": 0.4, "layers": "norm"}, {"prior": 0.02, "layers": ("a", "b")}], (0,), 0)
    trials = [Trial(0, (outcome(0.5),)), Trial(1, (outcome(0.5),))]
    tried = Search(trials, grid, False, 1.0).tried_values()
    assert tried == {"prior": [0.02, 0.4], "layers": [("a", "b"), "norm"]}


def search_among(trials, candidates, steps=(0,), trains=False) -> Search:
    return Search(trials, Grid(candidates, steps, 0), trains, 1.0)


def tied(accuracy, candidates, rounds=1, steps=(0,), trains=False) -> list[str]:
    """Name the settings without influence.

    Args:
        accuracy: function of a candidate's values: its accuracy, or one per number of steps.
        candidates: the settings.
        rounds: those of the default; the others take part in one.
        steps: numbers of steps.
        trains: whether the method takes steps.
    """
    trials = []
    for number, values in enumerate(candidates):
        result = outcome(*np.atleast_1d(accuracy(**values)))
        trials.append(Trial(number, (result,) * (rounds if number == 0 else 1)))
    return search_among(trials, candidates, steps, trains).without_influence()


class TestWithoutInfluence:
    GRID = [{"lr": lr, "filter": size} for lr in (0.1, 0.2) for size in (1, 5, 20)]  # noqa: RUF012

    def test_a_setting_whose_values_all_tie_whatever_the_others_are(self):
        assert tied(lambda lr, filter: 0.5 + lr, self.GRID) == ["filter"]
        assert tied(lambda lr, filter: 0.5, self.GRID) == ["lr", "filter"]
        # The filter acts at one learning rate only.
        assert tied(lambda lr, filter: 0.5 + 0.01 * filter * (lr > 0.1), self.GRID) == []

    def test_only_rounds_that_both_took_part_in_are_compared(self):
        worse, better, candidates = outcome(0.5), outcome(0.6), [{"lr": 0.1}, {"lr": 0.2}]
        trials = [Trial(0, (worse, better)), Trial(1, (worse,))]
        assert search_among(trials, candidates).without_influence() == ["lr"]
        trials = [Trial(0, (worse, better)), Trial(1, (worse, worse))]
        assert search_among(trials, candidates).without_influence() == []

    def test_what_was_not_compared_is_not_said_to_tie(self):
        assert tied(lambda lr, filter: 0.5, self.GRID[:1]) == []
        diagonal = [{"lr": 0.1, "filter": 1}, {"lr": 0.2, "filter": 5}]
        assert tied(lambda lr, filter: 0.5, diagonal) == []
        # Filter 20 was tried only with lr 0.2.
        assert tied(lambda lr, filter: 0.5, [*self.GRID[:2], self.GRID[5]]) == []

    def test_numbers_of_steps_are_values_too(self):
        candidates = [{"lr": 0.1}, {"lr": 0.2}]
        assert tied(lambda lr: [0.5 + lr] * 2, candidates, steps=(1, 4), trains=True) == ["steps"]
        assert tied(lambda lr: [0.5, 0.6], candidates, steps=(1, 4), trains=True) == ["lr"]

    def test_is_told_with_what_was_chosen(self):
        trials = [Trial(number, (outcome(0.7),)) for number in (0, 1)]
        choice = search_among(trials, [{"lr": 0.1}, {"lr": 0.2}]).choose(None)
        assert choice["without_influence"] == ["lr"]


@pytest.fixture(autouse=True)
def every_block_is_a_job(monkeypatch):
    monkeypatch.setattr(blocks, "TOGETHER", 0)


@pytest.fixture
def images():
    pixels = (networks.images(8, seed=41).permute(0, 2, 3, 1) * 255).byte().numpy()
    labels, names = np.arange(8) % networks.CLASSES, tuple(f"img-{i}" for i in range(8))
    return ImageSet(pixels, labels, names, tuple("abcd"), source="made")


CANDIDATES = [{"lr": 1e-3}, {"lr": 1e-2}]


def judge_rounds(
    images,
    folder,
    counts=(4, None),
    method=None,
    steps=(1, 2),
    trainable="encoder",
    stream=None,
    workers=0,
    on_images=lambda _count: None,
    candidates=CANDIDATES,
):
    network, statistics = networks.source_statistics("resnet", torch.float32)

    def build(values):
        loop = InnerLoop(steps=2, clip=1.0, trainable=trainable, **values)
        return Task(network, method or ActMAD(), loop, statistics)

    rounds = Rounds(images, counts, [3], 0, stream)
    grid, machine = Grid(candidates, steps, 0), Machine(workers=workers, images_per_step=4)
    with Work(folder) as work:
        judge = Judge(rounds, grid, build, work, "run", machine, on_images)
        return [judge(turn, [0, 1]) for turn in range(len(counts))]


def test_a_gate_is_timed_with_the_candidates_own_number_of_steps(images, monkeypatch):
    timed = []
    monkeypatch.setattr(tuning, "saves_time", lambda task, *_: not timed.append(task.loop))
    judge = Judge(
        Rounds(images, (None,), [3], 0),
        Grid([{"lr": 0.1}], (2, 9), 0),
        lambda values: Task(None, ActMAD(), InnerLoop(steps=9, lr=values["lr"])),
        work=None,
        prefix="run",
    )
    assert judge.saves_time({"lr": 0.1, "steps": 2}, Gate("distance", 1.0))
    assert timed == [InnerLoop(steps=2, lr=0.1)]


def assert_same(actual: Outcome, expected: Outcome) -> None:
    for name in ("image", "corruption", "source", "adapted"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
    for name, values in actual.signals.items():
        np.testing.assert_allclose(values, expected.signals[name], rtol=1e-5)


def by_image(found: Outcome) -> Outcome:
    """Sort the rows by image and corruption."""
    order = np.lexsort((found.corruption, found.image))
    columns = {name: getattr(found, name)[order] for name in ("image", "corruption", "source")}
    signals = {name: values[order] for name, values in found.signals.items()}
    return Outcome(
        **columns, adapted=found.adapted[order], signals=signals, milliseconds=found.milliseconds
    )


def test_an_outcome_is_what_the_adapter_gives_on_the_held_out_corruptions(images, tmp_path):
    candidates = [{"lr": 1e-2}, {"lr": 1e-1}]
    options = {"counts": (None,), "candidates": candidates}
    actual = judge_rounds(images, tmp_path / "work", **options)[0][1]
    network, statistics = networks.source_statistics("resnet", torch.float32)
    labels, loop = torch.from_numpy(images.labels), InnerLoop(steps=2, clip=1.0, lr=1e-1)
    changed = 0
    for index, shift in enumerate(tuning.held_out_shifts([3])):
        pixels = torch.from_numpy(shift.apply(images, 0)).permute(0, 3, 1, 2).float() / 255
        expected = adapt(
            network,
            pixels,
            ActMAD(),
            loop,
            statistics=statistics,
            image_ids=images.image_ids,
            record=(1, 2),
        )
        part = slice(8 * index, 8 * index + 8)
        right = expected.logits_at.argmax(-1) == labels[:, None]
        sure = networks.sure(expected.logits_at)
        np.testing.assert_array_equal(actual.adapted[part][sure], right[sure])
        assert sure.float().mean() > 0.7
        right = expected.source_logits.argmax(-1) == labels
        sure = networks.sure(expected.source_logits)
        np.testing.assert_array_equal(actual.source[part][sure], right[sure])
        changed += (actual.adapted[part] != actual.source[part][:, None]).sum(0)
        corruption = HELD_OUT.index(shift.corruption) if shift.severity else -1
        np.testing.assert_array_equal(actual.corruption[part], corruption)
    np.testing.assert_allclose(actual.signals["loss"][-8:], expected.losses[:, 0], rtol=1e-4)
    assert (changed > 3).all()


def test_the_seed_draws_the_images_that_are_judged_on(images):
    first, again, other = (Rounds(images, (4,), [3], seed).subset(4) for seed in (3, 3, 5))
    ids, labels = images.image_ids, images.labels
    np.testing.assert_array_equal(first, balanced_subset(ids, labels, 4, 3, "tune"))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)


def test_later_rounds_add_images_and_repeat_none(images, tmp_path, monkeypatch):
    whole = judge_rounds(images, tmp_path / "whole", counts=(None,))[0]
    sizes = []

    def counting(network, pixels, *arguments, **settings):
        sizes.append(len(pixels))
        return adapt(network, pixels, *arguments, **settings)

    monkeypatch.setattr(jobs, "adapt", counting)
    first, second = judge_rounds(images, tmp_path / "rounds")
    assert sizes == [4] * 10 + [4] * 10
    assert len(first[0].clean) == 4 * 5
    for number in (0, 1):
        assert_same(by_image(second[number]), by_image(whole[number]))


FLIPPING = [{"lr": 1e-3}, {"lr": 1.0}]  # along a stream the second changes predictions
STREAMED = {"method": TENT(), "steps": (0,), "trainable": "norm", "candidates": FLIPPING}


def test_on_streams_the_predictions_after_all_steps_are_judged(images, tmp_path):
    stream = Stream(2)
    actual = judge_rounds(images, tmp_path / "work", (None,), stream=stream, **STREAMED)[0][1]
    network, statistics = networks.source_statistics("resnet", torch.float32)
    shift = tuning.held_out_shifts([3])[-1]
    arrived = stream.arrange(images.labels, 0, f"{shift.name}-0")
    expected = adapt_stream(
        network,
        as_images(torch.from_numpy(shift.apply(images, 0)[arrived])),
        TENT(),
        InnerLoop(steps=2, clip=1.0, trainable="norm", lr=1.0),
        batch_size=2,
        statistics=statistics,
    )
    rows, sure = slice(len(actual.image) - 8, None), networks.sure(expected.logits)
    right = expected.logits.argmax(1).numpy() == images.labels[arrived]
    np.testing.assert_array_equal(actual.adapted[rows, 0][arrived][sure], right[sure])
    assert (actual.adapted[rows, 0] != actual.source[rows]).any()


@pytest.mark.slow
@pytest.mark.parametrize("shifts", ["separate", "continual"])
def test_on_streams_every_round_begins_anew_with_all_its_images(images, tmp_path, shifts):
    """The last round equals one stream over all images."""
    stream = Stream(2, shifts=shifts)
    rounds, alone = (
        judge_rounds(images, tmp_path / str(len(counts)), counts, stream=stream, **STREAMED)[-1]
        for counts in ((4, None), (None,))
    )
    for number in (0, 1):
        assert_same(rounds[number], alone[number])
        assert len(rounds[number].clean) == 8 * 5
    network, statistics = networks.source_statistics("resnet", torch.float32)
    held_out = [Block(shift, 0, range(8)) for shift in tuning.held_out_shifts([3])[1:]]
    (job,) = [
        job
        for job in list_jobs(held_out, stream)
        if job.blocks[-1].shift.corruption == HELD_OUT[-1]
    ]
    loop = InnerLoop(steps=2, clip=1.0, trainable="norm", **FLIPPING[1])
    task = Task(network, TENT(), loop, statistics)
    results = adapt_to_job(Experiment(task, images, stream, record=(2,)), job, Groups())
    assert len(results) == (4 if shifts == "continual" else 1)
    right = results[job.blocks[-1].shift]["adapted_prediction"].numpy() == images.labels
    np.testing.assert_array_equal(rounds[1].adapted[-8:, 0], right)
    assert (rounds[1].adapted[-8:, 0] != rounds[1].source[-8:]).any()


@pytest.mark.slow
def test_a_killed_tuning_goes_on_where_it_was(images, tmp_path, monkeypatch):
    whole = judge_rounds(images, tmp_path / "whole")
    calls = []

    def dying(*arguments, **settings):
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return adapt(*arguments, **settings)

    monkeypatch.setattr(jobs, "adapt", dying)
    with pytest.raises(KeyboardInterrupt):
        judge_rounds(images, tmp_path / "killed")
    done = []
    resumed = judge_rounds(images, tmp_path / "killed", on_images=done.append)
    assert len(calls) == 20 + 1
    assert sum(done) == 20 * 4
    for expected, actual in zip(whole, resumed, strict=True):
        for number in (0, 1):
            assert_same(actual[number], expected[number])


@pytest.mark.slow
def test_workers_change_nothing(images, tmp_path):
    alone = judge_rounds(images, tmp_path / "a")
    together = judge_rounds(images, tmp_path / "b", workers=2)
    for expected, actual in zip(alone, together, strict=True):
        for number in (0, 1):
            assert_same(actual[number], expected[number])


def test_the_work_ahead_is_counted():
    pairs = tuning.pairs_to_judge(8, 100, (10, 40, None), (3, 5), 0.25)
    assert pairs == (8 * 10 + 3 * 30 + 2 * 60) * 9
    pairs = tuning.pairs_to_judge(8, 20, (10, 40), (3,), 0.5)
    assert pairs == (8 * 10 + 5 * 10) * 5
    pairs = tuning.pairs_to_judge(8, 100, (10, 40, None), (3, 5), 0.25, anew=True)
    assert pairs == (8 * 10 + 3 * 40 + 2 * 100) * 9
