"""The test shifts: clean images, every corruption at every severity, and sets shifted by nature."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import quote

import numpy as np

from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import Lazy
from tttlab.shifts.corruptions import corrupt_all

NAME_BYTES = 255  # of a file's name, at most; quoted, a letter that is not Latin takes six or nine
CUT = 120  # of them are kept of a longer name


@dataclass(frozen=True)
class Shift:
    """One version of the test set.

    Attributes:
        corruption: ``none`` for clean images, a synthetic corruption, or the names of a distributed
            set and of a shift in it.
        severity: 1 to 5; 0 for clean images and for shifts without degrees.
        images: the shifted images of a distributed set; None: the test images, corrupted here.
        strength: of a synthetic corruption: ``own`` or ``cifar10_c``.
    """

    corruption: str = "none"
    severity: int = 0
    images: ImageSet | None = field(default=None, compare=False, repr=False)
    strength: str = field(default="own", kw_only=True)

    @property
    def clean(self) -> bool:
        """Whether these are images of the source distribution."""
        return self.corruption == "none"

    @property
    def synthetic(self) -> bool:
        """Whether the test images are corrupted here."""
        return not self.clean and self.images is None

    @property
    def name(self) -> str:
        """``clean``, or for example ``fog-3``, ``cifar10_c/fog-3`` or ``photos/night``."""
        if self.clean:
            return "clean"
        return f"{self.corruption}-{self.severity}" if self.severity else self.corruption

    def file_name(self, longest: int = NAME_BYTES) -> str:
        """Quote the name for a file or folder; a longer one is cut, and a digest tells it apart.

        Args:
            longest: bytes that are left as they are.
        """
        name = quote(self.name, safe=" ")
        if len(name) <= longest:
            return name
        return f"{name[:CUT]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"

    def of(self, test: ImageSet) -> ImageSet:
        """Return the shift's own images, or the test images, which `apply` has yet to corrupt."""
        return test if self.images is None else self.images

    def apply(self, images: ImageSet, seed: int) -> np.ndarray:
        """Corrupt images that came from `of`, each from its own stream: uint8 ``(N, S, S, 3)``."""
        if self.synthetic:
            shown = images.pixels, images.image_ids
            return corrupt_all(*shown, self.corruption, self.severity, seed, self.strength)
        return np.asarray(images.pixels)

    def seen(self, test: ImageSet, seed: int) -> ImageSet:
        """Return the shifted images, corrupted at every access: a set need not fit into memory."""
        images = self.of(test)

        def look(indices: np.ndarray) -> np.ndarray:
            return self.apply(images.take(indices), seed)

        return replace(images, pixels=Lazy(images.pixels.shape, look))


def list_shifts(
    corruptions: Sequence[str], severities: Sequence[int], strength: str = "own"
) -> list[Shift]:
    """List the clean images first, then every corruption at every severity."""
    pairs = itertools.product(corruptions, severities)
    return [Shift(), *(Shift(*pair, strength=strength) for pair in pairs)]
