"""A figure with its caption."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """A figure with its caption on the page.

    Attributes:
        figure: The figure.
        section: Name of the page's section.
        caption: Text beneath it; empty if the caption of the next figure is for both.
        folded: The line to click on to unfold the figure; empty if it is always shown.
    """

    figure: Figure
    section: str
    caption: str
    folded: str = ""


Named = Iterator[tuple[str, Drawing]]


def under_one_caption(section: str, figures: Mapping[str, Figure], caption: str) -> Named:
    """Yield the figures of several models by name, with one caption beneath the last."""
    for number, (name, figure) in enumerate(figures.items(), 1):
        yield name, Drawing(figure, section, caption if number == len(figures) else "")
