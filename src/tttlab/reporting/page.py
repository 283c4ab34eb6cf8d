"""The report as one HTML page that needs no network: figures, tables and examples by section."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tttlab.evaluation.results import Results, is_known
from tttlab.evaluation.significance import LEVEL
from tttlab.reporting import about, plots, report
from tttlab.reporting.drawing import Drawing
from tttlab.reporting.headline import rows
from tttlab.reporting.pictures import Flips
from tttlab.reporting.style import base_style
from tttlab.reporting.tables import comparison, distances
from tttlab.reporting.tables.comparison import Table
from tttlab.reporting.tested import Tested
from tttlab.reporting.verdict import Verdict
from tttlab.reporting.words import setting

SECTIONS = {
    "gain": "Gain per {noun}",
    "severity": "Severity",
    "steps": "Along the steps",
    "tuning": "Tuned, default, upper bound",
    "distance": "How far the target is",
    "alignment": "When training helps",
    "flips": "Images whose prediction turned",
    "cost": "Gain and cost",
    "calibration": "Calibration",
    "shifts": "Every shift",
    "examples": "The shifted images",
}
_TABLES = (
    comparison.tuning,
    comparison.searched,
    distances.distance_summary,
    distances.distance_details,
    comparison.correlations,
    comparison.gates,
    comparison.shifts,
)
_MISSING = object()


@dataclass(frozen=True)
class Section:
    """A part of the page that has something to show."""

    name: str
    title: str
    figures: tuple[tuple[str, Drawing], ...]
    tables: tuple[Table, ...]


def render(
    results: Results,
    drawings: Mapping[str, Drawing],
    settings: Mapping[str, Any],
    note: str,
    flips: Sequence[Flips] = (),
    verdicts: Sequence[Verdict] = (),
    svg: Callable[[str, Drawing], str] | None = None,
) -> str:
    """Write the whole page.

    Args:
        results: What to report.
        drawings: From `drawings.draw`.
        settings: The whole of params.yaml.
        note: A sentence on what was tested on what.
        flips: Examples of turned predictions, from `pictures.read_flips`.
        verdicts: What to do with each model, from `verdict.judge_models`.
        svg: Gives a drawing by its name as `to_svg` does; None: `to_svg` itself.
    """
    import jinja2
    from markupsafe import Markup

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["svg"] = lambda named: Markup((svg or to_svg)(*named))
    table = _with_bars(results)
    used, common = _settings_used(results)
    return environment.get_template("report.html").render(
        note=note,
        verdicts=verdicts,
        results=results,
        rows={model: [row for row in table if row["model"] == model] for model in results.models},
        trained=any(results.trains(*key) for key in results.summary),
        memory_known=any(entry.get("peak_memory_mb") for entry in results.adapted.values()),
        level=LEVEL,
        sentences={model: report.sentence(results, model) for model in results.models},
        styles=plots.run_styles(results.runs),
        controls=about.controls(results),
        style=base_style(),
        tested=Tested.of(results),
        overview=[named for named in drawings.items() if named[1].section == "overview"],
        sections=_sections(results, drawings, flips),
        flips=flips,
        used=used,
        common=common,
        settings=_as_yaml(settings),
    )


def to_svg(name: str, drawing: Drawing) -> str:
    """Write a figure as SVG, with its title and caption as the label for screen readers."""
    label = " ".join(filter(None, [drawing.figure.get_suptitle(), drawing.caption]))
    return plots.to_svg(drawing.figure, name, label)


def _sections(
    results: Results, drawings: Mapping[str, Drawing], flips: Sequence[Flips]
) -> list[Section]:
    """Put figures and tables into sections; empty sections are left out."""
    all_tables = [table for make in _TABLES for table in make(results) if table.lines]
    sections = []
    for name, title in SECTIONS.items():
        figures = tuple((key, fig) for key, fig in drawings.items() if fig.section == name)
        tables = tuple(table for table in all_tables if table.section == name)
        if figures or tables or (name == "flips" and flips):
            title = title.format(noun=Tested.of(results).noun)
            sections.append(Section(name, title, figures, tables))
    return sections


def _with_bars(results: Results) -> list[dict[str, Any]]:
    """Make the headline table with positions for the small graphics of the intervals.

    All graphics have one scale from 0 to 100.
    """
    entries = list(results.summary.values())
    sides = [*entries, *(entry["gated"] for entry in entries if entry.get("gated"))]
    ends = [side[key] for side in sides for key in ("gain_low", "gain_high") if is_known(side[key])]
    low, high = min(0, *ends, 0), max(0.001, *ends, 0)

    def position(value: float) -> float:
        return round(4 + 92 * (value - low) / (high - low), 1)

    def bar(side: Mapping[str, Any]) -> dict[str, float] | None:
        if not is_known(side["gain_low"]):
            return None
        return {key: position(side[key]) for key in ("gain_low", "gain", "gain_high")}

    table = rows(results)
    for row, entry in zip(table, entries, strict=True):
        row["bar"], row["zero"] = bar(entry), position(0)
        if row["gated"]:
            row["gated"] |= {"bar": bar(entry["gated"])}
    return table


def _settings_used(results: Results) -> tuple[list[tuple[str, str, str]], str]:
    """List (model, run, settings) as `adapt` used them; put settings common to all apart."""
    used = {key: results.adapted.get(key, {}).get("settings") or {} for key in results.summary}
    first = next(iter(used.values()))
    common = {
        name: value
        for name, value in first.items()
        if all(settings.get(name, _MISSING) == value for settings in used.values())
    }
    table = []
    for (model, run), settings in used.items():
        specific = {name: value for name, value in settings.items() if name not in common}
        table.append((model, run, _as_text(specific)))
    return table, _as_text(common)


def _as_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {setting(value)}"
        for name, value in settings.items()
        if value is not None
    )


def _as_yaml(settings: Mapping[str, Any]) -> str:
    import io

    from ruamel.yaml import YAML

    buffer = io.StringIO()
    writer = YAML()
    writer.default_flow_style = None  # innermost lists and mappings on one line
    writer.width = 100
    writer.dump(dict(settings), buffer)
    return buffer.getvalue()
