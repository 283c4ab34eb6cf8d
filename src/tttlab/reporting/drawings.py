"""Which figures the report shows, from which tables, and what it says beneath them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tttlab.evaluation.results import CONTROL, Results, known
from tttlab.reporting import pictures, plots
from tttlab.reporting.figures.accuracy import (
    accuracy_by_severity,
    gain_and_cost,
    gain_per_corruption,
    heat_map,
)
from tttlab.reporting.figures.signals import estimated_accuracy, gain_along, reliability
from tttlab.reporting.figures.steps import loss_along_steps, step_curves
from tttlab.reporting.words import percent, probability

ALL = "all shifts"
ALPHA = 0.05
EMPTY: Mapping[str, Sequence[np.ndarray]] = MappingProxyType({})
Named = Iterator[tuple[str, "Drawing"]]


@dataclass(frozen=True)
class Drawing:
    """A figure with what the page says beneath it.

    Attributes:
        figure: The figure.
        section: Name of the page's section.
        caption: Beneath it; empty where the next figure's caption is for both.
        folded: What a reader clicks on to see it; empty: it is always shown.
    """

    figure: Figure
    section: str
    caption: str
    folded: str = ""


def draw(
    results: Results,
    shown: Mapping[str, Sequence[np.ndarray]],
    severities: Sequence[int],
    sets: Mapping[str, Sequence[np.ndarray]] = EMPTY,
) -> dict[str, Drawing]:
    """Draw every figure of the report, by file name.

    Those of accuracy are left out where no labels are known, those of an optional table where it is missing.

    Args:
        results: What to draw.
        shown: From `pictures.shift_pictures`.
        severities: Which severities the pictures show, after the clean image.
        sets: From `pictures.set_pictures`.
    """
    drawings = {}
    if results.labeled and results.acting:
        for each in (_gains, _severity, _distance, _estimates, _alignment, _cost, _reliability):
            drawings |= dict(each(results))
    drawings |= dict(_steps(results))
    return drawings | dict(_examples(shown, sets, severities))


def _examples(
    shown: Mapping[str, Sequence[np.ndarray]],
    sets: Mapping[str, Sequence[np.ndarray]],
    severities: Sequence[int],
) -> Named:
    if shown:
        figure = pictures.draw_pictures(
            shown, ["clean", *map(str, severities)], "Test images under each corruption"
        )
        caption = (
            "One test image per corruption, clean and at every severity. These are synthetic corruptions made here; they "
            "are not the files of CIFAR-10-C."
        )
        yield "examples", Drawing(figure, "examples", caption)
    if sets:
        figure = pictures.draw_pictures(
            sets, [""] * max(map(len, sets.values())), "Images that came shifted"
        )
        yield (
            "examples_of_sets",
            Drawing(figure, "examples", "The first images of each, as they were adapted to."),
        )


def _under_one_caption(section: str, figures: Mapping[str, Figure], caption: str) -> Named:
    """Give the figures of several models by name, with the caption of all beneath the last."""
    for number, (name, figure) in enumerate(figures.items(), 1):
        yield name, Drawing(figure, section, caption if number == len(figures) else "")


def _tested(results: Results) -> str:
    """Say on how much a number stands."""
    seeds = f" × {results.seeds} training seeds" if results.seeds > 1 else ""
    fewest, most = results.images
    return f"n = {most if fewest == most else f'{fewest}–{most}'} images{seeds}"


def _gains(results: Results) -> Named:
    styles = plots.run_styles(results.runs)
    tables = {
        model: _with_mean(results, model) for model in results.models if results.acting_on(model)
    }
    largest = max(table["gain"].abs().max() for table in tables.values())
    title = f"gain, percentage points, {_tested(results)} under every shift"
    maps = {
        f"gain_{model}": heat_map(table, styles, f"{model}: {title}", largest)
        for model, table in tables.items()
    }
    caption = (
        f"Accuracy with minus without adaptation over all severities; above, the accuracy without. Blue: gain. Orange and "
        f"outlined: loss. Colour grows with the square root of the size, alike on all maps. Bold: McNemar's test of a "
        f"severity is below {ALPHA} after Holm's correction over the run's shifts (for the mean: the 95 % interval "
        f"leaves zero out); pale: none is."
    )
    yield from _under_one_caption("gain", maps, caption)
    for model, table in tables.items():
        title = f"{model}: gain per corruption, {_tested(results)} under every shift"
        caption = "Lines are 95 % intervals; they are not widened for looking at many corruptions at once."
        figure = gain_per_corruption(table, styles, title)
        yield (
            f"intervals_{model}",
            Drawing(figure, "gain", caption, folded=f"{model} with intervals"),
        )


def _with_mean(results: Results, model: str) -> pd.DataFrame:
    """Gather one model's gains per corruption, their mean as the last row of each run, and which of them are significant."""
    rows = results.rows("by_corruption", model=model)
    shifts = results.rows("by_shift", model=model)
    clear = shifts[shifts["mcnemar_holm"] < ALPHA] if "mcnemar_holm" in shifts else shifts[:0]
    clear = set(zip(clear["run"], clear["corruption"], strict=True))
    rows = rows.assign(
        significant=[pair in clear for pair in zip(rows["run"], rows["corruption"], strict=True)]
    )
    keys = ("accuracy_source", "gain", "gain_low", "gain_high")
    entries = {run: results.summary[model, run] for run in results.runs_of(model)}
    means = [
        {"run": run, "corruption": ALL, **{key: entry[key] for key in keys}}
        for run, entry in entries.items()
    ]
    means = pd.DataFrame(means).astype(dict.fromkeys(keys, float))
    means["significant"] = (means["gain_low"] > 0) | (means["gain_high"] < 0)
    return pd.concat([rows[means.columns], means], ignore_index=True)


