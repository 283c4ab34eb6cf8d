"""The verdict on a model: one sentence on what to do at test time, and the lines that do it.

What is recommended is the run that tuning scored highest, on source images under corruptions that
are never tested on; a run that trains only where it leads the others by more than a standard error.
The test images only tell how it did.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tttlab.evaluation.metrics import verdict as judge
from tttlab.evaluation.recommendation import best_tuned, lead, recommend
from tttlab.evaluation.results import CONTROL, Results, difference, is_known
from tttlab.reporting.lines import Source, write_code
from tttlab.reporting.tested import without_labels
from tttlab.reporting.words import amount, enumerate_words, interval, percent, points

if TYPE_CHECKING:
    from tttlab.config.params import Params

# What a run does to a network, as an order and as a noun.
WORDS = {
    "normalise": ("re-normalise", "re-normalising"),
    "average": ("average over views", "averaging over views"),
    "train": ("train on the image", "training on the image"),
    "other": ("adapt", "adapting"),
}
ALONE = ("normalise", "average")
_ESTIMATE = "estimated_accuracy_atc"


class Verdict(NamedTuple):
    """What to do with a model at test time.

    Attributes:
        model: its name.
        run: the run that tuning recommends; None: leave the network as it is.
        sentence: what that did to the test images.
        code: Python that adapts images by this run; empty where the sentence advises against it.
    """

    model: str
    run: str | None
    sentence: str
    code: str = ""


def actions(results: Results, model: str, run: str) -> tuple[str, ...]:
    """List what a run does to a model: keys of `WORDS`, in their order."""
    record = results.adapted.get((model, run), {})
    settings = record.get("settings") or {}
    by_policy = settings.get("normalisation", "source") != "source"
    done = {
        "normalise": by_policy or bool(record.get("normalises")),
        "average": bool(settings.get("average") or record.get("averages")),
        "train": results.trains(model, run) or bool(settings.get("steps")),
    }
    return tuple(name for name, does in done.items() if does) or ("other",)


def sentence(results: Results, model: str) -> str:
    """Say in one sentence what to do with a model, how that did, and what each step alone gives.

    A second one names the shifts without labels, where only some have any.
    """
    run = recommend(results.records(model))
    if not results.acting_on(model):
        reason = "this model has" if results.acting else "params.yaml lists"
        return f"There is nothing to judge: {reason} only the control."
    if not results.labeled:
        return f"{_without_labels(results, model, run)}."
    first = _recommended(results, model, run) if run else _left_alone(results, model)
    parts = [first, _compared(results, model), _before_test_time(results, model)]
    return f"{'; '.join(filter(None, parts))}. {without_labels(results)}".rstrip()


def _names(results: Results, model: str, run: str, form: int = 0) -> str:
    words = enumerate_words([WORDS[name][form] for name in actions(results, model, run)])
    return f"{words} (run {run})"


def _recommended(results: Results, model: str, run: str) -> str:
    """Say how the recommended run did on the test images."""
    entry = results.summary[model, run]
    ends = entry["gain_low"], entry["gain_high"]
    gain = f"{points(entry['gain'])} points"
    if all(map(is_known, ends)):
        gain += f" (95 % interval {' to '.join(map(points, ends))})"
    accuracies = (percent(entry[f"accuracy_{side}"]) for side in ("source", "adapted"))
    rise = "from {} % to {} %".format(*accuracies)
    price = _price(entry)
    order, noun = (_names(results, model, run, form) for form in (0, 1))
    kind = judge(*ends)
    if kind == "helped":
        return f"{order[0].upper()}{order[1:]}: the shifted images went {rise}, {gain}, {price}"
    if kind == "hurt":
        return (
            f"Leave the network as it is: {noun}, which tuning on source images recommends, hurt "
            f"the shifted images, {rise}, {gain}, {price}"
        )
    if kind == "unchanged":
        return (
            f"Leave the network as it is: {noun}, which tuning on source images recommends, "
            f"changed no prediction of the shifted images, {price}"
        )
    why = "which includes zero" if kind == "undecided" else "too few images to tell"
    return (
        f"Undecided: {noun}, which tuning on source images recommends, took the shifted images "
        f"{rise}, {gain}, {why}, {price}"
    )


def _price(entry: Mapping[str, Any]) -> str:
    clean = difference(entry["clean_adapted"], entry["clean_source"])
    on_clean = f"{points(clean)} points on clean images, " if is_known(clean) else ""
    return f"{on_clean}{amount(entry['milliseconds_p50'])} ms per image"


def _left_alone(results: Results, model: str) -> str:
    tuned = [lead(results.tuning(model, run)) for run in _single(results, model)]
    if not any(map(is_known, tuned)):
        return "Nothing is recommended, for no run for single images was tuned"
    words = "Leave the network as it is: on source images under held-out corruptions"
    ahead = best_tuned({run: results.tuning(model, run) for run in _single(results, model)})
    if ahead and lead(results.tuning(model, ahead)) > 0:  # it trains, and may lead by chance
        return f"{words} {ahead} scored above it, but by no more than its standard error"
    return f"{words} no run scored above it"


def _compared(results: Results, model: str) -> str:
    """Give the gain of re-normalising alone, averaging alone, and of the steps of training.

    The recommended run's own gain is told already. Re-normalising alone is the run that does it as
    the recommended one does, where there is one: only that tells what the rest adds.
    """
    runs = _single(results, model)
    chosen = recommend(results.records(model))
    alone = {name: [r for r in runs if actions(results, model, r) == (name,)] for name in ALONE}
    rule = _normalisation(results, model, chosen)
    alike = [r for r in alone["normalise"] if _normalisation(results, model, r) == rule]
    alone["normalise"] = alike or alone["normalise"]
    parts = [
        _gain(f"{WORDS[name][1]} alone", run, results.summary[model, run], "gain")
        for name, of_kind in alone.items()
        if (run := _best(of_kind, results, model)) not in (None, chosen)
    ]
    run = _best([r for r in runs if results.trains(model, r)], results, model)
    if run and not (run == chosen and actions(results, model, run) == ("train",)):
        entry = results.summary[model, run]
        parts.append(_gain("the steps of training", run, entry, "training_gain"))
    if run and (clause := _above_control(run, results.summary[model, run])):
        parts.append(clause)
    verdicts = {run: _judged(results, model, run) for run in results.acting_on(model)}
    helpers = [run for run in runs if verdicts[run] == "helped"]
    if parts and not helpers and any(verdicts[run] != "unknown" for run in runs):
        on_streams = "helped" in verdicts.values()
        what = "no run for single images helped" if on_streams else "nothing helped"
        parts[0] = f"{what}: {parts[0]}"
    clauses = [", ".join(parts)] if parts else []
    if helpers and chosen not in helpers:
        clauses.append(
            f"that {enumerate_words(helpers)} helped is known from these test images alone, so "
            "confirm it on others"
        )
    return "; ".join(clauses)


def _before_test_time(results: Results, model: str) -> str:
    """Name the networks that without adapting are ahead of this one with what is recommended."""
    table = results.rows("networks", model=model)
    ahead = table[table["lead_low"] > 0].sort_values("lead", ascending=False) if len(table) else []
    if not len(ahead):
        return ""
    best, *others = ahead.to_dict("records")
    names = enumerate_words([row["other"] for row in others]) if others else ""
    more = f", and so {'are' if len(others) > 1 else 'is'} {names}" if others else ""
    gain = f"{points(best['lead'])} {interval(best['lead_low'], best['lead_high'])}"
    return f"without adapting, {best['other']} is {gain} ahead of that{more}"


def _normalisation(results: Results, model: str, run: str | None) -> str | None:
    return (results.adapted.get((model, run), {}).get("settings") or {}).get("normalisation")


def _single(results: Results, model: str) -> list[str]:
    """List the runs for single images, without the control; only these are recommended."""
    return [run for run in results.acting_on(model) if run not in results.streamed]


def _judged(results: Results, model: str, run: str) -> str:
    entry = results.summary[model, run]
    return judge(entry["gain_low"], entry["gain_high"])


def _best(runs: Sequence[str], results: Results, model: str) -> str | None:
    """Choose the run that tuning scored highest, else the first; the test has no say."""
    best = best_tuned({run: results.tuning(model, run) for run in runs})
    return best or next(iter(runs), None)


def _gain(what: str, run: str, entry: Mapping[str, Any], name: str) -> str:
    return f"{what} (run {run}) {_with_interval(entry, name)}"


def _with_interval(entry: Mapping[str, Any], name: str) -> str:
    ends = entry[f"{name}_low"], entry[f"{name}_high"]
    kind = judge(*ends)
    if kind == "unknown":
        return f"{points(entry[name])} (too few images to tell)"
    unclear = " (undecided)" if kind == "undecided" else ""
    return f"{points(entry[name])} {interval(*ends)}{unclear}"


def _above_control(run: str, entry: Mapping[str, Any]) -> str:
    """Say what the run gives above the best control of no more time; empty where it is unknown."""
    control = entry.get("control")
    if not is_known(entry.get("over_control")) or control == CONTROL:
        return ""
    what = (
        f"{run} above {control}, which tuning scored highest of the runs that train nothing and "
        "take no more time,"
    )
    return f"{what} {_with_interval(entry, 'over_control')}"


def _without_labels(results: Results, model: str, run: str | None) -> str:
    """Say what is known without labels: on source images, of predictions, and of distances."""
    parts = ["The test images have no labels, so that their accuracy is unknown"]
    if run:
        entry, gain = results.summary[model, run], results.tuning(model, run)["gain"]
        parts.append(
            f"tuning on source images under held-out corruptions recommends "
            f"{_names(results, model, run, 1)}, {points(gain)} points there"
        )
        changed = percent(results.changed(model, run))
        parts.append(f"it changes {changed} % of the test images' predictions, {_price(entry)}")
    else:
        parts.append(_left_alone(results, model)[0].lower() + _left_alone(results, model)[1:])
    return "; ".join([*parts, *_distance(results, model)])


def _distance(results: Results, model: str) -> list[str]:
    """Say how far the shifted images lie, and which accuracy is estimated for them."""
    parts, table = [], results.rows("by_shift", model=model, run=results.runs_of(model)[0])
    clean = table["shift"] == "clean"
    near, far = table[clean]["distance"].mean(), table[~clean]["distance"].mean()
    if is_known(far):
        beside = f", that of clean images {amount(near)}" if is_known(near) else ""
        parts.append(f"their distance to the source is {amount(far)}{beside}")
    table = results.rows("distances", model=model, reference="labeled", metric=_ESTIMATE)
    estimates = table[table["target"] != "clean"]["value"] if len(table) else table
    if len(estimates):
        parts.append(
            f"the accuracy of the network as it is, estimated from its confidence, is "
            f"{percent(estimates.mean())} %"
        )
    return parts


def judge_models(results: Results, params: "Params", outputs: Path) -> list[Verdict]:
    """Judge every model, and write the lines for the run that is recommended.

    Args:
        results: what was found.
        params: all settings.
        outputs: the folder that the lines load the network from.
    """
    verdicts = []
    for model in results.models:
        run, code = recommend(results.records(model)), ""
        if run and _judged(results, model, run) not in ("hurt", "unchanged"):
            code = lines_of(results, params, outputs, model, run)
        verdicts.append(Verdict(model, run, sentence(results, model), code))
    return verdicts


def lines_of(results: Results, params: "Params", outputs: Path, model: str, run: str) -> str:
    """Write the lines that adapt images as a run did to the network of the first training seed."""
    record, method = results.adapted[model, run], params.run_settings(run, model).method
    module = method if "." in method else f"tttlab.methods.{method}"
    source = Source(params.source_stats.images, params.seed) if record.get("measures") else None
    key = f"{model}/{params.seeds[0]}"
    return write_code(record["settings"], module, params.adapt.augment, outputs, key, source)
