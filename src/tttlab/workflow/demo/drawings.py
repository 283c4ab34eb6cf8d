"""The parts of the demo's page, as HTML: pictures, bars, curves, the scale of distances, the runs.

Plain elements with positions in percent, not pictures: text keeps its size on a phone, and colours
follow the page's theme. Charts whose lines are stretched are SVG without text.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from tttlab.adaptation.gate import ABOVE
from tttlab.evaluation.results import CONTROL, shift_name
from tttlab.reporting.words import amount, enumerate_words, significant
from tttlab.serving.adaptive_model import AdaptiveModel
from tttlab.serving.showing import GateSays, Showing, Spread, does

MOST_BARS, MOST_LINES, MOST_VIEWS = 10, 4, 8
SAID = 0.01  # probabilities from here on are written beside their bars
ENDS = (0.3, 100.0)  # of the scale of distances, at least


def picture(pixels: np.ndarray) -> str:
    """Write pixels ``(S, S, 3)`` as the address of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_answer(shown: Showing, shift: str) -> str:
    """Draw the image, and what the network says of it without and with adapting.

    Args:
        shown: what to draw.
        shift: what was done to the image, for people; empty: nothing.
    """
    says, truth = shown.says, shown.truth
    figures = []
    if shift:
        figures.append(_figure(shown.picture.pixels, "image", "small"))
        figures.append('<span class="arrow">→</span>')
    figures.append(_figure(shown.pixels, shift or "image"))
    cards = _card("without", "source_", says, truth) + _card(f"with {shown.run}", "", says, truth)
    known = "Its class is unknown" if truth is None else f"It is <b>{escape(truth)}</b>"
    return (
        f'<div class="answer"><div class="figures">{"".join(figures)}</div>'
        f'<div class="cards">{cards}</div>'
        f'<p class="said"><span>{known}.</span> {_gate_sentence(shown)}</p></div>'
    )


def _figure(pixels: np.ndarray, caption: str, kind: str = "") -> str:
    crisp = " crisp" if len(pixels) <= 64 else ""
    source, name = picture(pixels), escape(caption)
    return (
        f'<figure class="{kind}{crisp}"><img src="{source}" alt="{name}">'
        f"<figcaption>{name}</figcaption></figure>"
    )


def _card(title: str, side: str, says: Mapping[str, Any], truth: str | None) -> str:
    answer = says[f"{side}class"]
    return (
        f'<div class="card {side or "adapted_"}{_verdict(answer, truth)}">'
        f"<small>{escape(title)}</small>"
        f"<strong>{escape(answer)} {_tick(answer, truth)}</strong>"
        f'<span class="confidence">{percent(says[f"{side}confidence"])}</span></div>'
    )


def _verdict(answer: str, truth: str | None) -> str:
    return "" if truth is None else " right" if answer == truth else " wrong"


def _tick(answer: str, truth: str | None) -> str:
    if truth is None:
        return ""
    return '<i title="right">✓</i>' if answer == truth else '<i title="wrong">✗</i>'


def _gate_sentence(shown: Showing) -> str:
    says, gate = shown.says, shown.gate
    if says["fell_back"]:
        return "Adapting failed, so the answer is the network's own."
    if gate is None:
        return ""
    sign = {True: "≥", False: "<"} if ABOVE[gate.signal] else {True: "≤", False: ">"}
    value, threshold = significant(gate.value), significant(gate.threshold)
    compared = f"{gate.signal} {value} {sign[gate.opened]} {threshold}"
    state = "open: the run adapts" if gate.opened else "shut: the network's own answer stays"
    return f"<span>The gate is <b>{state}</b> ({compared}).</span>"


def percent(fraction: float) -> str:
    """Write a probability: 0.923 as ``92.3 %``."""
    return f"{100 * fraction:.1f} %"


