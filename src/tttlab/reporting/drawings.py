"""All figures of the report with their captions: which are shown, from which tables."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pandas as pd

from tttlab.evaluation.results import Results, difference
from tttlab.evaluation.significance import LEVEL
from tttlab.reporting import pictures, plots
from tttlab.reporting.drawing import Drawing, Named, under_one_caption
from tttlab.reporting.figures.accuracy import (
    accuracy_by_severity,
    gain_and_cost,
    gain_per_corruption,
    heat_map,
)
from tttlab.reporting.figures.overview import limits_of, overview
from tttlab.reporting.figures.steps import loss_along_steps, step_curves
from tttlab.reporting.signal_drawings import (
    draw_alignment,
    draw_distance,
    draw_estimates,
    draw_reliability,
)
from tttlab.reporting.tested import Tested, sample_text
from tttlab.reporting.words import percent

ALL = "all shifts"
ALL_LABELED = "all with labels"
MADE = {  # by shifts.strength
    "own": "These are synthetic corruptions made here; they are not the files of CIFAR-10-C.",
    "cifar10_c": "These have the strengths of CIFAR-10-C, written anew; they are not its files.",
}
EMPTY: Mapping[str, Sequence[np.ndarray]] = MappingProxyType({})


def draw(
    results: Results,
    shown: Mapping[str, Sequence[np.ndarray]],
    severities: Sequence[int],
    sets: Mapping[str, Sequence[np.ndarray]] = EMPTY,
    strength: str = "own",
) -> dict[str, Drawing]:
    """Draw every figure of the report, by file name.

    Figures of accuracy are left out without labels, and those of an optional table without it.

    Args:
        results: What to draw.
        shown: From `pictures.shift_pictures`.
        severities: Severities of the pictures, which follow the clean image.
        sets: From `pictures.set_pictures`.
        strength: Whose strengths the corruptions of ``shown`` have.
    """
    drawings = {}
    if results.labeled and results.acting:
        for draw_some in (
            _overview,
            _gains,
            _severity,
            draw_distance,
            draw_estimates,
            draw_alignment,
            _cost,
            draw_reliability,
        ):
            drawings |= dict(draw_some(results))
    drawings |= dict(_steps(results))
    return drawings | dict(_examples(shown, sets, severities, strength))


def _examples(
    shown: Mapping[str, Sequence[np.ndarray]],
    sets: Mapping[str, Sequence[np.ndarray]],
    severities: Sequence[int],
    strength: str,
) -> Named:
    if shown:
        rows, title = ["clean", *map(str, severities)], "Test images under each corruption"
        caption = "One test image per corruption, clean and at every severity. " + MADE[strength]
        figure = pictures.draw_pictures(shown, rows, title)
        yield "examples", Drawing(figure, "examples", caption)
    if sets:
        rows = [""] * max(map(len, sets.values()))
        caption = "The first images of each, as they were adapted to."
        figure = pictures.draw_pictures(sets, rows, "Images that came shifted")
        yield "examples_of_sets", Drawing(figure, "examples", caption)


def _overview(results: Results) -> Named:
    styles, tested = plots.run_styles(results.runs), Tested.of(results)
    models = [model for model in results.models if results.acting_on(model)]
    tables = {model: at_a_glance(results, model) for model in models}
    limits, figures = limits_of(tables), {}
    for model, table in tables.items():
        source = percent(results.summary[model, results.runs_of(model)[0]]["accuracy_source"])
        title = f"{model}, {source} % without adaptation"
        figures[f"overview_{model}"] = overview(table, styles, title, limits)
    caption = f"Accuracy with minus without adaptation, {tested.over_all}, {tested.sample}."
    caption += f" Clean: the change {tested.clean_images}." if results.clean else ""
    yield from under_one_caption("overview", figures, caption)


def at_a_glance(results: Results, model: str) -> pd.DataFrame:
    """Gather what `overview` shows of one model's runs."""
    rows = []
    for run in results.acting_on(model):
        entry = results.summary[model, run]
        gated = entry.get("gated") or {}
        row = {key: entry[key] for key in ("gain", "gain_low", "gain_high")}
        row |= {f"gated{key}": gated.get(f"gain{key}") for key in ("", "_low", "_high")}
        row |= {"training": entry.get("training_gain")}
        row |= {"clean": difference(entry["clean_adapted"], entry["clean_source"])}
        rows.append({"run": run, **row})
    table = pd.DataFrame(rows)
    return table.astype(dict.fromkeys(table.columns.drop("run"), float))


def _gains(results: Results) -> Named:
    tested = Tested.of(results)
    if tested.count == 1:  # the first figure shows it
        return
    styles, sample = plots.run_styles(results.runs), tested.sample
    models = [model for model in results.models if results.acting_on(model)]
    tables = {model: _with_mean(results, model) for model in models}
    largest = max(table["gain"].abs().max() for table in tables.values())
    maps = {}
    for model, table in tables.items():
        title = f"{model}: gain, percentage points, {sample}"
        maps[f"gain_{model}"] = heat_map(table, styles, title, largest)
    graded = len(tested.severities) > 1
    caption = (
        f"Accuracy with minus without adaptation{', mean over the severities' if graded else ''}; "
        f"above, the accuracy without. "
        f"Blue: gain. Orange and outlined: loss. Colour grows with the square root of the size, "
        f"alike on all maps. Bold: p of McNemar's test{' at a severity' if graded else ''} is "
        f"below {LEVEL} after Holm's correction over the run's shifts (for the mean: the 95 % "
        f"interval leaves zero out); pale: it is not."
    )
    yield from under_one_caption("gain", maps, caption)
    caption = (
        "Lines are 95 % intervals; they are not widened for looking at many "
        f"{tested.noun}s at once."
    )
    for model, table in tables.items():
        title = f"{model}: gain per {tested.noun}, {sample}"
        figure = gain_per_corruption(table, styles, title)
        folded = f"{model} with intervals"
        yield f"intervals_{model}", Drawing(figure, "gain", caption, folded)


