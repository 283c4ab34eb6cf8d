"""Confidence intervals of a gain: images crossed with training seeds, both random, shifts fixed.

A gain has two sources of chance: which images were tested, and which networks the training seeds happened to give.
Every image meets every network, so the two are crossed, not nested, and few seeds make resampling useless: three seeds
have only ten distinct resamples. Hence a closed form; `benchmarks/coverage.py` shows how often it covers, and
docs/statistics.md what was tried instead.
"""

import numpy as np
import pandas as pd
from scipy.special import stdtrit  # and not scipy.stats, whose import takes half a second

CONFIDENCE = 0.95
NARROWEST = 0.5  # of the width with the networks held fixed: a difference of mean squares can come out as nothing by chance
PSEUDO_IMAGES = (
    2  # one helped and one hurt: without them an interval from no flips at all has no width
)


def gain_interval(
    differences: np.ndarray,
    images: np.ndarray,
    seeds: np.ndarray,
    groups: np.ndarray,
    *,
    num_groups: int,
    confidence: float = CONFIDENCE,
) -> np.ndarray:
    """Find each group's interval of the mean difference over images and training seeds.

    Args:
        differences: (R,) correct after minus correct before, one per row: -1, 0 or 1.
        images: (R,) which image a row is of; all rows of an image count as one observation of it.
        seeds: (R,) which network it is from.
        groups: (R,) integers in ``[0, num_groups)``.
        num_groups: G.
        confidence: Nominal coverage in (0, 1).

    Returns:
        (G, 2) lower and upper ends, fractions; NaN for a group with fewer than two images.
    """
    if not len(differences):
        return np.full((num_groups, 2), np.nan)
    (image, names), (network, trained) = pd.factorize(images), pd.factorize(seeds)
    shape = (len(names), len(trained), num_groups)
    cell = np.ravel_multi_index((image, network, groups), shape)
    sums, counts = (
        np.bincount(cell, weights, np.prod(shape)).reshape(shape) for weights in (differences, None)
    )
    flips = np.bincount(groups, np.abs(differences), num_groups)
    return crossed_interval(sums, counts.astype(float), flips, confidence)


def crossed_interval(
    sums: np.ndarray, counts: np.ndarray, flips: np.ndarray, confidence: float = CONFIDENCE
) -> np.ndarray:
    """Find the interval from cells of images × seeds, all groups at once.

    With n images, S seeds and mean squares M of the two-way layout, the variance of the mean is
    ``(M_image − M_error) / nS + M_seed / nS``. Each part's t quantile (n − 1 and S − 1 degrees of freedom) is weighted by
    the part, after Cochran; Satterthwaite's degrees of freedom are too many for few seeds. Before that, M_image and the
    centre are replaced by those of an adjusted Wald interval: as many independent observations as would have this variance,
    and two more, one helped and one hurt.

    Args:
        sums: (n, S, G) sum of the differences of one image under one seed.
        counts: (n, S, G) how many differences that are; images without any in a group do not count there.
        flips: (G,) number of differences that are not zero.
        confidence: Nominal coverage in (0, 1).

    Returns:
        (G, 2) lower and upper ends within [-1, 1]; NaN for a group with fewer than two images.

    Reference:
        Cornfield and Tukey, Ann. Math. Stat. 27 (1956): mean squares of crossed layouts. Cochran, Biometrics 20 (1964): the
        weighted quantile. Bonett and Price, J. Educ. Behav. Stat. 37 (2012): the two pseudo-observations. Korn and Graubard,
        Survey Methodology 24 (1998): the effective number of observations.
    """
    num_images, num_seeds = (counts.any(axis=axis).sum(axis=0).astype(float) for axis in (1, 0))
    with np.errstate(
        invalid="ignore", divide="ignore"
    ):  # groups with one image, one seed or nothing, settled below
        rows = counts.sum(axis=(0, 1))
        mean, flipped = sums.sum(axis=(0, 1)) / rows, flips / rows
        image, seed, error = _variances(sums - mean * counts, rows, num_images, num_seeds)
        spread = flipped - mean**2  # variance of one row
        effective = np.where(image > 0, spread / image, np.where(spread > 0, rows, num_images))
        effective = np.clip(effective, num_images, rows)
        padded = effective + PSEUDO_IMAGES
        centre = mean * effective / padded
        fixed = ((flipped * effective + PSEUDO_IMAGES) / padded - centre**2) / padded
        image = np.maximum(fixed - error, 0)
        tail = (1 + confidence) / 2
        image_quantile, seed_quantile = (
            stdtrit(count - 1, tail) for count in (num_images, num_seeds)
        )
        weighted = image * image_quantile + np.where(num_seeds > 1, seed * seed_quantile, 0)
        half = np.fmax(
            weighted / np.sqrt(image + seed), NARROWEST * image_quantile * np.sqrt(fixed)
        )
    interval = np.clip([centre - half, centre + half], -1, 1).T
    interval[num_images < 2] = np.nan
    return interval


def crossed_standard_error(cells: np.ndarray) -> float:
    """Give the standard error of the mean of ``cells (n, C)``, in which both the rows and the columns are drawn at random.

    The variance is that of `crossed_interval`, without its pseudo-observations; of one row or one column the ordinary one.
    """
    (rows, columns), mean = cells.shape, cells.mean()
    sizes = np.array([float(rows)]), np.array([float(columns)])
    if min(rows, columns) < 2:
        return float(cells.std(ddof=1) / np.sqrt(cells.size)) if cells.size > 1 else 0.0
    row, column, error = _variances(
        (cells - mean)[..., None], np.array([float(cells.size)]), *sizes
    )
    return float(np.sqrt(max(row[0] - error[0], 0) + column[0]))


def _variances(
    residuals: np.ndarray, rows: np.ndarray, num_images: np.ndarray, num_seeds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give the mean squares of images, seeds and error as variances of the overall mean, (G,) each; 0 for one seed's two.

    ``residuals (n, S, G)`` are sums minus the mean times the counts: dividing by the mean count makes them deviations of
    cell means where all counts are equal, and the usual linearisation of a ratio where they are not.
    """
    residuals = residuals * (num_images * num_seeds / rows)
    by_image = (residuals.sum(axis=1) ** 2).sum(axis=0) / num_seeds
    by_seed = (residuals.sum(axis=0) ** 2).sum(axis=0) / num_images
    left = np.maximum((residuals**2).sum(axis=(0, 1)) - by_image - by_seed, 0)
    cells = num_images * num_seeds
    image = by_image / (num_images - 1) / cells
    several = num_seeds > 1
    seed = np.where(several, by_seed / (num_seeds - 1) / cells, 0)
    error = np.where(several, left / ((num_images - 1) * (num_seeds - 1)) / cells, 0)
    return image, seed, error
