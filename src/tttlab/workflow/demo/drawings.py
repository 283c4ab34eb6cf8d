"""The parts of the demo's page, as HTML: the pictures and the answer, bars, and the runs.

Plain elements with positions in percent, not pictures: text keeps its size on a phone, and colours
follow the page's theme. Charts whose lines are stretched are SVG without text.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from tttlab.adaptation.gate import ABOVE
from tttlab.evaluation.results import CONTROL, shift_name
from tttlab.reporting.words import amount, enumerate_words, significant
from tttlab.serving.adaptive_model import AdaptiveModel
from tttlab.serving.showing import Showing, does

MOST_BARS = 10
SAID = 0.01  # probabilities from here on are written beside their bars


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


def percent(fraction: float | None) -> str:
    """Write a probability: 0.923 as ``92.3 %``, one that is no number as a dash."""
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def draw_bars(shown: Showing) -> str:
    """Draw the probability of every class without and with adapting, side by side."""
    without, adapted = shown.says["source_probabilities"], shown.says["probabilities"]
    classes = leading([without, adapted], MOST_BARS)
    rows = []
    for name in classes:
        mark = " truth" if name == shown.truth else ""
        bars = "".join(
            f'<span class="bar {side}" title="{percent(values[name])}">'
            f'<i style="width:{100 * (values[name] or 0):.2f}%"></i>'
            f"<b>{percent(values[name]) if (values[name] or 0) >= SAID else ''}</b></span>"
            for side, values in (("source_", without), ("adapted_", adapted))
        )
        rows.append(f'<div class="class{mark}"><span>{escape(name)}</span><div>{bars}</div></div>')
    rows = f'<div style="--label:{min(max(map(len, classes)), 14)}ch">{"".join(rows)}</div>'
    left = len(without) - len(classes)
    more = f'<p class="note">{left} less likely classes are left out.</p>' if left else ""
    return panel("Probability", f"{_legend(shown.run)}{rows}{more}")


def leading(sides: Sequence[Mapping[str, float | None]], count: int) -> list[str]:
    """List the likeliest classes of any of these probabilities, in the order of the classes."""
    best = {name: max(side[name] or 0 for side in sides) for name in sides[0]}
    kept = set(sorted(best, key=best.__getitem__, reverse=True)[:count])
    return [name for name in best if name in kept]


def _legend(run: str) -> str:
    return (
        '<p class="legend"><span class="source_"><i></i>without</span>'
        f'<span class="adapted_"><i></i>with {escape(run)}</span></p>'
    )


def panel(title: str, body: str) -> str:
    """Frame a part of the page."""
    return f'<section class="panel"><h3>{title}</h3>{body}</section>'


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
    return panel("All runs on this image", f"<table><thead>{head}</thead>{''.join(rows)}</table>")


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
