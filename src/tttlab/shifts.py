"""The test shifts: the clean test images and every corruption at every severity, always on the same images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tttlab.corruptions import corrupt_all
from tttlab.data import ImageSet


@dataclass(frozen=True)
class Shift:
    """One version of the test set; ``corruption`` is ``none`` and ``severity`` 0 for the clean images."""

    corruption: str = "none"
    severity: int = 0

    @property
    def name(self) -> str:
        """``clean``, or for example ``fog-3``."""
        return f"{self.corruption}-{self.severity}" if self.severity else "clean"

    def apply(self, images: ImageSet, seed: int) -> np.ndarray:
        """Corrupt the images, each from its own stream: uint8 ``(N, S, S, 3)``."""
        if not self.severity:
            return np.asarray(images.pixels)
        return corrupt_all(images.pixels, images.image_ids, self.corruption, self.severity, seed)


def list_shifts(corruptions: Sequence[str], severities: Sequence[int]) -> list[Shift]:
    """List the clean images first, then every corruption at every severity."""
    return [Shift(), *(Shift(corruption, severity) for corruption in corruptions for severity in severities)]
