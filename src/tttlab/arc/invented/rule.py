"""What a rule of invented tasks is."""

from collections.abc import Callable

import numpy as np

Grids = tuple[np.ndarray, np.ndarray]  # input and output, (H, W) and (H', W')
Maker = Callable[[np.random.Generator], Grids]  # draws a pair of one task
Rule = Callable[[np.random.Generator, int], Maker]  # draws a task; the largest side of its grids
