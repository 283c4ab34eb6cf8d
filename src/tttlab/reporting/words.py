"""How numbers, settings and lists are written for a reader."""

from collections.abc import Sequence
from typing import Any

from tttlab.evaluation.results import is_known


def percent(fraction: float | None) -> str:
    """Write a fraction as a percentage: 0.613 as ``61.3``; an unknown one as a dash."""
    return f"{100 * fraction:.1f}" if is_known(fraction) else "–"


def points(fraction: float | None) -> str:
    """Write a difference of fractions in percentage points with its sign: 0.047 as ``+4.7``."""
    if not is_known(fraction):
        return "–"
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """Write an interval in percentage points: ``[+3.9, +5.5]``."""
    return f"[{points(low)}, {points(high)}]" if is_known(low) and is_known(high) else "–"


def amount(value: float | None) -> str:
    """Write a cost with as many digits as matter: 0.05, 4.57, 18.3, 183, 12,400."""
    if not is_known(value):
        return "–"
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{decimals}f}"


def significant(value: float | None) -> str:
    """Write a number of any size: 0.00412, 0.412, 41.2, 4,120."""
    if not is_known(value):
        return "–"
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "−")


def probability(p: float | None) -> str:
    """Write a p-value: 0.31, 0.004 or < 0.001."""
    if not is_known(p):
        return "–"
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if p < 0.095 else f"{p:.2f}"


def whole(number: float | None) -> str:
    """Write a whole number, also of a column with holes: 12,400; an unknown one as a dash."""
    return f"{int(number):,}" if is_known(number) else "–"


def setting(value: Any) -> str:
    """Write a setting's value as in params.yaml: 0.03, null, true, ``[blocks.0, norm]``."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(setting, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def enumerate_words(words: Sequence[str]) -> str:
    """Join words: ``a, b and c``."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def in_lines(name: str, width: int) -> list[str]:
    """Break a name without spaces into lines of at most ``width`` characters, none of them lost.

    Lines end behind ``_``, ``-``, ``.``, ``/`` or a space where there is one in their second half.
    """
    lines = []
    while len(name) > width:
        ends = [end for end in range(width // 2, width) if name[end] in "_-./ "]
        end = ends[-1] + 1 if ends else width
        lines.append(name[:end])
        name = name[end:]
    return [*lines, name]
