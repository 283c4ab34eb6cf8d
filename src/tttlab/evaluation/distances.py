"""How far two samples of images lie apart: fitted Gaussians, transport, a kernel, a classifier.

All functions take plain arrays, a row per image. Those with an argument ``members`` measure many
divisions of one pooled sample into reference and target at once: first the true division, then
permuted ones (see `divisions` and `permutation_p`).
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


# --- divisions of a pooled sample ----------------------------------------------------------------


def divisions(
    reference: int, target: int, permutations: int = 0, generator: np.random.Generator | None = None
) -> np.ndarray:
    """Mark the images of the reference in a pooled sample, truly and after random permutations.

    Args:
        reference: number of images of the reference, which come first.
        target: number of images of the target, which follow.
        permutations: B.
        generator: of the permutations; not needed if there are none.

    Returns:
        bool ``(1 + B, reference + target)``, the true division first.
    """
    true = np.arange(reference + target) < reference
    return np.stack([true, *(generator.permutation(true) for _ in range(permutations))])


def permutation_p(values: np.ndarray) -> float:
    """Compute the p-value of the permutation test: (1 + #{permuted ≥ true}) / (1 + B).

    Args:
        values: ``(1 + B,)`` as the metrics return them, the true division first. With B = 0 the
            result is NaN.
    """
    if len(values) < 2:
        return float("nan")
    rounding = 1e-9 * np.abs(values).max()  # the order of a sum must not break a tie
    return float(np.mean(values >= values[0] - rounding))


# --- fitted Gaussians ----------------------------------------------------------------------------


def feature_scale(reference: np.ndarray) -> np.ndarray:
    """Compute the scale of each feature ``(D,)``: its standard deviation, bounded from below.

    The bound is a tenth of the root mean square over features. Without it, a unit that hardly
    varies on the reference would dominate all others as soon as it varies on the target.
    """
    spread = reference.std(axis=0)
    typical = np.sqrt(np.mean(spread**2)) or 1.0
    return np.maximum(spread, 0.1 * typical)


def fit_gaussians(reference: np.ndarray, target: np.ndarray) -> tuple[Gaussian, Gaussian]:
    """Fit both samples in the main directions of the reference.

    A full covariance of D features needs many more than D images. So PCA of the reference keeps a
    direction for every `IMAGES_PER_COMPONENT` images of the smaller sample, and the covariances
    in this subspace are shrunk.

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
    # The multiple of the identity keeps it invertible even if all images have the same features.
    covariance = ledoit_wolf(values)[0] + 1e-6 * np.eye(values.shape[1])
    return Gaussian(values.mean(axis=0), covariance)


def kl_gaussians(target: Gaussian, reference: Gaussian) -> float:
    """Compute KL(target ‖ reference), nats."""
    difference = target.mean - reference.mean
    ratio = np.linalg.solve(reference.covariance, np.column_stack([target.covariance, difference]))
    trace, mahalanobis = np.trace(ratio[:, :-1]), difference @ ratio[:, -1]
    covariances = reference.covariance, target.covariance
    reference_logdet, target_logdet = (np.linalg.slogdet(matrix)[1] for matrix in covariances)
    return float(trace + mahalanobis - len(difference) + (reference_logdet - target_logdet)) / 2


def wasserstein_gaussians(first: Gaussian, second: Gaussian) -> float:
    """Compute the 2-Wasserstein (Fréchet) distance of two Gaussians, in units of the variables.

    Its square is ‖Δμ‖² + tr(A + B − 2 (A½ B A½)½).

    Reference:
        Dowson and Landau, Journal of Multivariate Analysis 1982.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    common = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second.covariance @ root), 0)).sum()
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * common
    return float(np.sqrt(max(np.sum((first.mean - second.mean) ** 2) + spread, 0)))


def fid(reference: np.ndarray, target: np.ndarray) -> float:
    """Compute the Fréchet inception distance's formula on these features, in squared feature units.

    For the sample covariances A = XᵀX/(N−1) and B = YᵀY/(M−1), tr (A B)½ is the sum of the singular
    values of X Yᵀ/√((N−1)(M−1)). This matrix is of images rather than features, so that the result
    is real and quick to compute, whatever the rank.

    Args:
        reference: ``(N, D)``, N ≥ 2.
        target: ``(M, D)``, M ≥ 2.

    Reference:
        Heusel et al., NeurIPS 2017, arXiv 1706.08500, equation 6; there on features of an Inception
        network, here on the encoder's.
    """
    samples = (reference, target)
    centred = [(sample - sample.mean(axis=0)) / np.sqrt(len(sample) - 1) for sample in samples]
    common = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    difference = reference.mean(axis=0) - target.mean(axis=0)
    traces = sum(np.sum(sample**2) for sample in centred)
    return float(difference @ difference + traces - 2 * common)


# --- metrics of many divisions at once -----------------------------------------------------------


def kl_labels(probabilities: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Compute KL(target ‖ reference) between the mean predicted class probabilities, nats.

    Half an image is added to every class, so that the result is finite even if a class is never
    predicted.

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
    """Average the 1-Wasserstein distance of the samples' projections over directions.

    It is in feature units. On a line the distance is ∫ |F − G| with the distribution functions F
    and G, so that one sorting per direction serves all divisions.

    Args:
        features: ``(N, D)`` of the pooled sample.
        members: ``(R, N)``, see `divisions`.
        directions: unit vectors ``(P, D)``.

    Returns:
        ``(R,)``.

    Reference:
        Bonneel et al., Journal of Mathematical Imaging and Vision 2015, for the 2-Wasserstein
        distance.
    """
    sizes = members.sum(axis=1, keepdims=True)
    weights = np.where(members, 1 / sizes, -1 / (members.shape[1] - sizes))
    weights = weights.astype(np.float32).T.copy()
    total = np.zeros(len(members))
    for projection in directions @ features.T:
        order = np.argsort(projection, kind="stable")
        gaps = np.diff(projection[order])
        total += gaps @ np.abs(np.cumsum(weights[order[:-1]], axis=0))
    return total / len(directions)


def mmd(features: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Compute an unbiased estimate of the squared maximum mean discrepancy; it can be negative.

    The kernel is exp(−d²/2σ²) with σ the median distance of two images of the pooled sample.

    Args:
        features: ``(N, D)`` of the pooled sample.
        members: ``(R, N)``, see `divisions`; at least two images on each side.

    Returns:
        ``(R,)``, between about −2/n and 2.

    Reference:
        Gretton et al., JMLR 2012, equation 3 and section 8 (the median).
    """
    lengths = pdist(features)
    sigma = np.median(lengths) or 1.0
    # The diagonal is zero, so that the sums leave out the pairs of an image with itself.
    kernel = squareform(np.exp(-((lengths / sigma) ** 2) / 2))
    inside = members.astype(float)
    n, m = inside.sum(axis=1), (1 - inside).sum(axis=1)
    to_reference = inside @ kernel
    within_reference = np.sum(to_reference * inside, axis=1)
    between = to_reference.sum(axis=1) - within_reference
    within_target = kernel.sum() - within_reference - 2 * between
    return within_reference / (n * (n - 1)) + within_target / (m * (m - 1)) - 2 * between / (n * m)


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


# --- a classifier --------------------------------------------------------------------------------


def classifier_accuracy(reference: np.ndarray, target: np.ndarray, seed: int) -> float:
    """Compute the cross-validated accuracy of a logistic regression that tells the samples apart.

    A binomial test of it is not valid, because the folds' classifiers share images: at a level of
    5 % it rejects 10 % of pairs of samples from one distribution.

    Args:
        reference: ``(N, D)``.
        target: ``(N, D)``; as many images, so that guessing is right half the time.
        seed: of the folds.

    Reference:
        Lopez-Paz and Oquab, ICLR 2017, arXiv 1610.06545; there half of the images are held out,
        here every image is held out once.
    """
    features = StandardScaler().fit_transform(np.concatenate([reference, target]))
    if features.shape[1] > len(features):
        # A rotation onto as many axes as there are images gives the same classifier, faster.
        squares, axes = np.linalg.eigh(features @ features.T)
        features = axes * np.sqrt(np.maximum(squares, 0))
    domains = np.repeat([0, 1], [len(reference), len(target)])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed % 2**32)
    classifier = LogisticRegression(solver="liblinear")
    predicted = cross_val_predict(classifier, features, domains, cv=folds)
    return float(np.mean(predicted == domains))
