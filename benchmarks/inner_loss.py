"""Inner loss and accuracy of trained networks with TTT layers, under every shift.

``python -m benchmarks.inner_loss`` reads the networks of the last execution (``outputs/``) whose
mixer trains on tokens, and asks three things: does an inner step lower the inner loss of every
layer; does a network gain by more or fewer inner steps than it was trained with; and does a smaller
inner loss go with better accuracy, from shift to shift and from image to image of one shift? It
writes ``outputs/inner_loss.csv``, a row per network, shift and number of steps,
``outputs/inner_loss.png``, and prints what came out. Labels are read: this is analysis.
"""

import argparse
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks.labeled import open_labeled
from tttlab.config.params import Params, read_params
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.errors import UserError, one_line
from tttlab.mixers.mixing import inner_losses, mixer_layers
from tttlab.networks.checkpoints import load
from tttlab.reporting.plots import LIGHT
from tttlab.shifts.shift import Shift
from tttlab.workflow import places

STEPS = (0, 1, 2, 4)
BATCH = 100  # images


@one_line()
def main() -> None:
    """Measure all networks of the last execution."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inner_loss", description=__doc__)
    parser.add_argument("--images", type=int, default=None, help="of each shift; default: all")
    arguments = parser.parse_args()
    params = read_params(Path("params.yaml"))
    rows = pd.DataFrame(measure(params, arguments.images))
    rows.to_csv(places.OUTPUTS / "inner_loss.csv", index=False)
    summary = summarise(rows)
    print(summary.to_string(index=False, float_format="%.3f"))
    draw(rows).savefig(places.OUTPUTS / "inner_loss.png", dpi=130)


def measure(params: Params, count: int | None) -> Iterator[dict]:
    """Measure every network that trains inside, under every shift and after every `STEPS`.

    Raises:
        UserError: there is none.
    """
    test, shifts = open_labeled(params, count)
    names = [name for name, model in params.models.items() if trains_inside(model.mixer)]
    if not names:
        raise UserError(
            "params.yaml: expected a model whose mixer is ttt_linear, ttt_mlp or ttt_conv, "
            "found none; run make repro PARAMS=settings/ttt_layers.yaml first"
        )
    for name in names:
        for seed in params.seeds:
            network, _ = load(places.OUTPUTS / "finetuned" / name / str(seed))
            about = {"model": name, "seed": seed}
            for shift in shifts:
                yield from (about | row for row in measure_shift(network, shift, test, params.seed))
            print(f"{name} {seed}", flush=True)


def trains_inside(mixer: object) -> bool:
    """Tell whether a mixer's settings are those of an inner training."""
    return hasattr(mixer, "inner_steps")


def measure_shift(network: nn.Module, shift: Shift, test: ImageSet, seed: int) -> Iterator[dict]:
    """Measure one network under one shift."""
    shown = shift.seen(test, seed)
    labels = np.asarray(shown.labels)
    layers = list(mixer_layers(network.encoder).values())
    trained = layers[0].rule.inner.inner_steps
    counts = sorted({*STEPS, trained})
    losses = losses_of(network, np.asarray(shown.pixels), counts[-1])  # (layers, steps, N)
    for steps in counts:
        with inner_steps(network, steps):
            correct = predict(network, np.asarray(shown.pixels)) == labels
        per_image = losses[:, steps].mean(0)
        row = {"shift": shift.name, "steps": steps, "trained_steps": trained}
        row |= {"accuracy": correct.mean(), "loss": per_image.mean()}
        row |= {f"loss_{number}": part[steps].mean() for number, part in enumerate(losses)}
        # The chance that a wrong answer has the larger loss of two: 0.5 where there is no relation.
        row["auc"] = np.nan if len(set(correct)) < 2 else roc_auc_score(~correct, per_image)
        yield row


@torch.no_grad()
def losses_of(network: nn.Module, pixels: np.ndarray, steps: int) -> np.ndarray:
    """Give the inner losses ``(layers, steps + 1, N)``, mean over heads, as the network runs."""
    parts = []
    for images in batches(pixels):
        found = inner_losses(network.encoder, lambda images=images: network(images), steps)
        parts.append(torch.stack([losses.mean(-1) for losses in found.values()]))
    return torch.cat(parts, dim=-1).numpy()


