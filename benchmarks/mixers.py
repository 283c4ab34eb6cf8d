"""Times token mixers against the number of tokens, and TTT layers beside their matrix products.

``python -m benchmarks.mixers`` writes ``outputs/benchmarks_mixers.json`` and a figure, and prints
rows. A layer is all that stands in attention's place, its learned maps included; an inner loop is
what a TTT layer does between them. Both are timed as they answer (no gradients) and as they are
trained (a forward and a backward pass).
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import machine, spread
from benchmarks.amount import FULL, SMOKE, Amount
from benchmarks.memory import peak_bytes
from benchmarks.sides import interleaved
from tttlab.config.mixers import InnerTraining
from tttlab.errors import one_line
from tttlab.mixers.linear_attention import LinearAttention
from tttlab.mixers.token_mixer import TokenMixer
from tttlab.mixers.ttt_conv import TTTConv, convolve
from tttlab.mixers.ttt_linear import TTTLinear
from tttlab.mixers.ttt_mlp import TTTMLP
from tttlab.reporting.plots import LIGHT
from tttlab.runtime.allocator import keep_freed_memory
from tttlab.runtime.devices import choose_device

DIM, HEADS = 192, 3  # of ViT-Ti
WIDTH = DIM // HEADS
SIDES = (4, 6, 8, 12, 16, 24, 32)  # of the grid of patches: 16 to 1,024 tokens
TOKENS = 8192  # of all images of a point together
MIXERS = ("attention", "linear_attention", "ttt_linear", "ttt_mlp", "ttt_conv")
TTT = MIXERS[2:]
MODES = ("answering", "training")


@one_line()
def main() -> None:
    """Run all points."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixers", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--smoke", action="store_true", help="next to nothing of all, into outputs/smoke"
    )
    arguments = parser.parse_args()
    amount = SMOKE if arguments.smoke else FULL
    device = choose_device(arguments.device, key="--device")
    keep_freed_memory()  # as every stage of the pipeline does
    report = {"machine": machine(device), "dim": DIM, "heads": HEADS, "layers": [], "loops": []}
    print("  ".join(f"{key}: {value}" for key, value in report["machine"].items()))
    for side in SIDES[: amount.points]:
        report["layers"] += measure_layers(side, device, amount)
        report["loops"] += measure_loops(side, device, amount)
    write(report, Path("outputs/smoke" if arguments.smoke else "outputs"))


def build(name: str, side: int) -> nn.Module:
    """Make a layer for a square grid, without class token."""
    if name == "attention":
        return Attention(DIM, HEADS, qkv_bias=True)
    inner = InnerTraining()
    rules: dict[str, Callable[[], nn.Module]] = {
        "linear_attention": LinearAttention,
        "ttt_linear": lambda: TTTLinear(HEADS, WIDTH, inner),
        "ttt_mlp": lambda: TTTMLP(HEADS, WIDTH, inner),
        "ttt_conv": lambda: TTTConv(HEADS, WIDTH, (side, side), inner),
    }
    return TokenMixer(DIM, HEADS, rules[name]())


