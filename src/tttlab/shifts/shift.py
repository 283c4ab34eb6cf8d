"""The test shifts: the clean images, every corruption at every severity, and images that are shifted by nature."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import Lazy
from tttlab.shifts.corruptions import corrupt_all


@dataclass(frozen=True)
class Shift:
    """One version of the test set.

    Attributes:
        corruption: ``none`` for clean images, a synthetic corruption, or the name of a distributed set and of what in it.
        severity: 1 to 5; 0 for clean images and where a shift has no degrees.
        images: the shifted images, of a set that comes with its own; None: the test images, corrupted here.
    """

    corruption: str = "none"
    severity: int = 0
    images: ImageSet | None = field(default=None, compare=False, repr=False)

    @property
    def clean(self) -> bool:
        """Whether these are images of the source distribution."""
        return self.corruption == "none"

    @property
    def name(self) -> str:
        """``clean``, or for example ``fog-3``, ``cifar10_c/fog-3`` or ``photos/night``."""
        return (
            "clean"
            if self.clean
            else f"{self.corruption}-{self.severity}"
            if self.severity
            else self.corruption
        )

    def of(self, test: ImageSet) -> ImageSet:
        """Find whose version this shift is: its own images as they are, or the test images, still to be corrupted."""
        return test if self.images is None else self.images

    def apply(self, images: ImageSet, seed: int) -> np.ndarray:
        """Look at images that came from `of`, each corrupted from its own stream: uint8 ``(N, S, S, 3)``."""
        if self.clean or self.images is not None:
            return np.asarray(images.pixels)
        return corrupt_all(images.pixels, images.image_ids, self.corruption, self.severity, seed)

    def seen(self, test: ImageSet, seed: int) -> ImageSet:
        """Give the images of this shift, each corrupted when it is looked at: a whole set need not fit into memory."""
        own = self.of(test)
        return replace(
            own, pixels=Lazy(own.pixels.shape, lambda numbers: self.apply(own.take(numbers), seed))
        )


def list_shifts(corruptions: Sequence[str], severities: Sequence[int]) -> list[Shift]:
    """List the clean images first, then every corruption at every severity."""
    return [
        Shift(),
        *(Shift(corruption, severity) for corruption in corruptions for severity in severities),
    ]
