"""The report's tables of tuning, of when training helps, and of every shift."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tttlab.evaluation.results import Results, difference, is_known, shift_name
from tttlab.evaluation.significance import LEVEL
from tttlab.reporting.words import (
    amount,
    interval,
    percent,
    points,
    probability,
    setting,
    significant,
    whole,
)


@dataclass(frozen=True)
class Cell:
    """One value: its text, a smaller line beneath, and its look (``strong``, ``quiet`` or none)."""

    text: str
    note: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Line:
    """One row; a ``group`` is a heading over the rows that follow."""

    cells: tuple[Cell, ...]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        name: Its id, unique on the page.
        section: Name of the page's section.
        heads: Column heads; a line break starts a new line.
        lines: Rows.
        caption: Text beneath it.
        folded: The line to click on to unfold the table; empty if it is always shown.
        left: Number of columns that are aligned to the left.
    """

    name: str
    section: str
    heads: tuple[str, ...]
    lines: tuple[Line, ...]
    caption: str = ""
    folded: str = ""
    left: int = 1


def line(*texts: str | Cell, kind: str = "") -> Line:
    """Make a row of texts and cells."""
    return Line(tuple(text if isinstance(text, Cell) else Cell(text) for text in texts), kind)


# --- tuning --------------------------------------------------------------------------------------

_CHOICES = {
    "none": ("not adapted", ""),
    "default": ("default of params.yaml", ""),
    "tuned": ("tuned without test labels", "strong"),
    "oracle": ("upper bound, picked with test labels; not a result", "quiet"),
}


def tuning(results: Results) -> Iterator[Table]:
    """Compare the tuned setting with the default and the oracle."""
    rows = results.rows("tuning")
    if not len(rows) or not rows["accuracy"].notna().any():
        return
    lines = []
    for (model, run), part in rows.groupby(["model", "run"], sort=False):
        lines.append(line(f"{model} · {run}", kind="group"))
        for row in part.itertuples():
            name, kind = _CHOICES.get(row.choice, (row.choice, ""))
            settings = row.settings if isinstance(row.settings, str) else "–"
            values = percent(row.accuracy), points(row.gain), points(row.clean_change), f"{row.n:,}"
            step = f"{row.step:.0f}" if is_known(row.step) else "–"
            lines.append(line(name, Cell(settings, kind="wrap"), step, *values, kind=kind))
    heads = ("setting", "values", "step", "accuracy, %", "gain, points", "clean, points", "n")
    caption = (
        "Accuracy on shifted test images; n: images, the same for all settings of a run. "
        "Tuning saw labeled source images only, under corruptions that are not tested. "
        "The oracle is the best of the final candidates and their steps."
    )
    if results.seeds > 1:
        caption += " All on the network of the first training seed."
    yield Table("tuning", "tuning", heads, tuple(lines), caption, left=2)


def searched(results: Results) -> Iterator[Table]:
    """List the values that tuning compared and chose, and the settings without influence."""
    lines = []
    for model in results.models:
        tunings = {run: results.tuning(model, run) for run in results.runs_of(model)}
        tuned = [run for run, record in tunings.items() if record.get("search")]
        if tuned:
            lines.append(line(model, kind="group"))
            lines += [_search_line(run, tunings[run]) for run in tuned]
    heads = (
        "run",
        "values compared",
        "chosen",
        "no influence",
        "score, %",
        "score of the\ndefault, %",
    )
    caption = (
        "All values that tuning tried; of a larger grid it takes a random part of the "
        "combinations. No influence: all values of the setting scored the same, whatever the "
        "others were. Score: accuracy on labeled source images under corruptions that are not "
        "tested, less a penalty for what clean ones lose."
    )
    yield Table("searched", "tuning", heads, tuple(lines), caption, left=4)


def _search_line(run: str, tuning: Mapping[str, Any]) -> Line:
    compared = "; ".join(
        f"{name}: {', '.join(map(setting, values))}" for name, values in tuning["search"].items()
    )
    settings = ", ".join(f"{name} {setting(value)}" for name, value in tuning["settings"].items())
    texts = (compared, settings, ", ".join(tuning["without_influence"]) or "–")
    scores = (_score(tuning, tuning[key]) for key in ("settings", "default"))
    return line(run, *(Cell(text, kind="wrap") for text in texts), *map(percent, scores))


def _score(tuning: Mapping[str, Any], settings: Mapping[str, Any]) -> float | None:
    for candidate in tuning["candidates"]:
        if candidate["settings"] == settings:
            return candidate["score"]
    return None


# --- when training helps -------------------------------------------------------------------------

_SIGNALS = {
    "cosine": "gradient alignment",
    "loss_first": "loss before the first step",
    "loss_change": "change of the loss",
    "source_confidence": "confidence before adapting",
    "confidence_change": "change of the confidence",
    "distance": "distance to the source",
}


