"""The report as one HTML page that needs no network: figures, tables and examples put into their sections."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tttlab.evaluation.results import Results, known
from tttlab.reporting import plots
from tttlab.reporting.drawings import Drawing
from tttlab.reporting.pictures import Flips
from tttlab.reporting.report import rows, sentence
from tttlab.reporting.tables import comparison, distances
from tttlab.reporting.tables.comparison import Table
from tttlab.reporting.words import setting

SECTIONS = {
    "gain": "Gain per corruption",
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
_NONE = object()


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
) -> str:
    """Write the whole page.

    Args:
        results: What to tell.
        drawings: From `drawings.draw`.
        settings: The whole of params.yaml.
        note: A sentence on what was tested on what.
        flips: Examples of turned predictions, from `pictures.read_flips`.
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
    environment.filters["svg"] = lambda named: Markup(
        plots.to_svg(named[1].figure, *_names(*named))
    )
    table = _with_bars(results)
    used, common = _settings_used(results)
    return environment.get_template("report.html").render(
        note=note,
        results=results,
        rows={model: [row for row in table if row["model"] == model] for model in results.models},
        trained=any(results.trains(*key) for key in results.summary),
        memory_known=any(entry.get("peak_memory_mb") for entry in results.adapted.values()),
        sentences={model: sentence(results, model) for model in results.models},
        styles=plots.run_styles(results.runs),
        themes=_themes(),
        sections=_sections(results, drawings, flips),
        flips=flips,
        used=used,
        common=common,
        settings=_as_yaml(settings),
    )


def _names(name: str, drawing: Drawing) -> tuple[str, str]:
    """Give a figure's name and what a screen reader says: its title and caption."""
    return name, " ".join(filter(None, [drawing.figure.get_suptitle(), drawing.caption]))


def _themes() -> dict[str, dict[str, str]]:
    """Give the colours of the light and the dark page by name."""
    light = {
        "paper": plots.PAPER,
        "ink": plots.INK,
        "muted": "#5f5f69",
        "grid": plots.GRID,
        "wash": "#f6f6f8",
    }
    dark = {
        "paper": "#15161a",
        "ink": "#e6e6ea",
        "muted": "#9b9ba6",
        "grid": "#34353d",
        "wash": "#1e1f25",
    }
    light |= {"gain": plots.GAIN, "loss": plots.LOSS} | {
        f"run-{number}": color for number, color in enumerate(plots.LIGHT)
    }
    dark |= {"gain": plots.DARK_GAIN, "loss": plots.DARK_LOSS}
    return {
        "light": light,
        "dark": dark | {f"run-{number}": color for number, color in enumerate(plots.DARK)},
    }


def _sections(
    results: Results, drawings: Mapping[str, Drawing], flips: Sequence[Flips]
) -> list[Section]:
    """Put figures and tables into sections; one with nothing in it is left out."""
    tables = [table for make in _TABLES for table in make(results) if table.lines]
    sections = []
    for name, title in SECTIONS.items():
        figures = tuple(
            (key, drawing) for key, drawing in drawings.items() if drawing.section == name
        )
        own = tuple(table for table in tables if table.section == name)
        if figures or own or (name == "flips" and flips):
            sections.append(Section(name, title, figures, own))
    return sections


def _with_bars(results: Results) -> list[dict[str, Any]]:
    """Add to each row where its intervals lie on a common scale, 0 to 100, for the small graphic beside the numbers."""
    entries = list(results.summary.values())
    sides = [*entries, *(entry["gated"] for entry in entries if entry.get("gated"))]
    ends = [side[key] for side in sides for key in ("gain_low", "gain_high") if known(side[key])]
    low, high = min(0, *ends, 0), max(0.001, *ends, 0)

    def place(value: float) -> float:
        return round(4 + 92 * (value - low) / (high - low), 1)

    def bar(side: Mapping[str, Any]) -> dict[str, float] | None:
        return (
            {key: place(side[key]) for key in ("gain_low", "gain", "gain_high")}
            if known(side["gain_low"])
            else None
        )

    table = rows(results)
    for row, entry in zip(table, entries, strict=True):
        row["bar"], row["zero"] = bar(entry), place(0)
        if row["gated"]:
            row["gated"] |= {"bar": bar(entry["gated"])}
    return table


def _settings_used(results: Results) -> tuple[list[tuple[str, str, str]], str]:
    """List (model, run, settings) as `adapt` used them, and apart from them the settings that all have in common."""
    used = {key: results.adapted.get(key, {}).get("settings") or {} for key in results.summary}
    first = next(iter(used.values()))
    common = {
        name: value
        for name, value in first.items()
        if all(other.get(name, _NONE) == value for other in used.values())
    }

    def told(settings: Mapping[str, Any]) -> str:
        return ", ".join(
            f"{name.replace('_', ' ')} {setting(value)}"
            for name, value in settings.items()
            if value is not None
        )

    own = [
        {name: value for name, value in settings.items() if name not in common}
        for settings in used.values()
    ]
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
