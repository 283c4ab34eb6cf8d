"""The benchmark of ARC: its sides train alike, and its operations are those counted by hand."""

import json

import pytest
import torch

from benchmarks import arc_operations
from benchmarks.amount import SMOKE
from benchmarks.arc_sides import Case, one_by_one, ours
from tests.arc import tiny
from tests.benchmarks.test_benchmarks import run_module
from tools.stage_code import ROOT
from tttlab.arc import building
from tttlab.arc.canvas import SYMBOLS, Canvas
from tttlab.arc.settings import read_settings
from tttlab.arc.solving import list_jobs
from tttlab.config.inner_loop import Annealed
from tttlab.runtime.group_size import Groups

pytestmark = pytest.mark.slow

TASKS = [tiny.random_task(seed, 2 + seed % 2) for seed in range(5)]


def case(clip: float) -> Case:
    """Make a case in double precision."""
    return Case(
        tiny.network(3),
        list_jobs(TASKS, 3),
        {task.name: tiny.auxiliaries(number) for number, task in enumerate(TASKS)},
        Annealed(steps=3, optimizer="adam", lr=1e-2, warmup=1, clip=clip, trainable="all"),
        pairs=4,
        side=tiny.SIDE,
        seed=3,
        device=torch.device("cpu"),
    )


# PyTorch's own clipping, which the loops use, adds 1e-6 to the norm.
@pytest.mark.parametrize(("clip", "tolerance"), [(1e9, 1e-10), (0.1, 1e-6)])
def test_ours_and_both_loops_train_alike(clip, tolerance):
    """The losses before the first, second and third step."""
    sides = case(clip)
    mine = ours(sides, Groups(2), workers=1)
    whole, left_out = (one_by_one(sides, whole) for whole in (True, False))
    assert mine.keys() == whole.keys() == left_out.keys() == {task.name for task in TASKS}
    for name, losses in mine.items():
        torch.testing.assert_close(left_out[name], whole[name], rtol=1e-10, atol=0)
        torch.testing.assert_close(losses[:-1], whole[name], rtol=tolerance, atol=0)
        assert losses[:-1].diff().abs().min() > 1e-3


def test_worker_processes_change_nothing():
    sides = case(0.1)
    alone, shared = (ours(sides, Groups(2), workers) for workers in (0, 2))
    for name, losses in alone.items():
        torch.testing.assert_close(shared[name], losses, rtol=1e-10, atol=0)


@pytest.mark.parametrize("patch", [1, 2])
def test_operations_are_those_counted_by_hand(patch):
    """Two for a product and its sum; twice as many backward as forward, for both factors."""
    width, depth, heads, mlp = 16, 3, 2, 24
    sizes = {"width": width, "depth": depth, "heads": heads, "mlp": mlp}
    canvas = Canvas(side=12, patch=patch, largest_scale=1)
    forward, training = arc_operations.counts(tiny.network(1, canvas, **sizes))
    for length in (1, 5, canvas.tokens):
        tokens, pixels = length + 1, patch**2  # the task's token is one more
        in_block = width * 3 * width + width * width + 2 * width * mlp  # qkv, proj, MLP
        linear = depth * tokens * in_block + length * width * SYMBOLS * pixels
        if patch > 1:
            linear += length * pixels * width * width
        attention = depth * 2 * tokens**2 * width  # over all heads
        assert forward(length) == 2 * (linear + attention)
        assert training(length) == 3 * forward(length)


def test_the_published_network_has_the_published_operations():
    """Its 28 G of a forward pass are multiply-adds (Hu et al. 2025, arXiv 2511.14761)."""
    settings = read_settings(ROOT / "arc" / "settings" / "full.yaml")
    network = building.build(settings, 1)
    forward, _ = arc_operations.counts(network)
    assert forward(network.canvas.tokens) / 2 == pytest.approx(28e9, rel=0.02)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Both commands at their smallest: (what they print, the speeds, the operations)."""
    folder, params = tmp_path_factory.mktemp("arc"), str(ROOT / "arc" / "params.yaml")
    command = ("benchmarks.arc", "--smoke", "--params", params)
    printed = []
    for more in ((), ("--operations",)):
        done = run_module(*command, *more, cwd=folder, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    found = [
        json.loads((folder / "outputs" / "smoke" / f"{name}_arc.json").read_text(encoding="utf-8"))
        for name in ("benchmarks", "operations")
    ]
    return printed, *found


def test_every_side_is_timed_and_the_ratios_are_those_of_the_times(smoke):
    printed, speeds, _ = smoke
    assert (speeds["tasks"], speeds["steps"]) == (SMOKE.images, SMOKE.steps)
    rows = {row["side"]: row for row in speeds["rows"]}
    assert list(rows) == ["ours", "whole", "left_out"]
    pairs = speeds["tasks"] * speeds["steps"] * speeds["pairs"]
    for row in rows.values():
        assert 0 < row["seconds"] < 60
        assert row["ms_per_pair"] == pytest.approx(row["seconds"] * 1e3 / pairs)
        assert f"{row['ms_per_pair']:.3f} ms per pair" in printed[0]
    for side in ("whole", "left_out"):
        low, high = speeds[f"{side}_over_ours_range"]
        assert low <= speeds[f"{side}_over_ours"] <= high
        # Medians of two values are means, and their ratio lies between the two ratios.
        ratio = rows[side]["seconds"] / rows["ours"]["seconds"]
        assert low * (1 - 1e-9) <= ratio <= high * (1 + 1e-9)
    assert speeds["largest_loss_difference"] < 1e-4


def test_the_totals_are_those_of_the_pairs(smoke):
    printed, _, operations = smoke
    settings = read_settings(ROOT / "arc" / "params.yaml")
    rows = [row["operations"] for row in operations["rows"]]
    forward, training, offline, test_time, all_offline, one_task, all_tasks, predicting = rows
    run, kinds = settings.adapt.run("all"), len(settings.auxiliary.kinds)
    # Of the 77 evaluation tasks within 10 × 10, with 88 questions; 777 pairs of training tasks.
    assert settings.tasks.largest == 10
    tasks = settings.tasks.count or 77
    assert training == 3 * forward
    assert offline < training
    assert test_time < training
    assert one_task == pytest.approx(run.steps * run.pairs * test_time)
    assert all_tasks == pytest.approx(tasks * one_task)
    views = (1 + kinds * settings.auxiliary.test_time) * run.placements
    assert predicting == pytest.approx(tasks * 88 / 77 * views * forward)
    pairs = 777 * (1 + kinds * settings.auxiliary.offline)
    pairs += settings.invented.tasks * settings.invented.pairs
    assert all_offline == pytest.approx(settings.train.epochs * pairs * offline)
    for row in operations["rows"]:
        hours = row["operations"] / (operations["utilisation"] * operations["peak"]) / 3600
        assert row["hours"] == pytest.approx(hours)
        assert row["what"] in printed[1]
