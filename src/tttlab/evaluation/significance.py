"""Exact tests of paired predictions, and their correction for many shifts."""

import numpy as np
from scipy import stats

LEVEL = 0.05


def mcnemar(wrong_to_right: np.ndarray, right_to_wrong: np.ndarray) -> np.ndarray:
    """Test exactly, per row, whether predictions turned right as often as wrong, in every one of S networks.

    For one network this is the exact McNemar test, as `statsmodels.stats.contingency_tables.mcnemar(exact=True)`; written on
    SciPy's binomial distribution because that takes one table per call. For several, the p-value is the largest over
    the networks of each one-sided test, twice the smaller side: small only if every network changed, all in one direction.
    No assumption on how the networks depend on each other is made (the intersection–union principle).

    Args:
        wrong_to_right: (..., S) number of images.
        right_to_wrong: (..., S) number of images.

    Returns:
        (...) two-sided p-values; 1 where no image flipped.

    Reference:
        McNemar, Psychometrika 12 (1947). Berger, Technometrics 24 (1982): intersection–union tests.
    """
    flips = np.add(wrong_to_right, right_to_wrong)
    helped, hurt = (
        stats.binom.sf(np.subtract(more, 1), flips, 0.5).max(axis=-1)
        for more in (wrong_to_right, right_to_wrong)
    )
    return np.minimum(2 * np.minimum(helped, hurt), 1)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjust (T,) p-values such that any false one among all T is as rare as the level; NaN are not counted and stay.

    The same as `statsmodels.stats.multitest.multipletests(method="holm")`, which collects Python's garbage in every call: 13 to
    200 ms for 76 tests.

    Reference:
        Holm, Scand. J. Stat. 6 (1979); valid under any dependence between the tests.
    """
    adjusted = np.array(p_values, dtype=float)
    order = np.argsort(adjusted)[: np.isfinite(adjusted).sum()]  # NaN sort last
    adjusted[order] = np.minimum(
        np.maximum.accumulate(adjusted[order] * np.arange(len(order), 0, -1)), 1
    )
    return adjusted
