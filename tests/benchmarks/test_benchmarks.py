"""All benchmarks at their smallest size: they run and report what they measure."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from scipy import stats

from benchmarks import coverage, resident, scaling, serving, torch_ttt_engines
from benchmarks.amount import SMOKE
from benchmarks.cases import list_cases, statistics_for
from benchmarks.memory import peak_bytes
from benchmarks.sides import ours, peer, state_bytes
from tests.helpers import networks, served
from tools.stage_code import ROOT
from tttlab.config.values import CORRUPTIONS
from tttlab.runtime.group_size import GroupSize

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
CASES = {case.name: case for case in list_cases(CPU)}
SIDES = ("ours", "floor", "peer")


def run_module(*command, cwd, **environment) -> subprocess.CompletedProcess:
    path = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=os.environ | path | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_png(path) -> None:
    with PIL.Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The command of `make bench` on small photographs: (its output, its report, the folder)."""
    folder = tmp_path_factory.mktemp("smoke")
    for number, image in enumerate(networks.images(40).mul(255).byte().permute(0, 2, 3, 1).numpy()):
        file = folder / "cifar10" / "test" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).resize((32, 32)).save(file)
    finished = run_module(
        "benchmarks", "--smoke", cwd=folder, TTTLAB_DATA=str(folder), OMP_NUM_THREADS="1"
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""  # the profiler's log is silenced
    report = json.loads((folder / "outputs" / "smoke" / "benchmarks.json").read_text())
    return finished.stdout, report, folder


def test_every_case_is_timed_on_all_sides_and_its_ratios_are_those_of_the_times(smoke):
    printed, report, folder = smoke
    rows = report["rows"]
    assert [row["name"] for row in rows] == list(CASES)
    for row in rows:
        size = row["images"], row["steps"], row["views"]
        assert size == (SMOKE.images, SMOKE.steps, CASES[row["name"]].views)
        floors = row["floor_arithmetic_seconds"], row["floor_memory_seconds"]
        assert row["floor_seconds"] == max(floors)
        assert all(0 < row[f"{side}_seconds"] < 60 for side in SIDES)
        for ratio, sides in (
            ("ours_over_floor", ("ours", "floor")),
            ("peer_over_ours", ("peer", "ours")),
        ):
            low, high = row[f"{ratio}_range"]
            assert 0 < low <= row[ratio] <= high < 1000
            assert row[ratio] == pytest.approx((low + high) / 2)  # the median of two repeats
            above, below = (row[f"{side}_seconds"] for side in sides)
            # Medians of two values are means, and their ratio lies between the two ratios.
            assert low * (1 - 1e-9) <= above / below <= high * (1 + 1e-9)
        assert row["largest_logit_difference"] < 1e-4
        assert row["name"] in printed
    assert_png(folder / "outputs" / "smoke" / "benchmarks.png")
    assert report["machine"]["threads"] == 1
    assert report["machine"]["benchmark_seconds"] > 0


@pytest.mark.parametrize("name", [*list(CASES)[-4:], "resnet/views1/norm", "vit/views8/all"])
def test_ours_and_the_peers_way_give_the_same_logits(name):
    """In double precision; the steps move the predictions a thousand times the tolerance."""
    case = replace(CASES[name].within(SMOKE), images=3, peer_images=3)
    torch.manual_seed(0)
    network = case.build(case.size).double()
    images = torch.rand(3, 3, case.size, case.size, dtype=torch.float64)
    statistics = statistics_for(network.float(), case.size)
    statistics = {key: value.double() for key, value in statistics.items()}
    network.double()
    logits = ours(case, network, images, statistics, GroupSize(2))
    expected = peer(case, network, images, statistics)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    with torch.no_grad():
        assert (logits - network(images).logits).abs().max() > 1e-6


def test_memory_is_near_what_a_group_must_hold(smoke):
    rows = {row["name"]: row for row in smoke[1]["memory"]}
    assert list(rows) == [name for name in CASES if "views8" in name]
    for name, row in rows.items():
        case, mebibyte = CASES[name], 2**20
        weights = row["group"] * 2 * state_bytes(case, case.build(case.size)) / mebibyte
        assert row["group"] == SMOKE.images
        assert weights < row["model_mb"]
        assert row["ratio"] == pytest.approx(row["peak_mb"] / row["model_mb"])
        assert 0.8 < row["ratio"] < 1.5
        assert 0.5 * row["model_mb"] < row["ordinary_mb"] < 2 * row["model_mb"]


def test_the_peak_is_of_what_is_held_together():
    kept = []

    def allocate(mebibytes: int) -> torch.Tensor:
        return torch.empty(mebibytes * 2**20, dtype=torch.uint8)

    def hold() -> None:
        first, second = allocate(4), allocate(8)
        del first
        third = allocate(1)
        del second, third
        kept[:] = [allocate(1)]

    assert peak_bytes(hold, CPU) == 12 * 2**20


def test_cost_is_measured_along_every_sweep(smoke):
    table = pd.DataFrame(smoke[1]["scaling"])
    assert (table["seconds"] > 0).all()
    values = table.groupby("sweep", sort=False)["value"].agg(list).to_dict()
    assert list(values) == list(scaling.SWEEPS)
    assert values["images"] == values["views"] == values["steps"] == [1, 2]
    encoder = scaling.resnet(32).encoder
    last_stage, two_stages = values["parameters"]
    assert last_stage == sum(value.numel() for value in encoder.layer4.parameters()) / 1000
    more = sum(value.numel() for value in encoder.layer3.parameters()) / 1000
    assert two_stages == last_stage + more


def test_photographs_are_decoded_corrupted_augmented_and_trained_on(smoke):
    rows = {row["what"]: row for row in smoke[1]["data"]}
    count = SMOKE.photographs
    assert {name: row["images"] for name, row in rows.items()} == {
        "decode PNG files": count,
        "corrupt, all 15 types": 15 * count,
        **{f"corrupt, {name}": count for name in CORRUPTIONS},
        "augment, two SimCLR views": count,
        "train SimCLR on them, small ResNet": 10 * count,
    }
    assert all(0 < row["seconds"] < 60 for row in rows.values())


def test_every_engine_of_torch_ttt_is_timed_or_has_its_reason(smoke):
    printed, report, _ = smoke
    if not torch_ttt_engines.available():
        assert report["torch_ttt"] == []
        assert "torch-ttt is not installed: left out (make bench installs it)" in printed
        pytest.skip("torch-ttt is not installed")
    names = [
        *(build.__name__ for build in torch_ttt_engines.BUILDERS),
        *torch_ttt_engines.IMPOSSIBLE,
    ]
    assert [(row["network"], row["engine"]) for row in report["torch_ttt"]] == [
        (network, name) for network in ("resnet", "vit") for name in names
    ]
    timed = [row for row in report["torch_ttt"] if "why_not" not in row]
    assert len(timed) == 5 + 4
    for row in timed:
        assert row["theirs_over_ours"] == pytest.approx(
            row["theirs_ms_per_image"] / row["ours_ms_per_image"]
        )
        assert 0 < row["theirs_over_ours"] < 1000


def test_the_coverage_of_every_interval_is_simulated(tmp_path, monkeypatch, capsys):
    """A correct simulation with a random seed would miss the bounds once in ten thousand runs."""
    monkeypatch.chdir(tmp_path)
    coverage.main(["--smoke"])
    table = pd.read_csv(tmp_path / "outputs" / "smoke" / "coverage.csv")
    cases = [case for case in coverage.list_cases() if case.images <= 100]
    assert len(table) == 4 * len(cases)
    columns = ["population", "images", "shifts", "seeds", "seed_effect"]
    assert set(table[columns].itertuples(index=False, name=None)) == {
        tuple(vars(case).values()) for case in cases
    }
    assert (table["low"] <= table["coverage"]).all()
    assert (table["coverage"] <= table["high"]).all()
    assert (table["width"] > 0).all()
    reported = table.loc[table["method"] == "reported", "coverage"]
    fewest_covered = stats.binom.ppf(1e-4 / len(reported), SMOKE.data_sets, 0.93)
    assert reported.min() >= fewest_covered / SMOKE.data_sets
    assert 0.94 < reported.median() < 0.99
    lowest = table.groupby(["method", table["seeds"] > 1])["coverage"].min()
    assert lowest["percentile bootstrap", False] < 0.3  # where flips are rare
    assert lowest["percentile, images", True] < 0.6  # where seeds differ
    assert f"{SMOKE.data_sets} data sets per case" in capsys.readouterr().out
    assert_png(tmp_path / "outputs" / "smoke" / "coverage.png")


@pytest.mark.parametrize("name", resident.PASSES)
def test_every_pass_whose_memory_is_told_can_be_done(name):
    resident.PASSES[name][1](resident.network("resnet18", 32), resident.image_set(3, 32))


def test_the_resident_set_is_that_of_a_process_of_its_own():
    finished = run_module("benchmarks.resident", "nothing", cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    name, count, _, peak, unit, *_ = finished.stdout.split()
    assert (name, count, unit) == ("nothing", "1", "GiB")
    assert 0.1 < float(peak) < 3  # PyTorch itself, and 90 MB of weights


def test_a_server_is_loaded_and_every_answer_compared(tmp_path):
    folder = served.written(tmp_path)
    PIL.Image.new("RGB", (16, 16), (90, 30, 200)).save(folder / "example.png")
    done = run_module("benchmarks.serving", "--folder", str(folder), "--smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "outputs" / "smoke" / "serving.json").read_text())
    assert [row["name"] for row in rows] == [case.name for case in serving.CASES]
    for row in rows:
        assert (row["requests"], row["lost"], row["mixed_up"]) == (SMOKE.requests, 0, 0)
        assert row["largest_difference"] < serving.TOLERANCE
        assert row["images_per_second"] > 0
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["memory_mb"] > 100
        assert row["name"] in done.stdout


def test_what_is_lost_or_mixed_up_is_found():
    alone = [np.array([0.9, 0.1]), np.array([0.4, 0.6]), np.array([0.45, 0.55])]
    right = {number: alone[number % 3] + 1e-7 for number in range(9)}
    found = serving.compare(right, alone, 9)
    assert (found["lost"], found["mixed_up"]) == (0, 0)
    assert found["largest_difference"] == pytest.approx(1e-7, rel=1e-3)
    assert found["closest_images"] == pytest.approx(0.05)
    wrong = right | {4: None, 7: alone[2]}  # image 1 was asked for
    del wrong[8]
    found = serving.compare(wrong, alone, 9)
    assert (found["lost"], found["mixed_up"]) == (2, 1)
    assert found["largest_difference"] == pytest.approx(0.05)
