"""Progress bars of long work: a bar in a terminal, else a line every few seconds."""

import sys

from tqdm import tqdm

BAR, LINE = 0.5, 10.0  # seconds between two looks of a bar in a terminal, and elsewhere


def open_bar(
    title: str, total: int, unit: str, *, done: int = 0, line: int = 0, hidden: bool = False
) -> tqdm:
    """Open a bar.

    Args:
        title: what is being done.
        total: amount of work.
        unit: what is counted.
        done: amount that an earlier process has done.
        line: where on the screen bars of several processes stand, from 0.
        hidden: show nothing, for processes that share the work of another.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        desc=title,
        total=total,
        initial=done,
        unit=unit,
        unit_scale=total > 10_000,
        delay=1,  # second: what is done before shows no bar
        mininterval=BAR if terminal else LINE,
        position=line if terminal else 0,
        disable=hidden,
    )