def draw_bars(shown: Showing) -> str:
    """Draw the probability of every class without and with adapting, side by side."""
    without, adapted = shown.says["source_probabilities"], shown.says["probabilities"]
    classes = leading([without, adapted], MOST_BARS)
    rows = []
    for name in classes:
        mark = " truth" if name == shown.truth else ""
        bars = "".join(
            f'<span class="bar {side}" title="{percent(values[name])}">'
            f'<i style="width:{100 * values[name]:.2f}%"></i>'
            f"<b>{percent(values[name]) if values[name] >= SAID else ''}</b></span>"
            for side, values in (("source_", without), ("adapted_", adapted))
        )
        rows.append(f'<div class="class{mark}"><span>{escape(name)}</span><div>{bars}</div></div>')
    rows = f'<div style="--label:{min(max(map(len, classes)), 14)}ch">{"".join(rows)}</div>'
    left = len(without) - len(classes)
    more = f'<p class="note">{left} less likely classes are left out.</p>' if left else ""
    return _panel("Probability", f"{_legend(shown.run)}{rows}{more}")


def leading(sides: Sequence[Mapping[str, float]], count: int) -> list[str]:
    """List the likeliest classes of any of these probabilities, in the order of the classes."""
    best = {name: max(side[name] for side in sides) for name in sides[0]}
    kept = set(sorted(best, key=best.__getitem__, reverse=True)[:count])
    return [name for name in best if name in kept]


def _legend(run: str) -> str:
    return (
        '<p class="legend"><span class="source_"><i></i>without</span>'
        f'<span class="adapted_"><i></i>with {escape(run)}</span></p>'
    )


def _panel(title: str, body: str, note: str = "") -> str:
    said = f' <span class="note">{note}</span>' if note else ""
    return f'<section class="panel"><h3>{title}{said}</h3>{body}</section>'


def draw_steps(shown: Showing) -> str:
    """Draw class probabilities and the loss along the steps, and the views of every step."""
    curve = shown.says["curve"]
    views = _views(shown)
    if len(curve) < 2:
        note = "This run takes no steps." if not views else ""
        body = f'{views}<p class="note">{note}</p>' if note else views
        return _panel("Step by step" if not views else "What it averages over", body)
    if shown.gate and not shown.gate.opened:
        note = "The gate is shut, so no step is taken. Switch it off to see what would happen."
        return _panel("Step by step", f'<p class="note">{note}</p>')
    # The network itself comes first: before any step the run may re-normalise or average already.
    points = [shown.says["source_probabilities"], *(row["probabilities"] for row in curve)]
    names = leading(points, MOST_LINES)
    lines = {name: [point[name] for point in points] for name in names}
    top = _chart(lines, _tones(names, shown.truth), (0.0, 1.0), ("0 %", "100 %"), percent)
    ticks = "".join(f"<span>{label}</span>" for label in ("without", *range(len(curve))))
    axis = f'<div class="ticks">{ticks}</div><p class="note axis">steps taken</p>'
    return _panel("Step by step", f"<h4>probability</h4>{top}{_losses(curve)}{axis}{views}")


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


def draw_scale(
    shown: Showing,
    source: Spread,
    shifts: Mapping[str, float],
    corrupted: tuple[str, Spread] | None,
) -> str:
    """Draw where the image's distance lies, between source images and shifts.

    Args:
        shown: what to draw.
        source: of source images that training did not see.
        shifts: mean distance of every tested shift, by name.
        corrupted: the name of what was done to the image, and where images under it lie.
    """
    distance, gate = shown.says["distance"], shown.gate
    shifts = {name: value for name, value in shifts.items() if name != "clean"}
    every = [distance, source.low, source.high, *shifts.values()]
    if corrupted:
        every += [corrupted[1].low, corrupted[1].high]
    axis = Axis.over(every)
    rows = [_scale_row("source images", _band(axis, source, "source"))]
    if corrupted:
        rows.append(_scale_row(corrupted[0], _band(axis, corrupted[1], "shift")))
    if shifts:
        dots = "".join(
            f'<i class="dot" style="left:{axis.at(value)}" '
            f'title="{escape(shift_name(name))}: {significant(value)}"></i>'
            for name, value in shifts.items()
        )
        rows.append(_scale_row("all tested shifts", dots))
    mark = f'<i class="mark" style="left:{axis.at(distance)}"></i>'
    label = f'<b class="mark-label" style="left:{axis.at(distance)}">{significant(distance)}</b>'
    rows.append(_scale_row("this image", mark + label, "image"))
    ticks = "".join(f'<span style="left:{axis.at(t)}">{t:g}</span>' for t in axis.ticks())
    line = ""
    if gate and gate.signal == "distance":
        line = (
            f'<i class="gate" style="left:{axis.at(gate.threshold)}"></i>'
            f'<b class="gate-label" style="left:{axis.at(gate.threshold)}">'
            f"gate {significant(gate.threshold)}</b>"
        )
    body = (
        f'<div class="scale"><div class="over">{line}</div>{"".join(rows)}'
        f'<div class="scale-row"><span></span><div class="scale-ticks">{ticks}</div></div></div>'
    )
    other = _other_signal(gate) if gate and gate.signal != "distance" else ""
    return _panel("Distance to the training images", body + other)


