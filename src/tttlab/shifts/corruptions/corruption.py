"""What a type of corruption is: a transform and its five strengths."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Corruption(NamedTuple):
    """One type of corruption.

    Attributes:
        apply: (image, strength, generator) → image.
        strengths: at severities 1 to 5.
    """

    apply: Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]
    strengths: tuple[Any, Any, Any, Any, Any]
