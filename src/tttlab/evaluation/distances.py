"""How far two samples of images lie apart: fitted Gaussians, transport, a kernel, a classifier.

All functions take plain arrays, a row per image. Those that take ``members`` measure many divisions of one pooled sample
into reference and target at once: the division that was found first, permuted ones after it (`divisions`, `permutation_p`).
"""

from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import pdist, squareform
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.preprocessing import StandardScaler

IMAGES_PER_COMPONENT = 8
FOLDS = 5


class Gaussian(NamedTuple):
    """A normal distribution: ``mean (k,)``, ``covariance (k, k)``."""

    mean: np.ndarray
    covariance: np.ndarray


# --- divisions of a pooled sample ----------------------------------------------------------------------------------


def divisions(
    reference: int, target: int, permutations: int = 0, generator: np.random.Generator | None = None
) -> np.ndarray:
    """Say who belongs to the reference, in the samples as they are and after permuting who is who.

    Args:
        reference: how many images come first.
        target: how many follow.
        permutations: B.
        generator: of the permutations; not needed for none.

    Returns:
        bool ``(1 + B, reference + target)``, the true division first.
    """
    true = np.arange(reference + target) < reference
    return np.stack([true, *(generator.permutation(true) for _ in range(permutations))])


def permutation_p(values: np.ndarray) -> float:
    """Find the share of divisions that lie at least as far apart as the true one: (1 + #≥) / (1 + B).

    Args:
        values: ``(1 + B,)`` as the metrics return them, the true division first; with B = 0 the result is NaN.
    """
    if len(values) < 2:
        return float("nan")
    rounding = 1e-9 * np.abs(values).max()  # equal but for the order of a sum counts as equal
    return float(np.mean(values >= values[0] - rounding))


# --- fitted Gaussians ----------------------------------------------------------------------------------------------


def feature_scale(reference: np.ndarray) -> np.ndarray:
    """Measure the spread of each feature ``(D,)``: its standard deviation, at least a tenth of the typical one.

    The bound keeps a unit that is all but silent on the reference from drowning the others once it speaks.
    """
    spread = reference.std(axis=0)
    typical = np.sqrt(np.mean(spread**2)) or 1.0
    return np.maximum(spread, 0.1 * typical)


