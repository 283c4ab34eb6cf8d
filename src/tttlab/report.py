"""The comparison with and without test-time training, for people: one HTML page, a plain table, a Markdown table.

All numbers come from the tables that `evaluate` wrote; nothing is computed here but their places on the page.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tttlab import plots
from tttlab.errors import UserError
from tttlab.metrics import verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tttlab.data import ImageSet

ALL = "all corruptions"
_THUMBNAIL = 64  # pixels; larger pictures would make a heavy page and look no different at their size
_CLEAN_LOSS = 0.01  # a clean accuracy that falls by more is told in words
_NONE = object()
_MARKDOWN_LIMIT = 7_500  # characters; MLflow cuts a description at 8,000


@dataclass(frozen=True)
class Results:
    """What `evaluate` and `adapt` left, for the models and runs of params.yaml.

    Attributes:
        models: Names in order.
        runs: Names in order.
        summary: ``outputs/metrics.json`` by (model, run).
        by_corruption: Rows per model, run and corruption.
        by_severity: Rows per model, run and severity.
        adapted: ``outputs/adapt/<run>.json`` by (model, run): losses, cost, settings, MLflow's run.
    """

    models: tuple[str, ...]
    runs: tuple[str, ...]
    summary: dict[tuple[str, str], dict[str, Any]]
    by_corruption: pd.DataFrame
    by_severity: pd.DataFrame
    adapted: dict[tuple[str, str], dict[str, Any]]

    @classmethod
    def read(cls, outputs: Path, models: Sequence[str], runs: Sequence[str]) -> "Results":
        """Read them from the folder of outputs.

        Raises:
            UserError: A file is missing, or lacks one of the models and runs.
        """
        metrics = _read_json(outputs / "metrics.json", "evaluate").get("runs", {})
        sidecars = {run: _read_json(outputs / "adapt" / f"{run}.json", "adapt") for run in runs}
        summary, adapted = {}, {}
        for model in models:
            for run in runs:
                if f"{model}/{run}" not in metrics:
                    raise UserError(f"{outputs / 'metrics.json'}: expected an entry {model}/{run}, found none; run `evaluate`")
                if model not in sidecars[run]:
                    raise UserError(f"{outputs / 'adapt' / run}.json: expected an entry {model}, found none; run `adapt`")
                summary[model, run] = metrics[f"{model}/{run}"]
                adapted[model, run] = sidecars[run][model]
        tables = (_read_table(outputs / "tables" / f"{name}.csv") for name in ("by_corruption", "by_severity"))
        return cls(tuple(models), tuple(runs), summary, *tables, adapted)

    @property
    def labeled(self) -> bool:
        """Whether any accuracy is known."""
        return any(entry["accuracy_source"] is not None for entry in self.summary.values())

    def changed(self, model: str, run: str) -> float | None:
        """Give the share of shifted images whose predicted class changed; this needs no labels."""
        table = self.by_corruption
        rows = table[(table["model"] == model) & (table["run"] == run)]
        return rows["changed"].sum() / rows["n"].sum() if len(rows) else None


def _read_json(path: Path, stage: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: expected what the stage `{stage}` writes, found no file; run `{stage}`")
    return json.loads(path.read_text(encoding="utf-8"))


def _read_table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise UserError(f"{path}: expected a table that the stage `evaluate` writes, found no file; run `evaluate`")
    return pd.read_csv(path)


# --- numbers as text -----------------------------------------------------------------------------------------------


def percent(fraction: float | None) -> str:
    """Write a fraction as a percentage: 0.613 becomes ``61.3``; what is unknown becomes a dash."""
    return "–" if _unknown(fraction) else f"{100 * fraction:.1f}"


def points(fraction: float | None) -> str:
    """Write a difference of fractions in percentage points, with its sign: 0.047 becomes ``+4.7``."""
    if _unknown(fraction):
        return "–"
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """Write an interval in percentage points: ``[+3.9, +5.5]``."""
    return "–" if _unknown(low) or _unknown(high) else f"[{points(low)}, {points(high)}]"


def amount(value: float | None) -> str:
    """Write a cost with as many digits as matter: 0.05, 4.57, 18.3, 183, 12,400."""
    return "–" if _unknown(value) else f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _unknown(value: float | None) -> bool:
    return value is None or bool(np.isnan(value))


def rows(results: Results) -> list[dict[str, str]]:
    """Write the headline table, a row per model and run, all values as text."""
    table = []
    for (model, run), entry in results.summary.items():
        clean = None if entry["clean_source"] is None else entry["clean_adapted"] - entry["clean_source"]
        table.append({
            "model": model,
            "run": run,
            "source": percent(entry["accuracy_source"]),
            "adapted": percent(entry["accuracy_adapted"]),
            "gain": points(entry["gain"]),
            "interval": interval(entry["gain_low"], entry["gain_high"]),
            "verdict": verdict(entry["gain_low"], entry["gain_high"]),
            "changed": percent(results.changed(model, run)),
            "clean": points(clean),
            "milliseconds_p50": amount(entry["milliseconds_p50"]),
            "milliseconds_p95": amount(entry["milliseconds_p95"]),
            "memory": amount(results.adapted[model, run].get("peak_memory_mb")),
            "fell_back": f"{entry['fell_back']:,}",
        })  # fmt: skip
    return table


# --- the comparison as text ----------------------------------------------------------------------------------------


def plain_table(results: Results) -> str:
    """Write the comparison for a terminal, a line per model and run: ``61.3 → 66.0  +4.7 [+3.9, +5.5]  clean −0.2``."""
    from tabulate import tabulate

    table = rows(results)
    costs = [(f"{row['milliseconds_p50']} / {row['milliseconds_p95']}", row["fell_back"]) for row in table]
    if results.labeled:
        heads, sides = ("accuracy, %", "gain", "95 % interval", ""), ("right", "right", "left", "left")
        known = [
            (f"{row['source']} → {row['adapted']}", row["gain"], row["interval"], f"clean {row['clean']}") for row in table
        ]
    else:
        heads, sides, known = ("predictions changed, %",), ("right",), [(row["changed"],) for row in table]
    lines = [(row["model"], row["run"], *own, *cost) for row, own, cost in zip(table, known, costs, strict=True)]
    heads = ("model", "run", *heads, "ms p50 / p95", "fell back")
    sides = ("left", "left", *sides, "right", "right")
    return tabulate(lines, heads, tablefmt="simple", disable_numparse=True, colalign=sides)


def markdown(results: Results, links: Mapping[tuple[str, str], str | None]) -> str:
    """Write the comparison in Markdown: the sentences, then the table, whose runs link to their own pages.

    Args:
        results: What to tell.
        links: Address of a page by (model, run), where there is one.
    """
    told = [f"**{model}**: {sentence(results, model)}" for model in results.models]
    if results.labeled:
        heads = "without, % | with, % | gain, points | 95 % interval | clean"
        keys = ("source", "adapted", "gain", "interval", "clean", "milliseconds_p50")
    else:
        heads, keys = "predictions changed, %", ("changed", "milliseconds_p50")
    text = "\n\n".join([*told, f"| model | run | {heads} | ms per image |"])
    text += f"\n|---|---|{'--:|' * len(keys)}"
    for row in rows(results):
        link = links.get((row["model"], row["run"]))
        if row["verdict"] in ("helped", "hurt"):
            row["gain"] = f"**{row['gain']}**"
        name = f"[{row['run']}]({link})" if link else row["run"]
        cells = (row["model"], name, *(row[key] for key in keys))
        line = f"\n| {' | '.join(cells)} |"
        if len(text) + len(line) > _MARKDOWN_LIMIT:
            return f"{text}\n\nMore rows are in the artifact `comparison.json`."
        text += line
    return f"{text}\n\nFigures and the page `report.html` are among the artifacts."


def sentence(results: Results, model: str) -> str:
    """Say in plain words which runs helped one model, which hurt it, and which cannot be told apart from no change."""
    entries = {run: results.summary[model, run] for run in results.runs if run != plots.CONTROL}
    if not entries:
        return "There is nothing to compare: params.yaml lists only the control."
    if all(entry["gain"] is None for entry in entries.values()):
        return "The test images have no labels, so accuracy is unknown; what is known is how many predictions changed."
    runs: dict[str, list[str]] = {word: [] for word in ("helped", "hurt", "undecided", "unchanged", "unknown")}
    for run in sorted(entries, key=lambda run: -(entries[run]["gain"] or 0)):
        runs[verdict(entries[run]["gain_low"], entries[run]["gain_high"])].append(run)
    told = [_about_helpers(entries, runs["helped"])]
    if runs["hurt"]:
        told.append(f"{_enumerate(runs['hurt'])} hurt: the interval lies below zero.")
    if runs["undecided"]:
        told.append(f"{_enumerate(runs['undecided'])}: undecided, the interval includes zero.")
    if runs["unchanged"]:
        told.append(f"{_enumerate(runs['unchanged'])} made no difference to the accuracy.")
    told.append(_about_clean(entries))
    return " ".join(filter(None, told))


def about(results: Results, source: str, corruptions: Sequence[str], severities: Sequence[int], protocol: str) -> str:
    """Say in a sentence what was tested on what."""
    images = max(entry["images"] for entry in results.summary.values())
    alone = "each adapted to on its own, from the source weights" if protocol == "episodic" else "as one stream"
    return (
        f"{len(results.models)} models, {len(results.runs)} runs each; {images} test images from {source}, under "
        f"{len(corruptions)} synthetic corruptions at {len(severities)} severities and clean, {alone}, without labels."
    )


def _about_helpers(entries: Mapping[str, Mapping[str, Any]], helped: Sequence[str]) -> str:
    if not helped:
        return "No run helped: no interval lies above zero."
    best, *others = helped
    entry = entries[best]
    text = f"{best} helped most, {percent(entry['accuracy_source'])} % → {percent(entry['accuracy_adapted'])} % "
    text += f"({points(entry['gain'])} points, 95 % interval {points(entry['gain_low'])} to {points(entry['gain_high'])})"
    return f"{text}; {_enumerate(others)} helped too." if others else f"{text}."


def _about_clean(entries: Mapping[str, Mapping[str, Any]]) -> str:
    known = {run: entry for run, entry in entries.items() if entry["clean_source"] is not None}
    losses = {run: entry["clean_source"] - entry["clean_adapted"] for run, entry in known.items()}
    worst = sorted((run for run in losses if losses[run] > _CLEAN_LOSS), key=lambda run: -losses[run])
    if not worst:
        return "No run lost more than one point on clean images." if known else ""
    return f"On clean images {_enumerate([f'{run} lost {percent(losses[run])} points' for run in worst])}."


def _enumerate(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


# --- figures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """A figure with what the page says beneath it."""

    figure: "Figure"
    section: str
    caption: str


def draw(results: Results, pictures: Mapping[str, Sequence[np.ndarray]], severities: Sequence[int]) -> dict[str, Drawing]:
    """Draw every figure of the report, by file name. Those of accuracy are left out where no labels are known.

    Args:
        results: What to draw.
        pictures: From `shift_pictures`.
        severities: Which severities the pictures show, after the clean image.
    """
    styles = plots.run_styles(results.runs)
    images = max(entry["images"] for entry in results.summary.values())
    drawings = {}
    if results.labeled and len(results.runs) > 1:
        for model in results.models:
            title = f"{model}: gain per corruption, n = {images} images, each at every severity"
            drawings[f"gain_{model}"] = Drawing(
                plots.gain_per_corruption(_gains(results, model), styles, title), "gain",
                "Accuracy with minus without adaptation, in percentage points, over all severities. Lines are 95 % "
                "intervals from resampling the images; they are not widened for looking at many corruptions at once.",
            )  # fmt: skip
        title = f"Accuracy by severity, mean of {len(pictures)} corruptions, n = {images} images"
        drawings["severity"] = Drawing(
            plots.accuracy_by_severity(results.by_severity, styles, title), "severity",
            "Accuracy in percent. The dashed line is the same network on the same images without adaptation.",
        )  # fmt: skip
    curves = {(run, model): results.adapted[model, run].get("losses") or [] for run in results.runs for model in results.models}
    curves = {key: losses for key, losses in curves.items() if len(losses) > 1}
    if curves:
        drawings["loss"] = Drawing(
            plots.loss_along_steps(curves, styles, f"Mean loss, n = {images} images, each under every shift"), "loss",
            "Before each step and after the last. Each panel has its own scale: losses of different methods have "
            "different units.",
        )  # fmt: skip
    drawings["examples"] = Drawing(
        plots.examples(pictures, ["clean", *map(str, severities)], "Test images under each corruption"), "examples",
        "One test image per corruption, clean and at every severity. These are synthetic corruptions made here; they "
        "are not the files of CIFAR-10-C.",
    )  # fmt: skip
    return drawings


def _gains(results: Results, model: str) -> pd.DataFrame:
    """Gather one model's gains per corruption, and their mean as the last row of each run."""
    rows = results.by_corruption[results.by_corruption["model"] == model]
    keys = ("gain", "gain_low", "gain_high")
    means = [{"run": run, "corruption": ALL, **{key: results.summary[model, run][key] for key in keys}} for run in results.runs]
    return pd.concat([rows, pd.DataFrame(means)], ignore_index=True)


