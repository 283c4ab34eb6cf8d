"""Exact tests of paired predictions, and their correction for many shifts."""

import numpy as np
from scipy.special import bdtrc  # importing scipy.stats would take a second

LEVEL = 0.05


def mcnemar(wrong_to_right: np.ndarray, right_to_wrong: np.ndarray) -> np.ndarray:
    """Test exactly, per row, if as many predictions turned right as wrong in each of S networks.

    For one network this is the exact McNemar test, equal to
    `statsmodels.stats.contingency_tables.mcnemar(exact=True)`, which takes one table per call. For
    several networks, each one-sided p-value is the largest over the networks, and the result is
    twice the smaller side. It is small only if all networks changed in one direction, and assumes
    nothing on how they depend on each other (the intersection–union principle).

    Args:
        wrong_to_right: (..., S) number of images.
        right_to_wrong: (..., S) number of images.

    Returns:
        (...) two-sided p-values; 1 where no image flipped.

    Reference:
        McNemar, Psychometrika 12 (1947). Berger, Technometrics 24 (1982): intersection–union tests.
    """
    flips = np.add(wrong_to_right, right_to_wrong).astype(int)
    helped, hurt = (
        bdtrc(np.subtract(more, 1), flips, 0.5).max(axis=-1)  # P(X ≥ more)
        for more in (wrong_to_right, right_to_wrong)
    )
    return np.minimum(2 * np.minimum(helped, hurt), 1)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjust (T,) p-values to control the familywise error rate; NaN do not count and stay NaN.

    Equal to `statsmodels.stats.multitest.multipletests(method="holm")`, which takes 13 to 200 ms
    for 76 tests because it collects Python's garbage in every call.

    Reference:
        Holm, Scand. J. Stat. 6 (1979); valid under any dependence between the tests.
    """
    adjusted = np.array(p_values, dtype=float)
    order = np.argsort(adjusted)[: np.isfinite(adjusted).sum()]  # NaN sort last
    scaled = adjusted[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted
