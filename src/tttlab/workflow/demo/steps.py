"""How probabilities and the loss change along the steps, and what every step looks at."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from tttlab.reporting.words import significant
from tttlab.serving.showing import Showing
from tttlab.workflow.demo.drawings import leading, panel, percent, picture

MOST_LINES, MOST_VIEWS = 4, 8


def draw_steps(shown: Showing) -> str:
    """Draw class probabilities and the loss along the steps, and the views of every step."""
    curve = shown.says["curve"]
    views = _views(shown)
    if len(curve) < 2:
        if views:
            return panel("What it averages over", views)
        return panel("Step by step", '<p class="note">No step is taken.</p>')
    if shown.gate and not shown.gate.opened:
        note = "The gate is shut, so no step is taken. Switch it off to see what would happen."
        return panel("Step by step", f'<p class="note">{note}</p>')
    # The network itself comes first: before any step the run may re-normalise or average already.
    points = [shown.says["source_probabilities"], *(row["probabilities"] for row in curve)]
    names = leading(points, MOST_LINES)
    lines = {name: [point[name] for point in points] for name in names}
    top = _chart(lines, _tones(names, shown.truth), (0.0, 1.0), ("0 %", "100 %"), percent)
    ticks = "".join(f"<span>{label}</span>" for label in ("without", *range(len(curve))))
    axis = f'<div class="ticks">{ticks}</div><p class="note axis">steps taken</p>'
    return panel("Step by step", f"<h4>probability</h4>{top}{_losses(curve)}{axis}{views}")


def _losses(curve: Sequence[Mapping[str, Any]]) -> str:
    losses = [row["loss"] for row in curve]
    if any(loss is None for loss in losses):
        return ""
    low, high = min(losses), max(losses)
    room = 0.08 * max(high - low, 1e-6 * max(abs(high), 1))
    labels = significant(low), significant(high)
    ends = low - room, high + room
    drawn = _chart({"loss": [None, *losses]}, {"loss": "loss"}, ends, labels, significant)
    return f"<h4>loss it trains on</h4>{drawn}"


def _tones(names: Sequence[str], truth: str | None) -> dict[str, str]:
    """Give the true class its own colour, and the others the next ones."""
    others = iter(range(1, len(names) + 1))
    return {name: "line-0" if name == truth else f"line-{next(others)}" for name in names}


def _chart(
    lines: Mapping[str, Sequence[float | None]],
    tones: Mapping[str, str],
    ends: tuple[float, float],
    labels: tuple[str, str],
    write: Callable[[float], str],
) -> str:
    """Draw lines over "without" and steps 0, 1, …; their names stand at their right ends.

    Args:
        lines: the values of each, None where there is none.
        tones: the class of CSS that colours each.
        ends: of the vertical axis.
        labels: of these ends.
        write: writes a value for people.
    """
    (low, high), drawn, dots, last = ends, [], [], {}
    for name, values in lines.items():
        known = [(i, value) for i, value in enumerate(values) if value is not None]
        places = [
            (100 * i / (len(values) - 1), 100 * (high - value) / (high - low)) for i, value in known
        ]
        points = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
        drawn.append(f'<polyline class="{tones[name]}" points="{points}"/>')
        if places:
            last[name] = places[-1][1]
        for (i, value), (x, y) in zip(known, places, strict=True):
            when = f"step {i - 1}" if i else "without"
            title = escape(f"{name}, {when}: {write(value)}")
            dots.append(
                f'<i class="dot {tones[name]}" title="{title}" '
                f'style="left:{x:.2f}%;top:{y:.2f}%"></i>'
            )
    names = "".join(
        f'<span class="{tones[name]}" style="top:{y:.2f}%">{escape(name)}</span>'
        for name, y in apart(last, 15.0).items()
    )
    return (
        f'<div class="chart"><div class="y"><span>{labels[1]}</span><span>{labels[0]}</span></div>'
        '<div class="plot"><svg viewBox="0 0 100 100" preserveAspectRatio="none" '
        f'aria-hidden="true">{"".join(drawn)}</svg>{"".join(dots)}</div>'
        f'<div class="names">{names}</div></div>'
    )


def apart(places: Mapping[str, float], least: float) -> dict[str, float]:
    """Move places that are too near to each other apart, in their order."""
    order = sorted(places, key=places.__getitem__)
    moved, previous = {}, -math.inf
    for name in order:
        previous = moved[name] = max(places[name], previous + least)
    limit = 100.0
    for name in reversed(order):
        moved[name] = min(moved[name], limit)
        limit = moved[name] - least
    return moved


def _views(shown: Showing) -> str:
    rows = []
    for step, views in enumerate(shown.views, 1):
        crisp = "crisp" if views.shape[1] <= 64 else ""
        pictures = "".join(
            f'<img class="{crisp}" src="{picture(view)}" alt="view">' for view in views[:MOST_VIEWS]
        )
        title = f"<small>step {step}</small>" if len(shown.views) > 1 else ""
        rows.append(f'<div class="views">{title}{pictures}</div>')
    title = "<h4>what every step looks at</h4>" if len(shown.views) > 1 else ""
    return f'{title}<div class="all-views">{"".join(rows)}</div>' if rows else ""