def correlations(results: Results) -> Iterator[Table]:
    """Compare how well the signals rank the gain, per image and per kind of shift."""
    table = results.rows("correlations")
    groups = dict(list(table.groupby("model", sort=False))) if len(table) else {}
    for number, (model, rows) in enumerate(groups.items(), 1):
        columns = list(dict.fromkeys(zip(rows["run"], rows["level"], strict=True)))
        columns.sort(key=lambda column: results.runs.index(column[0]))
        lines = []
        for signal, part in rows.groupby("signal", sort=False):
            by_column = {(row.run, row.level): _correlation(row) for row in part.itertuples()}
            cells = (by_column.get(column, Cell("–")) for column in columns)
            name, free = _SIGNALS.get(signal, signal), "yes" if part["label_free"].all() else "no"
            lines.append(line(name, free, *cells))
        words = {"image": "per image", "corruption": "per kind\nof shift"}
        column_heads = (f"{run},\n{words[level]}" for run, level in columns)
        heads = (model, "known before,\nwithout labels", *column_heads)
        caption = (
            "Spearman's rank correlation with the gain; the gain of one image is −1, 0 or +1. "
            "p, per image: from resampling whole images; per kind of shift, its degrees together: "
            "from permuting the kinds. "
            "n: where the signal is "
            f"known{', first training seed' if results.seeds > 1 else ''}. "
            f"Bold: p below {LEVEL}, not corrected for the number of signals. "
            "Only a signal known before adapting, without labels, can drive a gate."
        )
        caption = caption if number == len(groups) else ""
        yield Table(f"correlations-{model}", "alignment", heads, tuple(lines), caption, left=2)


def _correlation(row: tuple) -> Cell:
    text = f"{row.spearman:+.2f}".replace("-", "−") if is_known(row.spearman) else "–"
    note = f"p {probability(row.p)}, n {row.n:,}" if is_known(row.p) else ""
    return Cell(text, note, "strong" if is_known(row.p) and row.p < LEVEL else "")


def gates(results: Results) -> Iterator[Table]:
    """Compare gain and harm with and without the gate."""
    lines = []
    for (model, run), entry in results.summary.items():
        gated = entry.get("gated")
        if not gated or not is_known(entry["gain"]):
            continue
        lines.append(line(f"{model} · {run}{_rule(results, model, run)}", kind="group"))
        for name, side, share, cost, kind in (
            ("adapts to every image", entry, "100.0", entry["milliseconds_mean"], ""),
            ("with the gate", gated, percent(gated["open"]), gated["milliseconds"], "strong"),
        ):
            clean = points(difference(side["clean_adapted"], entry["clean_source"]))
            flips = (f"{side[key]:,}" for key in ("wrong_to_right", "right_to_wrong"))
            gain = points(side["gain"]), interval(side["gain_low"], side["gain_high"])
            lines.append(line(name, *gain, *flips, clean, share, amount(cost), kind=kind))
    heads = (
        "",
        "gain, points",
        "95 % interval",
        "wrong → right",
        "right → wrong",
        "clean, points",
        "adapted, %",
        "ms per image",
    )
    caption = (
        "Shifted images, but for the clean column. The gate was chosen on source images and sees "
        "no test label. Milliseconds: means, those of the gate included."
    )
    yield Table("gates", "alignment", heads, tuple(lines), caption)


def _rule(results: Results, model: str, run: str) -> str:
    """Write a run's gate in words; nothing if it is unknown."""
    if not (gate := results.tuning(model, run).get("gate")):
        return ""
    sign = "≤" if gate["signal"] == "confidence" else "≥"
    return f": adapts where the {gate['signal']} is {sign} {significant(gate['threshold'])}"


# --- every shift ---------------------------------------------------------------------------------


_SHIFT_HEADS = (
    "shift",
    "n",
    "source, %",
    "adapted, %",
    "gain, points",
    "95 % interval",
    "wrong → right",
    "right → wrong",
    "p",
    "p, Holm",
)


def shifts(results: Results) -> Iterator[Table]:
    """List every shift of every run: accuracies, flips both ways, McNemar's p.

    There is nothing to list where the clean images alone have labels.
    """
    table = results.rows("by_shift", run=list(results.acting))
    if "mcnemar_p" not in table or table[table["shift"] != "clean"]["mcnemar_p"].isna().all():
        return
    for model in results.models:
        for run in results.acting_on(model):
            rows = table[(table["model"] == model) & (table["run"] == run)]
            lines = tuple(_shift_line(row) for row in rows.itertuples())
            folded, entry = f"{model} · {run}", results.summary[model, run]
            if is_known(entry["gain"]) and is_known(entry.get("shifts_helped")):
                helped, hurt = entry["shifts_helped"], entry["shifts_hurt"]
                tested = rows["mcnemar_p"].count()  # clean images among them, unlabeled ones not
                folded += f": better under {helped}, worse under {hurt} of {tested}"
            yield Table(f"shifts-{model}-{run}", "shifts", _SHIFT_HEADS, lines, folded=folded)


def _shift_line(row: tuple) -> Line:
    accuracies = percent(row.accuracy_source), percent(row.accuracy_adapted)
    gain = points(row.gain), interval(row.gain_low, row.gain_high)
    flips = whole(row.wrong_to_right), whole(row.right_to_wrong)
    tests = probability(row.mcnemar_p), probability(row.mcnemar_holm)
    kind = "strong" if row.mcnemar_holm < LEVEL else ""
    return line(shift_name(row.shift), f"{row.n:,}", *accuracies, *gain, *flips, *tests, kind=kind)