@torch.no_grad()
def predict(network: nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Give the classes ``(N,)``."""
    return torch.cat([network(images).logits.argmax(-1) for images in batches(pixels)]).numpy()


def batches(pixels: np.ndarray) -> Iterator[Tensor]:
    """Divide images among batches: ``(B, 3, S, S)`` in [0, 1]."""
    for start in range(0, len(pixels), BATCH):
        yield as_images(torch.from_numpy(np.ascontiguousarray(pixels[start : start + BATCH])))


@contextmanager
def inner_steps(network: nn.Module, count: int) -> Iterator[None]:
    """Let every layer take another number of inner steps inside the context."""
    rules = [mixer.rule for mixer in mixer_layers(network.encoder).values()]
    before = [rule.inner for rule in rules]
    try:
        for rule in rules:
            rule.inner = replace(rule.inner, inner_steps=count)
        yield
    finally:
        for rule, inner in zip(rules, before, strict=True):
            rule.inner = inner


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise every network; shifts weigh alike.

    Returns:
        ``clean_0`` to ``clean_4`` and ``shifted_0`` to ``shifted_4``: accuracy by steps;
        ``lowered``: layers whose loss on clean images falls at every further step; ``across``:
        Spearman's correlation of loss and accuracy from shift to shift; ``auc``: mean over shifts
        of what the loss says of single images. The last two are at the steps trained with.
    """
    table = []
    for (model, seed), part in rows.groupby(["model", "seed"], sort=False):
        row = {"model": model, "seed": seed}
        clean = part["shift"] == "clean"
        for name, chosen in (("clean", clean), ("shifted", ~clean)):
            means = part[chosen].groupby("steps")["accuracy"].mean()
            row |= {f"{name}_{steps}": 100 * value for steps, value in means.items()}
        along = part[clean].sort_values("steps")[layer_columns(part)]
        row["lowered"] = int((along.diff().iloc[1:] < 0).all().sum())
        as_trained = part[part["steps"] == part["trained_steps"]]
        row["across"] = spearmanr(as_trained["loss"], as_trained["accuracy"]).statistic
        row["auc"] = as_trained["auc"].mean()
        table.append(row)
    return pd.DataFrame(table)


def layer_columns(rows: pd.DataFrame) -> list[str]:
    """Name the columns of the single layers' losses that these rows have."""
    columns = [name for name in rows if name.startswith("loss_")]
    return [name for name in columns if rows[name].notna().all()]


def draw(rows: pd.DataFrame) -> Figure:
    """Draw loss and accuracy along the steps, and one against the other over shifts."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    losses, accuracies, shifts = figure.subplots(1, 3)
    for (model, part), colour in zip(
        rows.groupby("model", sort=False), itertools.cycle(LIGHT), strict=False
    ):
        clean = part["shift"] == "clean"
        draw_along(losses, part[clean], "loss", model, colour)
        draw_along(accuracies, part[~clean], "accuracy", model, colour)
        trained = part[part["steps"] == part["trained_steps"]]
        means = trained.groupby("shift")[["loss", "accuracy"]].mean()
        shifts.plot(means["loss"], 100 * means["accuracy"], "o", color=colour, markersize=3)
    for axes, title, label in (
        (losses, "inner loss, clean images", "inner steps"),
        (accuracies, "accuracy under shifts, %", "inner steps"),
        (shifts, "accuracy of a shift, %", "inner loss"),
    ):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    losses.legend(frameon=False, fontsize=8)
    return figure


def draw_along(axes: Axes, rows: pd.DataFrame, column: str, model: str, colour: str) -> None:
    """Draw a column's mean over shifts and seeds along the steps."""
    means = rows.groupby("steps")[column].mean() * (100 if column == "accuracy" else 1)
    axes.plot(means.index, means, "o-", color=colour, markersize=3, label=model)
    axes.set_xticks(list(means.index))


if __name__ == "__main__":
    main()
