"""Calibration: confidence beside accuracy in equal-width bins, for many groups of rows at once."""

from typing import NamedTuple

import numpy as np

NUM_BINS = 15


class Reliability(NamedTuple):
    """Mean confidence, accuracy and number of rows, (G, ``NUM_BINS``) each.

    Confidence and accuracy are fractions, NaN in an empty bin.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def reliability(
    confidences: np.ndarray, correct: np.ndarray, groups: np.ndarray, num_groups: int
) -> Reliability:
    """Sort the rows of every group into bins of the confidence, ``(m/15, (m+1)/15]``.

    Args:
        confidences: (R,) probability of the predicted class, in [0, 1].
        correct: (R,) 1 where the predicted class is the true one, else 0.
        groups: (R,) integers in ``[0, num_groups)``.
        num_groups: G.

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 2.
    """
    inner_edges = np.linspace(0, 1, NUM_BINS + 1)[1:-1]
    cell = groups * NUM_BINS + np.digitize(confidences, inner_edges, right=True)
    size = num_groups * NUM_BINS
    count, confidence, right = (
        np.bincount(cell, weights, size).reshape(num_groups, NUM_BINS)
        for weights in (None, confidences, correct)
    )
    with np.errstate(invalid="ignore"):
        return Reliability(confidence / count, right / count, count)


def calibration_error(table: Reliability) -> np.ndarray:
    """Compute the expected calibration error of every group, (G,).

    This is |accuracy − confidence| averaged over the bins, weighted by their number of rows; NaN
    for a group without rows. Few rows bias it upwards: even perfect calibration gives more than 0.
    """
    gap = np.nansum(np.abs(table.accuracy - table.confidence) * table.count, axis=1)
    with np.errstate(invalid="ignore"):
        return gap / table.count.sum(axis=1)
