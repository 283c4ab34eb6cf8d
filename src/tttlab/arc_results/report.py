"""The report on ARC as one HTML page that needs no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tttlab.arc.results import (
    read_about,
    read_alignment,
    read_answers,
    read_json,
    read_table,
    read_tasks,
    read_votes,
)
from tttlab.arc_results import grids
from tttlab.arc_results.agreement import Agreement, summarise
from tttlab.arc_results.evaluating import FULL
from tttlab.arc_results.examples import Example, gather
from tttlab.arc_results.figures import curves
from tttlab.evaluation.results import CONTROL, is_known
from tttlab.reporting import page, plots
from tttlab.reporting.drawing import Drawing
from tttlab.reporting.style import base_style
from tttlab.reporting.words import amount, interval, percent, points, probability, setting

SHOWN = 12  # tasks of a group that are not folded
MEANINGS = {  # of the runs in arc/params.yaml
    CONTROL: "no test-time training",
    "token": "only the task tokens are trained",
    FULL: "every weight is trained, for each task anew",
    "joint": "every weight, one network for all tasks together",
    "scratch": "every weight, without offline training",
}
GROUPS = {
    "won": (
        "Solved by test-time training",
        "Solved after test-time training, and not by the same network without it.",
    ),
    "lost": ("Lost", "Solved without test-time training, and not after it."),
    "never": ("Never solved", "Solved neither without test-time training nor after it."),
    "both": ("Solved both ways", "Solved without test-time training and after it."),
}


def write_report(outputs: Path) -> Path:
    """Write ``report.html`` from what `prepare`, `adapt` and `evaluate` left.

    Args:
        outputs: the folder of outputs.

    Returns:
        where the page lies.

    Raises:
        UserError: a file is missing.
    """
    metrics = read_json(outputs / "metrics.json", "evaluate")
    runs = list(metrics["runs"])
    tasks = read_tasks(outputs)
    focus = focus_of(runs)
    groups: dict[str, list[Example]] = {}
    if focus and CONTROL in runs:
        scores = read_table(outputs, "scores")
        groups = gather(
            tasks,
            read_answers(outputs),
            tuple(read_votes(outputs, run) for run in (CONTROL, focus)),
            tuple(scores[scores["run"] == run] for run in (CONTROL, focus)),
        )
    text = render(
        metrics,
        groups,
        curve=read_table(outputs, "curve"),
        about=read_about(outputs, runs),
        agreement=summarise(read_alignment(outputs)),
        sizes={
            "trained_on": len(read_tasks(outputs, "training")),
            "invented": len(read_tasks(outputs, "invented")),
            "side": max(task.longest_side for task in tasks),
        },
    )
    path = outputs / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def focus_of(runs: Sequence[str]) -> str | None:
    """Choose the run that the page is about: `FULL`, else the first that trains."""
    acting = [run for run in runs if run != CONTROL]
    return FULL if FULL in acting else next(iter(acting), None)


def render(
    metrics: Mapping[str, Any],
    groups: Mapping[str, Sequence[Example]],
    *,
    curve: Any,
    about: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, int],
    agreement: Agreement | None = None,
) -> str:
    """Write the whole page.

    Args:
        metrics: what stands in ``metrics.json``.
        groups: from `examples.gather`; empty without a run to compare.
        curve: ``tables/curve.csv``.
        about: the runs' settings.
        agreement: of the gradients of demonstrations and answers; None: unknown.
        sizes: trained_on (tasks of the offline training) and side (longest of a given grid).
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"grid": grids.to_svg, "size": grids.size}
    runs = list(metrics["runs"])
    focus = focus_of(runs)
    return environment.get_template("report.html").render(
        style=base_style(),
        digits=grids.digits(),
        cell=grids.cell_pixels,
        focus=focus,
        control=CONTROL if CONTROL in runs else None,
        headline=headline(metrics),
        tasks=max(entry["tasks"] for entry in metrics["runs"].values()),
        sizes=sizes,
        rows=run_rows(metrics),
        against=comparison_rows(metrics, focus),
        voting=voting_rows(metrics),
        figure=_figure(curve, runs, focus) if focus else None,
        groups=[(key, *GROUPS[key], members) for key, members in groups.items()],
        shown=SHOWN,
        agreement=agreement,
        settings=[(run, _as_text(about[run])) for run in runs],
    )