def measure_layers(side: int, device: torch.device, amount: Amount = FULL) -> list[dict]:
    """Time every mixer, count its operations, and measure its peak memory at one grid."""
    torch.manual_seed(0)
    tokens = side * side
    count = max(1, min(TOKENS // tokens, amount.images))
    layers = {name: build(name, side).to(device) for name in MIXERS}
    x = torch.randn(count, tokens, DIM, device=device)
    rows = []
    for mode in MODES:
        calls = {name: call(mode, layer, x) for name, layer in layers.items()}
        times = timed(calls, amount, device)
        for name in MIXERS:
            row = {"mixer": name, "mode": mode, "tokens": tokens, "images": count}
            row["seconds"] = statistics.median(times[name])
            row["operations"] = operations(name, side, mode)
            row["peak_mb"] = peak_bytes(calls[name], device) / count / 2**20
            row |= spread("over_attention", times[name], times["attention"])
            rows.append(row)
            print(layer_line(row), flush=True)
    return rows


def measure_loops(side: int, device: torch.device, amount: Amount = FULL) -> list[dict]:
    """Time every inner loop beside the arithmetic of its matrix products at one grid."""
    torch.manual_seed(0)
    tokens = side * side
    count = max(1, min(TOKENS // tokens, amount.images))
    parts = [torch.randn(count, HEADS, tokens, WIDTH, device=device) for _ in range(3)]
    rows = []
    for name in TTT:
        rule = build(name, side).rule.to(device)
        bare = partial(PRODUCTS[name], own_weights(rule, count))
        for mode in MODES:
            sides = {"loop": call(mode, rule, *parts), "products": call(mode, bare, *parts[::2])}
            times = timed(sides, amount, device)
            row = {"mixer": name, "mode": mode, "tokens": tokens, "images": count}
            row |= {f"{key}_seconds": statistics.median(value) for key, value in times.items()}
            row |= spread("loop_over_products", times["loop"], times["products"])
            rows.append(row)
            print(loop_line(row), flush=True)
    return rows


def call(mode: str, layer: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """Make the call that is timed: an answer, or a forward and a backward pass."""

    def answer() -> None:
        with torch.no_grad():
            layer(*inputs)

    def train() -> None:
        leaves = [value.detach().requires_grad_() for value in inputs]
        layer(*leaves).sum().backward()

    return answer if mode == "answering" else train


def timed(
    calls: dict[str, Callable[[], None]], amount: Amount, device: torch.device
) -> dict[str, list[float]]:
    """Warm all sides up, then time them in turn."""
    for function in calls.values():
        function()
    return interleaved(calls, amount.repeats, device)


def operations(name: str, side: int, mode: str) -> int:
    """Count the operations of an image, two for a product and its sum, without computing."""
    layer = build(name, side).to("meta")
    counter = FlopCounterMode(display=False)
    with counter:
        call(mode, layer, torch.empty(1, side * side, DIM, device="meta"))()
    return counter.get_total_flops()


# --- matrix products alone ------------------------------------------------------------------------


def own_weights(rule: nn.Module, count: int) -> dict[str, Tensor]:
    """Copy the matrices of an inner model for every image: ``(N, H, …)``."""
    return {
        name: value.detach().repeat(count, *[1] * value.ndim).requires_grad_()
        for name, value in rule.initial().items()
        if not name.startswith("bias")
    }


def linear_products(weights: dict[str, Tensor], keys: Tensor, queries: Tensor) -> Tensor:
    """Multiply what TTT-Linear multiplies: outputs, gradient, answers."""
    outputs = keys @ weights["weight"]
    return queries @ (keys.mT @ outputs)


def mlp_products(weights: dict[str, Tensor], keys: Tensor, queries: Tensor) -> Tensor:
    """Multiply what TTT-MLP multiplies: both layers, back through one, two gradients, answers."""
    hidden = keys @ weights["weight_1"]
    outputs = hidden @ weights["weight_2"]
    back = outputs @ weights["weight_2"].mT
    return (queries @ (keys.mT @ back)) @ (hidden.mT @ outputs)


def conv_products(weights: dict[str, Tensor], keys: Tensor, queries: Tensor) -> Tensor:
    """Convolve what TTT-Conv convolves: outputs, gradient, answers, from and to tokens."""
    side = round(keys.shape[-2] ** 0.5)
    grid = [value.mT.unflatten(-1, (side, side)) for value in (keys, queries)]
    outputs = convolve(grid[0], weights["weight"])
    return convolve(grid[1], convolve(grid[0], outputs)).flatten(-2).mT


PRODUCTS = {"ttt_linear": linear_products, "ttt_mlp": mlp_products, "ttt_conv": conv_products}


# --- what is told ---------------------------------------------------------------------------------


def layer_line(row: dict) -> str:
    """Format a row of a layer."""
    low, high = row["over_attention_range"]
    return (
        f"{row['mixer']:17}{row['mode']:10}{row['tokens']:5} tokens  "
        f"{row['seconds'] / row['images'] * 1e3:8.3f} ms  {row['operations'] / 1e6:8.1f} MFLOP  "
        f"peak {row['peak_mb']:7.2f} MiB per image   "
        f"{row['over_attention']:.2f} × attention ({low:.2f}–{high:.2f})"
    )


def loop_line(row: dict) -> str:
    """Format a row of an inner loop."""
    low, high = row["loop_over_products_range"]
    return (
        f"{row['mixer']:17}{row['mode']:10}{row['tokens']:5} tokens  inner loop ÷ its products "
        f"{row['loop_over_products']:.2f} ({low:.2f}–{high:.2f})"
    )


def draw(report: dict) -> Figure:
    """Draw time and operations of a layer against the number of tokens."""
    rows = pd.DataFrame(report["layers"])
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (mode, column, unit, label) in zip(
        panels,
        (
            ("answering", "seconds", 1e3, "answering, ms per image"),
            ("training", "seconds", 1e3, "training, ms per image"),
            ("answering", "operations", 1e-6, "answering, MFLOP per image"),
        ),
        strict=True,
    ):
        for name, colour in zip(MIXERS, LIGHT, strict=False):
            part = rows[(rows["mixer"] == name) & (rows["mode"] == mode)]
            value = part[column] / (part["images"] if column == "seconds" else 1) * unit
            axes.plot(part["tokens"], value, "o-", color=colour, markersize=3, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(shown := sorted(set(rows["tokens"]))[::2], labels=map(str, shown))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens")
        axes.set_title(label, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def write(report: dict, folder: Path) -> None:
    """Write the numbers, and a figure of them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "benchmarks_mixers.json"
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report).savefig(folder / "benchmarks_mixers.png", dpi=130)
    print(file)


if __name__ == "__main__":
    main()
