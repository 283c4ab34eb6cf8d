"""The comparison as text: a plain table, a Markdown table, a few sentences.

All numbers come from the tables that `evaluate` wrote. `page` makes the HTML page.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tttlab.evaluation.metrics import verdict
from tttlab.evaluation.results import Results, difference, is_known
from tttlab.reporting.headline import gated_outcome, rows
from tttlab.reporting.tested import without_labels
from tttlab.reporting.words import enumerate_words, in_lines, percent, points, setting

_CLEAN_LOSS = 0.01  # sentences report a larger loss of clean accuracy
_NAME = 32  # characters of a name in a line of the terminal
_UNCLEAR = {"undecided": " (undecided)", "unknown": " (too few images to tell)"}
_MARKDOWN_LIMIT = 7_500  # characters; MLflow cuts a description at 8,000


def plain_table(results: Results) -> str:
    """Write the comparison for a terminal, a line per model and run.

    Such as ``61.3 → 66.0  +4.7 [+3.9, +5.5]  clean −0.2``. A run that trains has its gain by
    training too; a run with a gate has a second line. Beneath it stand the shifts without labels,
    where only some have any.
    """
    from tabulate import tabulate

    trained = any(results.trains(*key) for key in results.summary)
    lines = []
    for row in rows(results):
        key = row["model"], row["run"]
        name = ["\n".join(in_lines(part, _NAME)) for part in key]
        cost = f"{row['milliseconds_p50']} / {row['milliseconds_p95']}", row["fell_back"]
        clean = [f"clean {row['clean']}"] if results.clean else []
        if not results.labeled:
            lines.append((*name, row["changed"], *clean, *cost))
            continue
        accuracy = f"{row['source']} → {row['adapted']}", row["gain"], row["interval"]
        training = [row["training"] if results.trains(*key) else ""] if trained else []
        lines.append((*name, *accuracy, *training, *clean, *cost))
        if gated := row["gated"]:
            accuracy = f"→ {gated['adapted']}", gated["gain"], gated["interval"]
            training = [""] if trained else []
            clean = [f"clean {gated['clean']}"] if results.clean else []
            cost = f"mean {gated['milliseconds']}", ""
            lines.append(("", "with gate", *accuracy, *training, *clean, *cost))
    columns = [("model", "left"), ("run", "left")]
    if results.labeled:
        columns += [("accuracy, %", "right"), ("gain", "right"), ("95 % interval", "left")]
        columns += [("by training", "right")] if trained else []
    else:
        columns += [("predictions changed, %", "right")]
    columns += [("", "left")] if results.clean else []
    columns += [("ms p50 / p95", "right"), ("fell back", "right")]
    heads, sides = zip(*columns, strict=True)
    text = tabulate(lines, heads, tablefmt="simple", disable_numparse=True, colalign=sides)
    return f"{text}\n{without_labels(results)}".rstrip("\n")


def markdown(results: Results, links: Mapping[tuple[str, str], str | None]) -> str:
    """Write the comparison in Markdown: sentences, a table, and the values that tuning compared.

    Args:
        results: What to report.
        links: Address of the run's page by (model, run), or None.
    """
    sentences = [f"**{model}**: {sentence(results, model)}" for model in results.models]
    sentences += filter(None, [without_labels(results)])
    if results.labeled:
        heads = "without, % | with, % | gain, points | 95 % interval | by training"
        keys = ["source", "adapted", "gain", "interval", "training"]
    else:
        heads, keys = "predictions changed, %", ["changed"]
    heads += " | clean" if results.clean else ""
    keys += ["clean", "milliseconds_p50"] if results.clean else ["milliseconds_p50"]
    text = "\n\n".join([*sentences, f"| model | run | {heads} | ms per image |"])
    text += f"\n|---|---|{'--:|' * len(keys)}"
    for row in rows(results):
        link = links.get((row["model"], row["run"]))
        name = f"[{row['run']}]({link})" if link else row["run"]
        lines = [_markdown_line(row["model"], name, row, keys)]
        if row["gated"] and results.labeled:
            gated = {
                **row["gated"],
                "source": row["source"],
                "training": "",
                "milliseconds_p50": row["gated"]["milliseconds"],
            }
            lines.append(_markdown_line(row["model"], f"{row['run']} with gate", gated, keys))
        if len(text) + sum(map(len, lines)) > _MARKDOWN_LIMIT:
            return f"{text}\n\nMore rows are in the artifact `comparison.json`."
        text += "".join(lines)
    text += _searches_in_markdown(results, _MARKDOWN_LIMIT - len(text))
    return f"{text}\n\nFigures and the page `report.html` are among the artifacts."


def _markdown_line(model: str, name: str, row: Mapping[str, Any], keys: Sequence[str]) -> str:
    cells = {key: row[key].replace("–", "") for key in keys}
    if "gain" in cells and row["verdict"] in ("helped", "hurt"):
        cells["gain"] = f"**{row['gain']}**"
    return f"\n| {' | '.join((model, name, *cells.values()))} |"


def _searches_in_markdown(results: Results, room: int) -> str:
    """List the values that tuning compared for every run, chosen ones in bold.

    The list ends where it would exceed ``room`` characters.
    """
    text = ""
    for model, run in results.summary:
        tuning = results.tuning(model, run)
        searches = [_search_in_markdown(tuning, name) for name in tuning.get("search", ())]
        if searches:
            text = text or "\n\nCompared by tuning, chosen in bold:\n"
            line = f"\n- {model} · {run}: {'; '.join(searches)}"
            if len(text) + len(line) > room:
                return f"{text}\n- and more in `report.html`"
            text += line
    return text


def _search_in_markdown(tuning: Mapping[str, Any], name: str) -> str:
    in_use = tuning["settings"].get(name)
    values = ", ".join(
        f"**{setting(value)}**" if value == in_use else setting(value)
        for value in tuning["search"][name]
    )
    idle = name in tuning["without_influence"]
    return f"{name} {values}" + (" (no influence: all values tie)" if idle else "")


def sentence(results: Results, model: str) -> str:
    """Say which runs helped or hurt a model, or are undecided, and which settings had no effect."""
    return f"{_about_runs(results, model)} {_about_ties(results, model)}".rstrip()


def _about_runs(results: Results, model: str) -> str:
    entries = {run: results.summary[model, run] for run in results.acting_on(model)}
    if not entries:
        reason = "this model has" if results.acting else "params.yaml lists"
        return f"There is nothing to compare: {reason} only the control."
    if not any(is_known(entry["gain"]) for entry in entries.values()):
        unlabeled = (
            "The test images have no labels, so accuracy is unknown; "
            "what is known is how many predictions changed."
        )
        return f"{unlabeled} {_about_clean(entries)}".rstrip()
    on_streams = {run: entry for run, entry in entries.items() if run in results.streamed}
    by_image = {run: entry for run, entry in entries.items() if run not in on_streams}
    if by_image and on_streams:  # not comparable: a batch carries more information than an image
        return f"Image by image: {_compare(by_image)} On streams: {_compare(on_streams)}"
    return _compare(entries)


def _compare(entries: Mapping[str, Mapping[str, Any]]) -> str:
    verdicts = ("helped", "hurt", "undecided", "unchanged", "unknown")
    runs: dict[str, list[str]] = {word: [] for word in verdicts}
    gains = {run: entry["gain"] if is_known(entry["gain"]) else 0 for run, entry in entries.items()}
    for run in sorted(entries, key=lambda run: -gains[run]):
        runs[verdict(entries[run]["gain_low"], entries[run]["gain_high"])].append(run)
    names = {word: enumerate_words(names) for word, names in runs.items() if names}
    sentences = []
    if len(runs["unknown"]) < len(entries):
        sentences.append(_about_helpers(entries, runs["helped"]))
    if runs["hurt"]:
        sentences.append(f"{names['hurt']} hurt: the interval lies below zero.")
    if runs["undecided"]:
        sentences.append(f"{names['undecided']}: undecided, the interval includes zero.")
    if runs["unchanged"]:
        sentences.append(f"{names['unchanged']} made no difference to the accuracy.")
    if runs["unknown"]:
        sentences.append(f"{names['unknown']}: unknown, too few images for an interval.")
    sentences += [_about_training(entries), _about_clean(entries), _about_gates(entries)]
    return " ".join(filter(None, sentences))


def _about_helpers(entries: Mapping[str, Mapping[str, Any]], helped: Sequence[str]) -> str:
    if not helped:
        return "No run helped: no interval lies above zero."
    best, *rest = helped
    entry = entries[best]
    source, adapted = percent(entry["accuracy_source"]), percent(entry["accuracy_adapted"])
    gain, low, high = (points(entry[key]) for key in ("gain", "gain_low", "gain_high"))
    text = (
        f"{best} helped most, {source} % → {adapted} % "
        f"({gain} points, 95 % interval {low} to {high})"
    )
    return f"{text}; {enumerate_words(rest)} helped too." if rest else f"{text}."


def _about_training(entries: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for run, entry in entries.items():
        if is_known(entry.get("training_gain")):
            word = verdict(entry["training_gain_low"], entry["training_gain_high"])
            parts.append(f"{run} {points(entry['training_gain'])}{_UNCLEAR.get(word, '')}")
    return f"Points by training alone: {', '.join(parts)}." if parts else ""


def _about_clean(entries: Mapping[str, Mapping[str, Any]]) -> str:
    losses = {}
    for run, entry in entries.items():
        loss = difference(entry["clean_source"], entry["clean_adapted"])
        if is_known(loss):
            losses[run] = loss
    if not losses:
        return ""
    worst = sorted((run for run in losses if losses[run] > _CLEAN_LOSS), key=lambda r: -losses[r])
    if not worst:
        return "No run lost more than one point on clean images."
    parts = [f"{run} lost {percent(losses[run])} points" for run in worst]
    return f"On clean images {enumerate_words(parts)}."


def _about_gates(entries: Mapping[str, Mapping[str, Any]]) -> str:
    gated = {run: gated_outcome(entry) for run, entry in entries.items() if entry.get("gated")}
    parts = [
        f"{run} {gate['gain']}"
        + (f" (clean {gate['clean']})" if is_known(entries[run]["clean_source"]) else "")
        for run, gate in gated.items()
    ]
    return f"With the gate: {', '.join(parts)}." if parts else ""


def _about_ties(results: Results, model: str) -> str:
    idle = {r: results.tuning(model, r).get("without_influence") for r in results.acting_on(model)}
    parts = [f"{', '.join(names)} of {run}" for run, names in idle.items() if names]
    return f"Tuning: {enumerate_words(parts)} had no influence, all values tie." if parts else ""
