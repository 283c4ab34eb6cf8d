"""Confidence intervals of a gain: images crossed with training seeds, both random, shifts fixed.

A gain has two sources of chance: which images were tested, and which networks the training seeds
gave. Every image is shown to every network, so the two are crossed, not nested. Few seeds make
resampling useless: three seeds have only ten distinct resamples. Hence a closed form.
`benchmarks/coverage.py` shows how often it covers; docs/statistics.md has the alternatives.
"""

import numpy as np
import pandas as pd
from scipy.special import stdtrit  # importing scipy.stats would take half a second

CONFIDENCE = 0.95
# The least width, as a fraction of the width with the networks held fixed. A variance that is a
# difference of mean squares can be zero by chance.
NARROWEST = 0.5
# One image helped and one hurt. Without them, an interval from no flips would have no width.
PSEUDO_IMAGES = 2


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
        differences: (R,) correct after minus correct before: -1, 0 or 1.
        images: (R,) the image of each row; all rows of an image count as one observation of it.
        seeds: (R,) the training seed of the network.
        groups: (R,) integers in ``[0, num_groups)``.
        num_groups: G.
        confidence: Nominal coverage in (0, 1).

    Returns:
        (G, 2) lower and upper ends, fractions; NaN for a group with fewer than two images.
    """
    if not len(differences):
        return np.full((num_groups, 2), np.nan)
    image_codes, unique_images = pd.factorize(images)
    seed_codes, unique_seeds = pd.factorize(seeds)
    shape = (len(unique_images), len(unique_seeds), num_groups)
    cell = np.ravel_multi_index((image_codes, seed_codes, groups), shape)
    sums = np.bincount(cell, differences, np.prod(shape)).reshape(shape)
    counts = np.bincount(cell, minlength=np.prod(shape)).reshape(shape)
    flips = np.bincount(groups, np.abs(differences), num_groups)
    return crossed_interval(sums, counts.astype(float), flips, confidence)


def crossed_interval(
    sums: np.ndarray, counts: np.ndarray, flips: np.ndarray, confidence: float = CONFIDENCE
) -> np.ndarray:
    """Find the interval from cells of images × seeds, all groups at once.

    With n images, S seeds and mean squares M of the two-way layout, the variance of the mean is
    ``(M_image − M_error) / nS + M_seed / nS``. The t quantiles of the two parts (n − 1 and S − 1
    degrees of freedom) are averaged with the parts as weights, after Cochran; Satterthwaite's
    degrees of freedom are too many for few seeds. Before that, M_image and the centre are replaced
    by those of an adjusted Wald interval. It takes the number of independent observations that
    would have this variance, and adds two: one helped and one hurt.

    Args:
        sums: (n, S, G) sum of the differences of an image under a seed.
        counts: (n, S, G) number of these differences; an image with none in a group does not count
            in that group.
        flips: (G,) number of differences that are not zero.
        confidence: Nominal coverage in (0, 1).

    Returns:
        (G, 2) lower and upper ends within [-1, 1]; NaN for a group with fewer than two images.

    Reference:
        Cornfield and Tukey, Ann. Math. Stat. 27 (1956): mean squares of crossed layouts.
        Cochran, Biometrics 20 (1964): the weighted quantile.
        Bonett and Price, J. Educ. Behav. Stat. 37 (2012): the two pseudo-observations.
        Korn and Graubard, Survey Methodology 24 (1998): the effective number of observations.
    """
    num_images, num_seeds = (counts.any(axis=axis).sum(axis=0).astype(float) for axis in (1, 0))
    # Groups with one image, one seed or no rows divide by zero; they are handled below.
    with np.errstate(invalid="ignore", divide="ignore"):
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
        level = (1 + confidence) / 2
        image_quantile = stdtrit(num_images - 1, level)
        seed_quantile = stdtrit(num_seeds - 1, level)
        weighted = image * image_quantile + np.where(num_seeds > 1, seed * seed_quantile, 0)
        narrowest = NARROWEST * image_quantile * np.sqrt(fixed)
        half = np.fmax(weighted / np.sqrt(image + seed), narrowest)
    interval = np.clip([centre - half, centre + half], -1, 1).T
    interval[num_images < 2] = np.nan
    return interval


def crossed_standard_error(cells: np.ndarray) -> float:
    """Compute the standard error of the mean of ``cells (n, C)`` with random rows and columns.

    The variance is that of `crossed_interval`, without its pseudo-observations. With one row or one
    column it is the ordinary one, and 0 for a single cell.
    """
    if min(cells.shape) < 2:
        return float(cells.std(ddof=1) / np.sqrt(cells.size)) if cells.size > 1 else 0.0
    size, rows, columns = (np.array([float(n)]) for n in (cells.size, *cells.shape))
    residuals = (cells - cells.mean())[..., None]
    row, column, error = _variances(residuals, size, rows, columns)
    return float(np.sqrt(max(row[0] - error[0], 0) + column[0]))


def _variances(
    residuals: np.ndarray, rows: np.ndarray, num_images: np.ndarray, num_seeds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give the mean squares of images, seeds and error as variances of the overall mean, (G,) each.

    With one seed, those of seeds and error are 0. ``residuals (n, S, G)`` are the sums minus the
    mean times the counts. Divided by the mean count, they are deviations of cell means if all
    counts are equal, and else the usual linearisation of a ratio.
    """
    residuals = residuals * (num_images * num_seeds / rows)
    by_image = (residuals.sum(axis=1) ** 2).sum(axis=0) / num_seeds
    by_seed = (residuals.sum(axis=0) ** 2).sum(axis=0) / num_images
    remainder = np.maximum((residuals**2).sum(axis=(0, 1)) - by_image - by_seed, 0)
    cells = num_images * num_seeds
    image = by_image / (num_images - 1) / cells
    several = num_seeds > 1
    seed = np.where(several, by_seed / (num_seeds - 1) / cells, 0)
    error = np.where(several, remainder / ((num_images - 1) * (num_seeds - 1)) / cells, 0)
    return image, seed, error