def _severity(results: Results) -> Named:
    if not (results.rows("by_severity")["severity"] > 0).any():
        return
    shifts = results.rows("by_shift")
    corruptions = shifts[shifts["severity"] > 0]["corruption"].nunique()
    title = f"Accuracy by severity, mean of {corruptions} corruptions, {_tested(results)}"
    figure = accuracy_by_severity(
        results.rows("by_severity"), plots.run_styles(results.runs), title
    )
    yield (
        "severity",
        Drawing(
            figure,
            "severity",
            "The dashed line is the same network on the same images without adaptation.",
        ),
    )


def _steps(results: Results) -> Named:
    styles, curves, figures = plots.run_styles(results.runs), results.rows("steps"), {}
    for model in results.models if len(curves) else ():
        rows = curves[curves["model"] == model]
        taken = rows.groupby("run")["step"].transform("max") > 0
        if taken.any():
            title = (
                f"{model}: along the steps, n = {rows['n'].max()} images, the same for all settings"
            )
            figures[f"steps_{model}"] = step_curves(rows[taken], styles, title)
    caption = (
        "Shifted images: those of adapt.curve in params.yaml. Step 0 is the run's normalisation alone. The circle is "
        "the step that the run takes, fixed before the test. Time is the mean for getting there and predicting. Ranges "
        "follow the setting in use and the default: a candidate that collapses leaves the panel. Losses of different "
        f"runs have different units.{' Network of the first training seed.' if results.seeds > 1 else ''}"
    )
    yield from _under_one_caption("steps", figures, caption)
    losses = {
        (run, model): results.adapted.get((model, run), {}).get("losses") or []
        for run in results.runs
        for model in results.models
    }
    losses = {key: values for key, values in losses.items() if len(values) > 1}
    if losses and not len(curves):
        title = f"Mean loss, {_tested(results)}, each under every shift"
        caption = (
            "Before each step and after the last. Losses of different methods have different units."
        )
        yield "loss", Drawing(loss_along_steps(losses, styles, title), "steps", caption)


def _distance(results: Results) -> Named:
    caption = (
        "A point per shift, larger at higher severity; hollow: clean. Distance: how far the images' activation moments lie "
        "from the source, in units of their variation from one source image to the next, mean over the images."
    )
    yield from _along(
        results,
        results.rows("by_shift"),
        "distance",
        "distance",
        "distance to the source (1: source images)",
        caption,
    )


def _alignment(results: Results) -> Named:
    table = results.rows("alignment")
    if len(table):
        severities = results.rows("by_shift")[["model", "run", "shift", "severity"]]
        table = table.merge(severities, on=["model", "run", "shift"], how="left").fillna(
            {"severity": 0}
        )
    caption = (
        "A point per shift, larger at higher severity; hollow: clean; lines are 95 % intervals. Alignment: cosine between the "
        "gradient of the run's own loss and that of the supervised loss, mean over the images. It needs labels: it explains a "
        "gain, it cannot predict one."
    )
    yield from _along(results, table, "cosine", "alignment", "gradient alignment (cosine)", caption)


