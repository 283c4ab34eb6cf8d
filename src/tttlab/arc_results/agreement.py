"""How well gradients of demonstrations and answers agree, in a sentence."""

from typing import NamedTuple

import numpy as np
import pandas as pd


class Agreement(NamedTuple):
    """Mean cosines over tasks, and the 95 % interval of their difference.

    Attributes:
        tasks: how many.
        own: with the task's own answers.
        other: with another task's.
        low: of own − other.
        high: of own − other.
    """

    tasks: int
    own: float
    other: float
    low: float
    high: float

    def __str__(self) -> str:
        relation = "more" if self.low > 0 else "less" if self.high < 0 else "not surely more"
        return (
            "Before the first step, the gradient of a task's demonstrations and that of its "
            f"answers have a cosine of {self.own:.2f} on average over {self.tasks} tasks; with "
            f"the answers of another task it is {self.other:.2f}. So demonstrations point to "
            f"their own answers {relation} than to others (difference "
            f"{self.own - self.other:+.2f}, 95 % interval {self.low:+.2f} to {self.high:+.2f})."
        )


def summarise(table: pd.DataFrame) -> Agreement | None:
    """Summarise ``aligned.csv`` (task, own, other); None for fewer than two tasks.

    The interval is Student's, of the paired differences.
    """
    if len(table) < 2:
        return None
    from scipy import stats

    difference = (table["own"] - table["other"]).to_numpy()
    interval = stats.ttest_1samp(difference, 0.0).confidence_interval()
    low, high = (float(np.clip(end, -2, 2)) for end in interval)
    means = (float(table[name].mean()) for name in ("own", "other"))
    return Agreement(len(table), *means, low, high)
