"""The benchmark of token mixers: its operations are those counted by hand, its sides comparable."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.amount import SMOKE
from benchmarks.mixers import (
    DIM,
    HEADS,
    MIXERS,
    MODES,
    PRODUCTS,
    SIDES,
    TTT,
    WIDTH,
    build,
    operations,
    own_weights,
)
from tests.benchmarks.test_benchmarks import assert_png, run_module

MAPS = 4 * DIM * DIM  # multiply-adds of a token: query, key, target and output


def by_hand(name: str, tokens: int) -> int:
    """Multiply-adds of a layer's answers, over all heads."""
    between = {
        "attention": 2 * tokens**2 * DIM,
        # A key and its value make a matrix, which a query asks; elu's weights are summed, too.
        "linear_attention": 2 * tokens * DIM * WIDTH + tokens * DIM,
        "ttt_linear": 3 * tokens * DIM * WIDTH,
        "ttt_mlp": 7 * tokens * DIM * 4 * WIDTH,
        "ttt_conv": 3 * tokens * DIM * 9,
    }
    return tokens * MAPS + between[name]


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("side", [4, 8])
def test_operations_are_those_counted_by_hand(name, side):
    assert operations(name, side, "answering") == 2 * by_hand(name, side**2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TTT)
def test_the_products_are_those_of_the_inner_loop(name, mode):
    """As many operations; in training, the loop's own first weights are shared by all images."""
    rule, parts = build(name, 4).rule, [torch.randn(2, HEADS, 16, WIDTH) for _ in range(3)]
    weights = own_weights(rule, 2)
    counts = []
    for function in (rule, lambda keys, _, queries: PRODUCTS[name](weights, keys, queries)):
        counter = FlopCounterMode(display=False)
        with counter:
            outputs = function(*(part.requires_grad_(mode == "training") for part in parts))
            if mode == "training":
                outputs.sum().backward()
        assert outputs.shape == parts[0].shape
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_every_mixer_is_timed_and_the_ratios_are_those_of_the_times(tmp_path):
    done = run_module("benchmarks.mixers", "--smoke", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "smoke"
    report = json.loads((folder / "benchmarks_mixers.json").read_text(encoding="utf-8"))
    grids = SIDES[: SMOKE.points]
    layers, loops = report["layers"], report["loops"]
    assert len(layers) == len(grids) * len(MODES) * len(MIXERS)
    assert len(loops) == len(grids) * len(MODES) * len(TTT)
    assert {row["tokens"] for row in layers} == {side**2 for side in grids}
    attention = {(row["tokens"], row["mode"]): row for row in layers if row["mixer"] == "attention"}
    for row in layers:
        assert (row["images"], row["peak_mb"] > 0) == (SMOKE.images, True)
        ratio = row["seconds"] / attention[row["tokens"], row["mode"]]["seconds"]
        low, high = row["over_attention_range"]
        assert low * (1 - 1e-9) <= ratio <= high * (1 + 1e-9)
        assert f"{row['mixer']:17}{row['mode']}" in done.stdout
    for row in loops:
        low, high = row["loop_over_products_range"]
        assert 0 < low <= row["loop_over_products"] <= high
        ratio = row["loop_seconds"] / row["products_seconds"]
        assert low * (1 - 1e-9) <= ratio <= high * (1 + 1e-9)
    assert_png(folder / "benchmarks_mixers.png")