def _along(
    results: Results, table: pd.DataFrame, signal: str, section: str, label: str, caption: str
) -> Named:
    """Draw the gain per shift along a signal, a figure per model, with the rank correlations that were computed."""
    styles, figures = plots.run_styles(results.runs), {}
    if signal not in table or not table[signal].notna().any():
        return
    for model in results.models:
        rows = table[
            (table["model"] == model)
            & table["run"].isin(_changing(results, model))
            & table[signal].notna()
        ]
        if len(rows):
            correlations = results.rows("correlations", model=model, level="shift", signal=signal)
            notes = {
                row.run: f"Spearman {row.spearman:+.2f}, p {probability(row.p)}".replace("-", "−")
                for row in correlations.itertuples()
                if known(row.spearman)
            }
            title = f"{model}: gain along the {label.split(' (')[0]}, {rows['n'].max()} predictions per point"
            figures[f"{section}_{model}"] = gain_along(rows, signal, styles, title, label, notes)
    yield from _under_one_caption(section, figures, caption)


def _changing(results: Results, model: str) -> list[str]:
    """List the runs that change any prediction of a model."""
    return [run for run in results.acting_on(model) if results.changed(model, run)]


def _estimates(results: Results) -> Named:
    distances = results.rows("distances", reference="labeled")
    if not len(distances):
        return
    estimates = distances[distances["metric"].str.startswith("estimated_accuracy")]
    estimates = (
        estimates.groupby(["model", "metric", "target"], sort=False)["value"].mean().reset_index()
    )
    truth = results.rows("by_shift", run=CONTROL).rename(columns={"accuracy_source": "accuracy"})
    table = estimates.merge(
        truth[["model", "shift", "accuracy"]],
        left_on=["model", "target"],
        right_on=["model", "shift"],
    )
    table = table.dropna(subset=["value", "accuracy"])
    if len(table):
        title = "Estimated accuracy of the source network, from its confidences alone"
        caption = (
            "A point per shift, clean included. Above the line: promised more than was true. References: Guillory et al. 2021 "
            "(difference of confidences), Garg et al. 2022 (average thresholded confidence)."
        )
        yield "estimated", Drawing(estimated_accuracy(table, title), "distance", caption)


def _cost(results: Results) -> Named:
    rows = []
    for (model, run), entry in results.summary.items():
        sides = [(False, entry, entry["milliseconds_mean"])]
        if gated := entry.get("gated"):
            sides.append((True, gated, gated["milliseconds"]))
        for with_gate, side, cost in sides:
            values = {key: side[key] for key in ("gain", "gain_low", "gain_high")}
            rows.append(
                {"model": model, "run": run, "gated": with_gate, "milliseconds": cost, **values}
            )
    table = pd.DataFrame(rows).astype(
        dict.fromkeys(("milliseconds", "gain", "gain_low", "gain_high"), float)
    )
    table = table[(table["milliseconds"] > 0) & table["gain"].notna()]
    if len(table):
        gated = " Hollow: with the gate, its own time included." if table["gated"].any() else ""
        title = f"Gain over all shifts and cost, {_tested(results)}"
        caption = f"Time: mean for adapting to an image and predicting it. Lines are 95 % intervals.{gated}"
        figure = gain_and_cost(table, plots.run_styles(results.runs), title)
        yield "cost", Drawing(figure, "cost", caption)


def _reliability(results: Results) -> Named:
    figures = {}
    for model in results.models:
        rows = results.rows("reliability", model=model, run=list(results.acting))
        if len(rows) and rows["accuracy"].notna().any():
            keys = [(run, results.summary[model, run]) for run in results.acting_on(model)]
            errors = {
                run: (percent(entry.get("ece_source")), percent(entry.get("ece_adapted")))
                for run, entry in keys
            }
            title = f"{model}: accuracy by confidence, all shifts, {_tested(results)}"
            figures[f"reliability_{model}"] = reliability(
                rows, plots.run_styles(results.runs), title, errors
            )
    caption = (
        "Shifted predictions in 15 bins of confidence, larger points for fuller bins; hollow: source, filled: adapted. "
        "Below the diagonal: too sure. ECE: expected calibration error, the mean distance from the diagonal."
    )
    yield from _under_one_caption("calibration", figures, caption)
