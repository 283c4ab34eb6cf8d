"""The comparison with and without test-time training as text: a plain table, a Markdown table, a few sentences.

All numbers come from the tables that `evaluate` wrote; here they are only put into words. `page` makes the HTML page.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tttlab.evaluation.metrics import verdict
from tttlab.evaluation.results import Results, difference, known

if TYPE_CHECKING:
    from tttlab.config.experiments import Online
    from tttlab.config.images import Shifts
from tttlab.reporting.words import amount, enumerate_words, interval, percent, points, setting

_CLEAN_LOSS = 0.01  # a clean accuracy that falls by more is told in words
ARRIVALS = {  # by adapt.online.shifts
    "separate": "every shift a stream of its own",
    "continual": "the shifts of a severity one after another in one stream, without a reset",
    "gradual": "all shifts in one stream, their severity rising and falling",
    "mixed": "the shifts of a severity mixed in one stream",
}
_MARKDOWN_LIMIT = 7_500  # characters; MLflow cuts a description at 8,000


def rows(results: Results) -> list[dict[str, Any]]:
    """Write the headline table, a row per model and run, all values as text; ``gated`` is the run with its gate."""
    table = []
    for (model, run), entry in results.summary.items():
        table.append(
            {
                "model": model,
                "run": run,
                "source": percent(entry["accuracy_source"]),
                **_outcome(entry, entry["clean_source"]),
                "training": points(entry.get("training_gain")),
                "training_interval": interval(
                    entry.get("training_gain_low"), entry.get("training_gain_high")
                ),
                "training_verdict": verdict(
                    entry.get("training_gain_low"), entry.get("training_gain_high")
                ),
                "seed_sd": percent(entry.get("gain_seed_sd")),
                "changed": percent(results.changed(model, run)),
                "milliseconds_p50": amount(entry["milliseconds_p50"]),
                "milliseconds_p95": amount(entry["milliseconds_p95"]),
                "memory": amount(results.adapted.get((model, run), {}).get("peak_memory_mb")),
                "fell_back": f"{entry['fell_back']:,}",
                "gated": _gated(entry),
            }
        )
    return table


def _outcome(entry: Mapping[str, Any], clean_source: float | None) -> dict[str, str]:
    clean = difference(entry["clean_adapted"], clean_source)
    ends = entry["gain_low"], entry["gain_high"]
    return {
        "adapted": percent(entry["accuracy_adapted"]),
        "gain": points(entry["gain"]),
        "interval": interval(*ends),
        "verdict": verdict(*ends),
        "clean": points(clean),
    }


def _gated(entry: Mapping[str, Any]) -> dict[str, str] | None:
    gated = entry.get("gated")
    if not gated:
        return None
    shares = {"open": percent(gated["open"]), "clean_open": percent(gated["clean_open"])}
    return {
        **_outcome(gated, entry["clean_source"]),
        **shares,
        "milliseconds": amount(gated["milliseconds"]),
    }


def plain_table(results: Results) -> str:
    """Write the comparison for a terminal, a line per model and run: ``61.3 → 66.0  +4.7 [+3.9, +5.5]  clean −0.2``.

    A run that trains says how much of its gain training is; one with a gate has a second line.
    """
    from tabulate import tabulate

    trained = any(results.trains(*key) for key in results.summary)
    lines = []
    for row in rows(results):
        cost = (f"{row['milliseconds_p50']} / {row['milliseconds_p95']}", row["fell_back"])
        if not results.labeled:
            clean = (f"clean {row['clean']}",) if results.clean else ()
            lines.append((row["model"], row["run"], row["changed"], *clean, *cost))
            continue
        own = (f"{row['source']} → {row['adapted']}", row["gain"], row["interval"])
        by_training = (
            (row["training"] if results.trains(row["model"], row["run"]) else "",)
            if trained
            else ()
        )
        lines.append((row["model"], row["run"], *own, *by_training, f"clean {row['clean']}", *cost))
        if gated := row["gated"]:
            own = (
                f"→ {gated['adapted']}",
                gated["gain"],
                gated["interval"],
                *(("",) if trained else ()),
            )
            lines.append(
                (
                    "",
                    "with gate",
                    *own,
                    f"clean {gated['clean']}",
                    f"mean {gated['milliseconds']}",
                    "",
                )
            )
    columns = [("model", "left"), ("run", "left")]
    if results.labeled:
        columns += [("accuracy, %", "right"), ("gain", "right"), ("95 % interval", "left")]
        columns += [("by training", "right"), ("", "left")] if trained else [("", "left")]
    else:
        columns += [("predictions changed, %", "right"), *([("", "left")] if results.clean else [])]
    columns += [("ms p50 / p95", "right"), ("fell back", "right")]
    heads, sides = zip(*columns, strict=True)
    return tabulate(lines, heads, tablefmt="simple", disable_numparse=True, colalign=sides)


def markdown(results: Results, links: Mapping[tuple[str, str], str | None]) -> str:
    """Write the comparison in Markdown: the sentences, the table, whose runs link to their own pages, and what tuning searched.

    Args:
        results: What to tell.
        links: Address of a page by (model, run), where there is one.
    """
    told = [f"**{model}**: {sentence(results, model)}" for model in results.models]
    if results.labeled:
        heads = "without, % | with, % | gain, points | 95 % interval | by training | clean"
        keys = ("source", "adapted", "gain", "interval", "training", "clean", "milliseconds_p50")
    else:
        clean = (" | clean", ("clean",)) if results.clean else ("", ())
        heads, keys = (
            f"predictions changed, %{clean[0]}",
            ("changed", *clean[1], "milliseconds_p50"),
        )
    text = "\n\n".join([*told, f"| model | run | {heads} | ms per image |"])
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
    bold = row["verdict"] in ("helped", "hurt")
    cells = (
        f"**{row[key]}**" if key == "gain" and bold else row[key].replace("–", "") for key in keys
    )
    return f"\n| {' | '.join((model, name, *cells))} |"


def _searches_in_markdown(results: Results, room: int) -> str:
    """List what tuning compared for every run, the chosen values in bold, as far as there is room (characters)."""
    text = ""
    for model, run in results.summary:
        tuning = results.tuning(model, run)
        if line := "; ".join(
            _search_in_markdown(tuning, name) for name in tuning.get("search", ())
        ):
            text = text or "\n\nCompared by tuning, chosen in bold:\n"
            line = f"\n- {model} · {run}: {line}"
            if len(text) + len(line) > room:
                return f"{text}\n- and more in `report.html`"
            text += line
    return text


def _search_in_markdown(tuning: Mapping[str, Any], name: str) -> str:
    chosen = tuning["settings"].get(name)
    values = ", ".join(
        f"**{setting(value)}**" if value == chosen else setting(value)
        for value in tuning["search"][name]
    )
    return f"{name} {values}" + (
        " (no influence: all values tie)" if name in tuning["without_influence"] else ""
    )


def sentence(results: Results, model: str) -> str:
    """Say in plain words which runs helped a model, hurt it, or are undecided, and which settings made no difference."""
    return f"{_about_runs(results, model)} {_about_ties(results, model)}".rstrip()


def _about_runs(results: Results, model: str) -> str:
    entries = {run: results.summary[model, run] for run in results.acting_on(model)}
    if not entries:
        return f"There is nothing to compare: {'this model has' if results.acting else 'params.yaml lists'} only the control."
    if not any(known(entry["gain"]) for entry in entries.values()):
        told = "The test images have no labels, so accuracy is unknown; what is known is how many predictions changed."
        return f"{told} {_about_clean(entries)}".rstrip()
    along = {run: entry for run, entry in entries.items() if run in results.streamed}
    alone = {run: entry for run, entry in entries.items() if run not in along}
    if alone and along:  # a batch knows more than an image: they are not to be compared
        return f"Image by image: {_compare(alone)} On streams: {_compare(along)}"
    return _compare(entries)


def _compare(entries: Mapping[str, Mapping[str, Any]]) -> str:
    runs: dict[str, list[str]] = {
        word: [] for word in ("helped", "hurt", "undecided", "unchanged", "unknown")
    }
    for run in sorted(
        entries, key=lambda run: -(entries[run]["gain"] if known(entries[run]["gain"]) else 0)
    ):
        runs[verdict(entries[run]["gain_low"], entries[run]["gain_high"])].append(run)
    told = [_about_helpers(entries, runs["helped"])] if len(runs["unknown"]) < len(entries) else []
    if runs["hurt"]:
        told.append(f"{enumerate_words(runs['hurt'])} hurt: the interval lies below zero.")
    if runs["undecided"]:
        told.append(f"{enumerate_words(runs['undecided'])}: undecided, the interval includes zero.")
    if runs["unchanged"]:
        told.append(f"{enumerate_words(runs['unchanged'])} made no difference to the accuracy.")
    if runs["unknown"]:
        told.append(f"{enumerate_words(runs['unknown'])}: unknown, too few images for an interval.")
    told += [_about_training(entries), _about_clean(entries), _about_gates(entries)]
    return " ".join(filter(None, told))


def _runs(results: Results) -> str:
    """Count the runs of a model, which may be fewer of one than of another."""
    counts = sorted({len(results.runs_of(model)) for model in results.models})
    return _count(counts[0], "run") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} runs"


def arrival(stream: "Online") -> str:
    """Say how the images of a stream arrive."""
    order = ", one class after another" if stream.order == "by_class" else ""
    return f"{ARRIVALS[stream.shifts]} (batches of {stream.batch_size}{order})"


def about(results: Results, source: str, shifts: "Shifts", stream: "Online") -> str:
    """Say in a sentence what was tested on what.

    Args:
        results: What was found.
        source: Of the test images.
        shifts: As params.yaml has them.
        stream: How the images of streams arrive.
    """
    alone = "each adapted to on its own, from the source weights"
    if streamed := results.streamed:
        some = f"{alone}; {enumerate_words(streamed)}: {arrival(stream)}"
        alone = some if set(results.acting) - set(streamed) else arrival(stream)
    each = " each" if len(results.models) > 1 else ""
    table = results.rows("by_shift")
    own = ~table["shift"].str.contains("/") & (
        (table["shift"] != "clean") | (shifts.clean == "test")
    )  # a set's name has a slash
    tested = int(table[own]["n"].max()) // results.seeds
    trained = (
        f"trained with {results.seeds} seeds{each}" if results.seeds > 1 else f"trained once{each}"
    )
    return (
        f"{_count(len(results.models), 'model')}, {trained}; {_runs(results)}{each}; "
        f"{_count(tested, 'test image')} from {source}, {_seen_under(shifts)}, {alone}, without labels."
    )


def _seen_under(shifts: "Shifts") -> str:
    told = []
    if shifts.corruptions:
        severities = _count(len(shifts.severities), "severity", "severities")
        told.append(
            f"under {_count(len(shifts.corruptions), 'synthetic corruption')} at {severities}"
        )
    told.append("clean" if shifts.clean == "test" else "as they are (clean: the validation images)")
    if shifts.sets:
        told.append(f"those of {enumerate_words(list(shifts.sets))}")
    return enumerate_words(told)


def _count(number: int, word: str, many: str = "") -> str:
    return f"{number} {word if number == 1 else many or word + 's'}"


def _about_helpers(entries: Mapping[str, Mapping[str, Any]], helped: Sequence[str]) -> str:
    if not helped:
        return "No run helped: no interval lies above zero."
    best, *others = helped
    entry = entries[best]
    text = f"{best} helped most, {percent(entry['accuracy_source'])} % → {percent(entry['accuracy_adapted'])} % "
    text += f"({points(entry['gain'])} points, 95 % interval {points(entry['gain_low'])} to {points(entry['gain_high'])})"
    return f"{text}; {enumerate_words(others)} helped too." if others else f"{text}."


def _about_training(entries: Mapping[str, Mapping[str, Any]]) -> str:
    told = []
    for run, entry in entries.items():
        if known(entry.get("training_gain")):
            unclear = verdict(entry["training_gain_low"], entry["training_gain_high"]) in (
                "undecided",
                "unknown",
            )
            told.append(
                f"{run} {points(entry['training_gain'])}{' (undecided)' if unclear else ''}"
            )
    return f"Points by training alone: {', '.join(told)}." if told else ""


def _about_clean(entries: Mapping[str, Mapping[str, Any]]) -> str:
    losses = {
        run: difference(entry["clean_source"], entry["clean_adapted"])
        for run, entry in entries.items()
    }
    losses = {run: loss for run, loss in losses.items() if known(loss)}
    worst = sorted(
        (run for run in losses if losses[run] > _CLEAN_LOSS), key=lambda run: -losses[run]
    )
    if not worst:
        return "No run lost more than one point on clean images." if losses else ""
    return f"On clean images {enumerate_words([f'{run} lost {percent(losses[run])} points' for run in worst])}."


def _about_gates(entries: Mapping[str, Mapping[str, Any]]) -> str:
    gated = {run: _gated(entry) for run, entry in entries.items() if entry.get("gated")}
    told = [f"{run} {gate['gain']} (clean {gate['clean']})" for run, gate in gated.items()]
    return f"With the gate: {', '.join(told)}." if told else ""


def _about_ties(results: Results, model: str) -> str:
    idle = {
        run: results.tuning(model, run).get("without_influence") for run in results.acting_on(model)
    }
    told = [f"{', '.join(names)} of {run}" for run, names in idle.items() if names]
    return f"Tuning: {enumerate_words(told)} had no influence, all values tie." if told else ""