def _with_mean(results: Results, model: str) -> pd.DataFrame:
    """Gather one model's gains per corruption with labels, with each run's mean as its last row.

    The column ``significant`` marks the gains that are drawn in bold.
    """
    rows = results.rows("by_corruption", model=model)
    rows = rows[rows["accuracy_source"].notna()]
    mean = ALL_LABELED if Tested.of(results).unlabeled else ALL
    shifts = results.rows("by_shift", model=model)
    clear = shifts[shifts["mcnemar_holm"] < LEVEL] if "mcnemar_holm" in shifts else shifts[:0]
    clear_pairs = set(zip(clear["run"], clear["corruption"], strict=True))
    pairs = zip(rows["run"], rows["corruption"], strict=True)
    rows = rows.assign(significant=[pair in clear_pairs for pair in pairs])
    keys = ("accuracy_source", "gain", "gain_low", "gain_high")
    means = []
    for run in results.runs_of(model):
        entry = results.summary[model, run]
        means.append({"run": run, "corruption": mean, **{key: entry[key] for key in keys}})
    means = pd.DataFrame(means).astype(dict.fromkeys(keys, float))
    means["significant"] = (means["gain_low"] > 0) | (means["gain_high"] < 0)
    return pd.concat([rows[means.columns], means], ignore_index=True)


def _severity(results: Results) -> Named:
    table = results.rows("by_severity")
    table = table[table["accuracy_source"].notna()]
    if not (table["severity"] > 0).any():
        return
    corruptions = Tested.of(results).corruptions
    shifts = results.rows("by_shift")
    known = (shifts["severity"] > 0) & shifts["accuracy_source"].notna()
    sample = sample_text(shifts[known], results.seeds)
    mean = f"mean of {len(corruptions)} corruptions, " if len(corruptions) > 1 else ""
    title = f"Accuracy by severity, {mean}{sample}"
    figure = accuracy_by_severity(table, plots.run_styles(results.runs), title)
    caption = "The dashed line is the same network on the same images without adaptation."
    yield "severity", Drawing(figure, "severity", caption)


def _steps(results: Results) -> Named:
    styles, curves, figures = plots.run_styles(results.runs), results.rows("steps"), {}
    tested = Tested.of(results)
    for model in results.models if len(curves) else ():
        rows = curves[curves["model"] == model]
        taken = rows.groupby("run")["step"].transform("max") > 0
        if taken.any():
            images = f"n = {rows['n'].max()} images, the same for all settings"
            title = f"{model}: along the steps, {images}"
            figures[f"steps_{model}"] = step_curves(rows[taken], styles, title)
    caption = (
        "Shifted images: those of adapt.curve in params.yaml. Step 0 is the run's normalisation "
        "alone. The circle is the step that the run takes, fixed before the test. Time is the mean "
        "for getting there and predicting. Ranges follow the setting in use and the default: "
        "a candidate that collapses leaves the panel. Losses of different runs have different "
        f"units.{' Network of the first training seed.' if results.seeds > 1 else ''}"
    )
    if tested.unlabeled:
        caption += f" Accuracy is {tested.over_all}; loss and time are over all."
    yield from under_one_caption("steps", figures, caption)
    if len(curves):
        return
    losses = {}
    for run in results.runs:
        for model in results.models:
            means = results.adapted.get((model, run), {}).get("losses") or []
            if len(means) > 1:
                losses[run, model] = means
    if losses:
        title = f"Mean loss, {tested.sample_of_all}"
        caption = (
            "Before each step and after the last. Losses of different methods have different units."
        )
        yield "loss", Drawing(loss_along_steps(losses, styles, title), "steps", caption)


def _cost(results: Results) -> Named:
    tested = Tested.of(results)
    keys, rows = ("gain", "gain_low", "gain_high"), []
    for (model, run), entry in results.summary.items():
        sides = [(False, entry, entry["milliseconds_mean"])]
        if gated := entry.get("gated"):
            sides.append((True, gated, gated["milliseconds"]))
        for with_gate, side, cost in sides:
            row = {"model": model, "run": run, "gated": with_gate, "milliseconds": cost}
            rows.append(row | {key: side[key] for key in keys})
    table = pd.DataFrame(rows).astype(dict.fromkeys(("milliseconds", *keys), float))
    table = table[(table["milliseconds"] > 0) & table["gain"].notna()]
    if len(table):
        gated = " Hollow: with the gate, its own time included." if table["gated"].any() else ""
        title = f"Gain {tested.over_all} and cost, {tested.sample}"
        caption = (
            "Time: mean for adapting to an image and predicting it. "
            f"Lines are 95 % intervals.{gated}"
        )
        figure = gain_and_cost(table, plots.run_styles(results.runs), title)
        yield "cost", Drawing(figure, "cost", caption)
