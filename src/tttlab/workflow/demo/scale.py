"""Where an image's distance lies, between the source images and the shifts."""

import math
from collections.abc import Iterable, Mapping
from html import escape

from tttlab.evaluation.results import shift_name
from tttlab.reporting.words import significant
from tttlab.serving.showing import GateSays, Showing, Spread
from tttlab.workflow.demo.drawings import panel

ENDS = (0.3, 100.0)  # of the scale, at least


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
    distance = math.nan if distance is None else distance
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
    return panel("Distance to the training images", body + other)


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