def fit_gaussians(reference: np.ndarray, target: np.ndarray) -> tuple[Gaussian, Gaussian]:
    """Fit both samples in the main directions of the reference.

    A full covariance of D features needs many more than D images. So PCA of the reference keeps a direction for every
    `IMAGES_PER_COMPONENT` images of the smaller sample, and there the covariances are shrunk.

    Args:
        reference: ``(N, D)``.
        target: ``(M, D)``.

    Returns:
        the Gaussians of reference and target, both in these directions.

    Reference:
        Ledoit and Wolf, Journal of Multivariate Analysis 2004 (shrinkage).
    """
    smaller = min(len(reference), len(target))
    components = max(1, min(smaller // IMAGES_PER_COMPONENT, reference.shape[1]))
    directions = PCA(components, svd_solver="full").fit(reference)
    return _fit(directions.transform(reference)), _fit(directions.transform(target))


def _fit(values: np.ndarray) -> Gaussian:
    # A trace of the identity: images that all look alike to the network have no spread to invert.
    covariance = ledoit_wolf(values)[0] + 1e-6 * np.eye(values.shape[1])
    return Gaussian(values.mean(axis=0), covariance)


def kl_gaussians(target: Gaussian, reference: Gaussian) -> float:
    """Compute KL(target ‖ reference), nats: how surprising the target is to who expects the reference."""
    difference = target.mean - reference.mean
    ratio = np.linalg.solve(reference.covariance, np.column_stack([target.covariance, difference]))
    logarithms = (
        np.linalg.slogdet(reference.covariance)[1] - np.linalg.slogdet(target.covariance)[1]
    )
    return (
        float(np.trace(ratio[:, :-1]) + difference @ ratio[:, -1] - len(difference) + logarithms)
        / 2
    )


def wasserstein_gaussians(first: Gaussian, second: Gaussian) -> float:
    """Compute the 2-Wasserstein (Fréchet) distance of two Gaussians, in the unit of their variables.

    Its square is ‖Δμ‖² + tr(A + B − 2 (A½ B A½)½).

    Reference:
        Dowson and Landau, Journal of Multivariate Analysis 1982.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    common = np.linalg.eigvalsh(root @ second.covariance @ root)
    spread = (
        np.trace(first.covariance)
        + np.trace(second.covariance)
        - 2 * np.sqrt(np.maximum(common, 0)).sum()
    )
    return float(np.sqrt(max(np.sum((first.mean - second.mean) ** 2) + spread, 0)))


def fid(reference: np.ndarray, target: np.ndarray) -> float:
    """Compute the Fréchet inception distance's formula on these features, in squared feature units.

    tr (A B)½ of sample covariances A = XᵀX/(N−1), B = YᵀY/(M−1) is the sum of the singular values of X Yᵀ/√((N−1)(M−1)):
    a matrix of images rather than of features, real and quick whatever the rank.

    Args:
        reference: ``(N, D)``, N ≥ 2.
        target: ``(M, D)``, M ≥ 2.

    Reference:
        Heusel et al., NeurIPS 2017, arXiv 1706.08500, equation 6; on Inception features there, on the encoder's here.
    """
    centred = [(part - part.mean(axis=0)) / np.sqrt(len(part) - 1) for part in (reference, target)]
    common = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    difference = reference.mean(axis=0) - target.mean(axis=0)
    return float(difference @ difference + sum(np.sum(part**2) for part in centred) - 2 * common)


# --- metrics of many divisions at once -----------------------------------------------------------------------------


def kl_labels(probabilities: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Compute KL(target ‖ reference) between the mean predicted class probabilities, nats.

    Half an image is added to every class, so that one which is never predicted costs no infinity.

    Args:
        probabilities: ``(N, K)`` of the pooled sample.
        members: ``(R, N)``, see `divisions`.

    Returns:
        ``(R,)``.
    """
    marginals = []
    for part in (members, ~members):
        counts = part.astype(float) @ probabilities + 0.5
        marginals.append(counts / counts.sum(axis=1, keepdims=True))
    reference, target = marginals
    return np.sum(target * np.log(target / reference), axis=1)


def draw_directions(dimension: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw unit vectors ``(count, dimension)``, uniform over the sphere."""
    vectors = generator.standard_normal((count, dimension))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def sliced_wasserstein(
    features: np.ndarray, members: np.ndarray, directions: np.ndarray
) -> np.ndarray:
    """Average the 1-Wasserstein distance of the samples' projections over directions, in feature units.

    On a line that distance is ∫ |F − G|, so that one sorting per direction serves all divisions.

    Args:
        features: ``(N, D)`` of the pooled sample.
        members: ``(R, N)``, see `divisions`.
        directions: unit vectors ``(P, D)``.

    Returns:
        ``(R,)``.

    Reference:
        Bonneel et al., Journal of Mathematical Imaging and Vision 2015 (for the 2-Wasserstein distance).
    """
    sizes = members.sum(axis=1, keepdims=True)
    weights = (
        np.where(members, 1 / sizes, -1 / (members.shape[1] - sizes)).astype(np.float32).T.copy()
    )
    total = np.zeros(len(members))
    for projection in directions @ features.T:
        order = np.argsort(projection, kind="stable")
        gaps = np.diff(projection[order])
        total += gaps @ np.abs(np.cumsum(weights[order[:-1]], axis=0))
    return total / len(directions)


def mmd(features: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Compute the squared maximum mean discrepancy, unbiased, which can be negative.

    The kernel is exp(−d²/2σ²) with σ the median distance between any two images of the pooled sample.

    Args:
        features: ``(N, D)`` of the pooled sample.
        members: ``(R, N)``, see `divisions`; at least two images on each side.

    Returns:
        ``(R,)``, between about −2/n and 2.

    Reference:
        Gretton et al., JMLR 2012, equation 3 and section 8 (the median).
    """
    lengths = pdist(features)
    kernel = squareform(
        np.exp(-((lengths / (np.median(lengths) or 1.0)) ** 2) / 2)
    )  # zero diagonal: no image meets itself
    inside = members.astype(float)
    met = inside @ kernel
    size, other = inside.sum(axis=1), (1 - inside).sum(axis=1)
    within, total = np.sum(met * inside, axis=1), kernel.sum()
    between = met.sum(axis=1) - within
    beyond = total - within - 2 * between
    return (
        within / (size * (size - 1)) + beyond / (other * (other - 1)) - 2 * between / (size * other)
    )


def confidence_drop(confidences: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Compute the mean confidence of the reference less that of the target ``(R,)``, fractions.

    Args:
        confidences: ``(N,)`` largest class probabilities of the pooled sample.
        members: ``(R, N)``, see `divisions`.

    Reference:
        Guillory et al., ICCV 2021, arXiv 2107.03315, section 3 ("difference of confidences").
    """
    inside = members.astype(float)
    sums, sizes = inside @ confidences, inside.sum(axis=1)
    return sums / sizes - (confidences.sum() - sums) / (len(confidences) - sizes)


# --- a classifier --------------------------------------------------------------------------------------------------


def classifier_accuracy(reference: np.ndarray, target: np.ndarray, seed: int) -> float:
    """Let a logistic regression tell the samples apart; return its accuracy on images it was not fitted on.

    No binomial test belongs to it: the folds' classifiers share images, and of samples from one distribution that test
    would call a tenth different at the level of a twentieth.

    Args:
        reference: ``(N, D)``.
        target: ``(N, D)``, as many: guessing is then right half the time.
        seed: of the folds.

    Reference:
        Lopez-Paz and Oquab, ICLR 2017, arXiv 1610.06545; there one held-out half, here every image is held out once.
    """
    features = StandardScaler().fit_transform(np.concatenate([reference, target]))
    if features.shape[1] > len(features):
        # A rotation onto as many axes as there are images: the same classifier, from far smaller matrices.
        squares, axes = np.linalg.eigh(features @ features.T)
        features = axes * np.sqrt(np.maximum(squares, 0))
    domain = np.repeat([0, 1], [len(reference), len(target)])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed % 2**32)
    found = cross_val_predict(LogisticRegression(solver="liblinear"), features, domain, cv=folds)
    return float(np.mean(found == domain))
