"""What the networks were tested on, in the report's words: corruptions, natural shifts, or both."""

from dataclasses import dataclass

import pandas as pd

from tttlab.config.values import UNCORRUPTED
from tttlab.evaluation.results import Results


@dataclass(frozen=True)
class Tested:
    """The shifts of a report.

    Attributes:
        corruptions: Names of the shifts that have severities, made here or distributed.
        severities: Those of the corruptions, in order.
        natural: Names of the shifts without severities: sets, or the test images themselves.
        count: The number of shifts, every severity of a corruption counted.
        set_aside: Whether the clean images are not the test images, which are themselves shifted.
        sample: The number of images and of training seeds, such as ``n = 100 images under every
            corruption``.
    """

    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    natural: tuple[str, ...]
    count: int
    set_aside: bool
    sample: str

    @classmethod
    def of(cls, results: Results) -> "Tested":
        """Read what was tested from the table ``by_shift``."""
        table = results.rows("by_shift")
        table = table[table["shift"] != "clean"]
        graded = table[table["severity"] > 0]
        corruptions = tuple(dict.fromkeys(graded["corruption"]))
        natural = tuple(dict.fromkeys(table.loc[table["severity"] == 0, "corruption"]))
        sample = sample_text(table, results.seeds)
        if not natural:
            sample += " under every corruption"
        elif len(corruptions) + len(natural) > 1:
            sample += " per shift"
        severities, count = tuple(sorted(set(graded["severity"]))), table["shift"].nunique()
        return cls(corruptions, severities, natural, count, UNCORRUPTED in natural, sample)

    @property
    def noun(self) -> str:
        """``corruption``, or ``shift`` where not all are corruptions."""
        return "shift" if self.natural else "corruption"

    @property
    def over_all(self) -> str:
        """Over what a gain is a mean: ``over all corruptions``."""
        if self.count == 1:
            return "on the shifted images"
        return f"over all {self.noun}s"

    @property
    def points(self) -> str:
        """What a point of a figure is, where larger points are higher severities."""
        if not self.corruptions:
            return "A point per shift; hollow: clean."
        if not self.natural:
            return "A point per shift, larger at higher severity; hollow: clean."
        return (
            "A point per corruption and severity, larger where that is higher, and one per natural "
            "shift; hollow: clean."
        )

    @property
    def clean_images(self) -> str:
        """Which images the clean ones are."""
        if self.set_aside:
            return "on labeled images that training has set aside: nothing is shifted there"
        if self.natural and not self.corruptions:
            return "on the test images that are not shifted"
        if self.natural:
            return "on the test images as they are, without any shift"
        return "on the same images without any corruption"


def sample_text(table: pd.DataFrame, seeds: int) -> str:
    """Write the numbers of images of some rows of ``by_shift``, and of training seeds."""
    counts = table["n"] // seeds
    fewest, most = (int(counts.min()), int(counts.max())) if len(table) else (0, 0)
    times = f" × {seeds} training seeds" if seeds > 1 else ""
    return f"n = {most if fewest == most else f'{fewest}–{most}'} images{times}"