def shift_pictures(
    images: "ImageSet", corruptions: Sequence[str], severities: Sequence[int], seed: int
) -> dict[str, list[np.ndarray]]:
    """Show one test image per corruption: clean, then at each severity, exactly as `adapt` sees it.

    Args:
        images: The test set.
        corruptions: Their names.
        severities: 1 to 5.
        seed: The seed of params.yaml, on which the corruptions depend.
    """
    from tttlab.corruptions import corrupt_all

    places = np.linspace(0, len(images) - 1, len(corruptions)).astype(int)
    pictures = {}
    for place, name in zip(places, corruptions, strict=True):
        one = images.take([place])
        clean = np.asarray(one.pixels)
        shifted = [corrupt_all(clean, one.image_ids, name, severity, seed)[0] for severity in severities]
        pictures[name] = [_thumbnail(image) for image in (clean[0], *shifted)]
    return pictures


def _thumbnail(image: np.ndarray) -> np.ndarray:
    from PIL import Image

    if max(image.shape[:2]) <= _THUMBNAIL:
        return image
    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(picture)


# --- the page ------------------------------------------------------------------------------------------------------


def render(results: Results, drawings: Mapping[str, Drawing], settings: Mapping[str, Any], note: str) -> str:
    """Write the whole page: one file that needs no network.

    Args:
        results: What to tell.
        drawings: From `draw`.
        settings: The whole of params.yaml.
        note: A sentence on what was tested on what.
    """
    import jinja2
    from markupsafe import Markup

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    table = _with_bars(results)
    used, common = _settings_used(results)
    figures = [
        {"name": name, "section": drawing.section, "caption": drawing.caption,
         "svg": Markup(plots.to_svg(drawing.figure, name, drawing.caption))}
        for name, drawing in drawings.items()
    ]  # fmt: skip
    return environment.get_template("report.html").render(
        note=note,
        results=results,
        rows={model: [row for row in table if row["model"] == model] for model in results.models},
        sentences={model: sentence(results, model) for model in results.models},
        styles=plots.run_styles(results.runs),
        light=plots.LIGHT,
        dark=plots.DARK,
        figures=figures,
        corruptions=_corruption_cells(results),
        used=used,
        common=common,
        settings=_as_yaml(settings),
    )


