"""What the networks were tested on, in the report's words: corruptions, natural shifts, or both."""

from dataclasses import dataclass

import pandas as pd

from tttlab.config.values import UNCORRUPTED
from tttlab.evaluation.results import Results, name_shifts
from tttlab.reporting.words import enumerate_words

_FEW = 4  # shifts with labels that are listed by name, in titles too
_NAMED = 12  # shifts without labels that are listed by name


@dataclass(frozen=True)
class Tested:
    """The shifts of a report: those with labels, or all where none has any.

    Attributes:
        corruptions: Names of the shifts that have severities, made here or distributed.
        severities: Those of the corruptions, in order.
        natural: Names of the shifts without severities: sets, or the test images themselves.
        count: The number of shifts, every severity of a corruption counted.
        set_aside: Whether the clean images are not the test images, which are themselves shifted.
        sample: The number of images and of training seeds, such as ``n = 100 images under every
            corruption``.
        sample_of_all: The same of all shifts, with labels or without.
        labeled: Names of the shifts with labels, for people.
        unlabeled: Names of those without, where others have labels: their accuracy is unknown.
    """

    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    natural: tuple[str, ...]
    count: int
    set_aside: bool
    sample: str
    sample_of_all: str
    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]

    @classmethod
    def of(cls, results: Results) -> "Tested":
        """Read what was tested from the table ``by_shift``."""
        everything = results.rows("by_shift")
        everything = everything[everything["shift"] != "clean"]
        labeled = tuple(name_shifts(everything, labeled=True))
        known = everything[everything["accuracy_source"].notna()]
        table = known if labeled else everything
        graded = table[table["severity"] > 0]
        return cls(
            corruptions=tuple(dict.fromkeys(graded["corruption"])),
            severities=tuple(sorted(set(graded["severity"]))),
            natural=tuple(dict.fromkeys(table.loc[table["severity"] == 0, "corruption"])),
            count=table["shift"].nunique(),
            set_aside=bool((everything["corruption"] == UNCORRUPTED).any()),
            sample=_sample(table, results.seeds),
            sample_of_all=_sample(everything, results.seeds),
            labeled=labeled,
            unlabeled=tuple(name_shifts(everything, labeled=False)) if labeled else (),
        )

    @property
    def noun(self) -> str:
        """``corruption``, or ``shift`` where not all are corruptions."""
        return "shift" if self.natural else "corruption"

    @property
    def over_all(self) -> str:
        """Over what a gain is a mean: ``over all corruptions``."""
        if self.unlabeled:
            names = f" ({enumerate_words(self.labeled)})" if len(self.labeled) <= _FEW else ""
            return f"over the shifts with labels{names}"
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


def without_labels(results: Results) -> str:
    """Name the shifts without labels in a sentence; empty where all or none have labels."""
    table = results.rows("by_shift")
    if table.empty or not (names := Tested.of(results).unlabeled):
        return ""
    more = len(names) - _NAMED
    listed = enumerate_words([*names[:_NAMED], *([f"{more} more"] if more > 0 else [])])
    shifts = table[table["shift"] != "clean"].drop_duplicates("shift")
    counts = shifts["n"] // results.seeds
    unknown = counts[shifts["accuracy_source"].isna()].sum()
    return (
        f"There are no labels for {listed}: {unknown:,} of the {counts.sum():,} shifted images "
        "count in no accuracy and no gain."
    )


def _sample(table: pd.DataFrame, seeds: int) -> str:
    """Write the numbers of images of rows of ``by_shift`` without clean ones, and of seeds."""
    natural = table["severity"] == 0
    if not natural.any():
        return f"{sample_text(table, seeds)} under every corruption"
    return sample_text(table, seeds) + (" per shift" if table["corruption"].nunique() > 1 else "")


def sample_text(table: pd.DataFrame, seeds: int) -> str:
    """Write the numbers of images of some rows of ``by_shift``, and of training seeds."""
    counts = table["n"] // seeds
    fewest, most = (int(counts.min()), int(counts.max())) if len(table) else (0, 0)
    times = f" × {seeds} training seeds" if seeds > 1 else ""
    return f"n = {span(fewest, most)} image{'' if most == 1 else 's'}{times}"


def span(fewest: int, most: int) -> str:
    """Write the least and the largest number: ``20–30``, or ``20`` if both are."""
    return f"{most}" if fewest == most else f"{fewest}–{most}"