def _other_signal(gate: GateSays) -> str:
    found, threshold = significant(gate.value), significant(gate.threshold)
    return f'<p class="note">The gate reads the {gate.signal}: {found}, threshold {threshold}.</p>'


def _scale_row(name: str, marks: str, kind: str = "") -> str:
    track = f'<div class="track">{marks}</div>'
    return f'<div class="scale-row {kind}"><span>{escape(name)}</span>{track}</div>'


def _band(axis: "Axis", spread: Spread, kind: str) -> str:
    left, right = axis.place(spread.low), axis.place(spread.high)
    title = f"90 % of the images lie from {significant(spread.low)} to {significant(spread.high)}"
    return (
        f'<i class="band {kind}" title="{title}" '
        f'style="left:{left:.2f}%;width:{max(right - left, 0.6):.2f}%"></i>'
        f'<i class="median {kind}" style="left:{axis.at(spread.middle)}"></i>'
    )


class Axis:
    """A logarithmic axis, in percent of its length."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    @classmethod
    def over(cls, values: Iterable[float]) -> "Axis":
        """Make one that shows all finite values, with some room."""
        known = [value for value in values if math.isfinite(value) and value > 0]
        return cls(
            min([ENDS[0], *(v / 1.15 for v in known)]), max([ENDS[1], *(v * 1.15 for v in known)])
        )

    def place(self, value: float) -> float:
        """Place a value; what is not finite or below stands at the ends."""
        value = self.high if math.isnan(value) else min(max(value, self.low), self.high)
        return 100 * math.log(value / self.low) / math.log(self.high / self.low)

    def at(self, value: float) -> str:
        """Write a value's place for CSS."""
        return f"{self.place(value):.2f}%"

    def ticks(self) -> list[float]:
        """List powers of ten on the axis."""
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        return [10.0**power for power in range(first, last + 1)]


def draw_runs(shown: Showing, model: AdaptiveModel) -> str:
    """Draw the table of all runs on this image; the chosen one is bold."""
    rows = []
    for name, says in shown.runs.items():
        run = model.runs[name]
        what = does(run)
        if name == shown.run and len(says["curve"]) - 1 != run.task.loop.steps:
            what = f"with {len(says['curve']) - 1} steps"
        if says["gate"] is False:
            what += "; gate shut"
        kind = "chosen" if name == shown.run else ""
        rows.append(
            f'<tr class="{kind}"><th>{escape(name)}<small>{escape(what)}</small></th>'
            f"<td>{escape(says['class'])} {_tick(says['class'], shown.truth)}</td>"
            f"<td>{percent(says['confidence'])}</td><td>{amount(says['milliseconds'])}</td></tr>"
        )
    head = "<tr><th>run</th><th>class</th><th>confidence</th><th>ms</th></tr>"
    return _panel("All runs on this image", f"<table><thead>{head}</thead>{''.join(rows)}</table>")


def tell_classes(classes: Sequence[str]) -> str:
    """Say plainly which classes a model knows."""
    shown = [escape(name) for name in classes[:30]]
    more = len(classes) - len(shown)
    names = enumerate_words([*shown, f"{more} more"] if more else shown)
    return (
        f'<p class="note">This network knows {len(classes)} classes: {names}. It calls every '
        "picture one of them, whatever it shows.</p>"
    )


def shift_words(corruption: str | None, severity: int) -> str:
    """Name a corruption for people; empty: none."""
    return f"{shift_name(corruption)} {severity}" if corruption else ""


def run_choices(model: AdaptiveModel) -> list[tuple[str, str]]:
    """List the runs to choose from, each with what it does; the network as it is comes last."""
    names = [name for name in model.runs if name != CONTROL]
    if CONTROL in model.runs:
        names.append(CONTROL)
    return [(f"{name}: {does(model.runs[name])}", name) for name in names]