def _with_bars(results: Results) -> list[dict[str, Any]]:
    """Add to each row where its interval lies on a common scale, 0 to 100, for the small graphic beside the number."""
    entries = list(results.summary.values())
    ends = [entry[key] or 0 for entry in entries for key in ("gain_low", "gain_high")]
    low, high = min(0, *ends), max(0.001, *ends)

    def place(value: float) -> float:
        return round(4 + 92 * (value - low) / (high - low), 1)

    table = rows(results)
    for row, entry in zip(table, entries, strict=True):
        known = entry["gain_low"] is not None
        row["bar"] = {key: place(entry[key]) for key in ("gain_low", "gain", "gain_high")} if known else None
        row["zero"] = place(0)
    return table


def _corruption_cells(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Arrange the gains per corruption for one table per model: a row per corruption, a cell per run."""
    tables = {}
    for model, group in results.by_corruption.groupby("model", sort=False):
        lines = []
        for name, part in group.groupby("corruption", sort=False):
            by_run = part.set_index("run")
            cells = [
                (points(by_run.loc[run, "gain"]), verdict(by_run.loc[run, "gain_low"], by_run.loc[run, "gain_high"]))
                for run in results.runs
                if run != plots.CONTROL
            ]
            source = percent(part["accuracy_source"].iloc[0])
            lines.append({"name": name.replace("_", " "), "source": source, "cells": cells})
        tables[model] = lines
    return tables


def _settings_used(results: Results) -> tuple[list[tuple[str, str, str]], str]:
    """List (model, run, settings) as `adapt` used them, and apart from them the settings that all have in common."""
    used = {key: entry.get("settings") or {} for key, entry in results.adapted.items()}
    first = next(iter(used.values()))
    common = {name: value for name, value in first.items() if all(other.get(name, _NONE) == value for other in used.values())}

    def told(settings: Mapping[str, Any]) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if value is not None)

    own = [{name: value for name, value in settings.items() if name not in common} for settings in used.values()]
    return [(*key, told(settings)) for key, settings in zip(used, own, strict=True)], told(common)


def _as_yaml(settings: Mapping[str, Any]) -> str:
    import io

    from ruamel.yaml import YAML

    buffer = io.StringIO()
    writer = YAML()
    writer.default_flow_style = None  # one line for what holds no further level
    writer.width = 100
    writer.dump(dict(settings), buffer)
    return buffer.getvalue()