def headline(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """Answer in a sentence whether test-time training solves what the network alone does not.

    Returns:
        the sentence, and others on certainty and cost.
    """
    entries = metrics["runs"]
    focus = focus_of(list(entries))
    if focus is None or CONTROL not in entries:
        solved = (f"{run} solves {e['solved']} of {e['tasks']} tasks" for run, e in entries.items())
        return f"Nothing to compare: {'; '.join(solved)}.", ""
    after, before = entries[focus], entries[CONTROL]
    gain = metrics["comparisons"][focus][CONTROL]["pass2"]
    low, high = gain["gain_low"], gain["gain_high"]
    start = "Undecided at this number of tasks."
    if is_known(low) and low > 0:
        start = "Yes."
    elif is_known(high) and high < 0:
        start = "No, it hurts."
    return (
        f"{start} With test-time training the network solves {after['solved']} of "
        f"{after['tasks']} tasks, without it {before['solved']}.",
        f"That is {points(gain['gain'])} points, 95 % interval {interval(low, high)}; "
        f"tasks won: {gain['won']}, lost: {gain['lost']}. "
        f"It takes {seconds(after)} per task in place of {seconds(before)}.",
    )


def seconds(entry: Mapping[str, Any]) -> str:
    """Write how long a task takes: ``0.31 s``, ``41.2 s``."""
    return f"{amount(entry['seconds_per_task'])}\N{NO-BREAK SPACE}s"


def run_rows(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """Write the table of runs, all values as text."""
    rows = []
    for run, entry in metrics["runs"].items():
        against = metrics["comparisons"].get(run, {}).get(CONTROL, {}).get("pass2")
        rows.append(
            {
                "run": run,
                "meaning": MEANINGS.get(run, ""),
                "steps": f"{entry['steps']:,}",
                "solved": f"{entry['solved']} of {entry['tasks']}",
                "solved_interval": _range(entry, "pass2"),
                "pass1": percent(entry["pass1"]),
                "pass1_interval": _range(entry, "pass1"),
                "one_view": percent(entry["pass1_one_view"]),
                "won": f"{against['won']} / {against['lost']}" if against else "",
                "p": probability(against["p"]) if against else "",
                "seconds": amount(entry["seconds_per_task"]),
                "fell_back": str(entry["fell_back"]),
            }
        )
    return rows


def comparison_rows(metrics: Mapping[str, Any], focus: str | None) -> list[dict[str, str]]:
    """Write how the focus does against every other run, by pass@2."""
    against = metrics["comparisons"].get(focus, {})
    return [
        {"name": run, "meaning": MEANINGS.get(run, ""), **_outcome(measures["pass2"])}
        for run, measures in sorted(against.items(), key=lambda item: item[0] == CONTROL)
    ]


def voting_rows(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """Write what voting adds to one view in every run, by pass@1."""
    return [
        {
            "name": run,
            "before": percent(metrics["runs"][run]["pass1_one_view"]),
            "after": percent(metrics["runs"][run]["pass1"]),
            **_outcome(outcome),
        }
        for run, outcome in metrics["votes_over_one_view"].items()
    ]


def _outcome(outcome: Mapping[str, Any]) -> dict[str, str]:
    low, high = outcome["gain_low"], outcome["gain_high"]
    decided = is_known(low) and (low > 0 or high < 0)
    return {
        "gain": points(outcome["gain"]),
        "interval": interval(low, high),
        "won": f"{outcome['won']} / {outcome['lost']}",
        "p": probability(outcome["p"]),
        "kind": "" if decided else "undecided",
    }


def _range(entry: Mapping[str, Any], measure: str) -> str:
    return f"{percent(entry[f'{measure}_low'])} – {percent(entry[f'{measure}_high'])}"


def _figure(curve: Any, runs: Sequence[str], focus: str) -> Any:
    from markupsafe import Markup

    title = "Tasks solved by the steps of test-time training"
    caption = f"Shaded: the 95 % interval of {focus}."
    figure = curves(curve, plots.run_styles(runs), focus, title)
    return Markup(page.to_svg("steps", Drawing(figure, "steps", caption)))


def _as_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {setting(value)}"
        for name, value in settings.items()
        if is_shown(name, value)
    )


def is_shown(name: str, value: Any) -> bool:
    """Tell whether a setting is for people: not the id of a run, and not one that is not set."""
    return not name.endswith("_id") and value is not None and not isinstance(value, dict)
