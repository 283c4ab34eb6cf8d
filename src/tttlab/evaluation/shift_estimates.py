"""All distances of a model's outputs to a target before adapting, each with its no-shift floor.

Also estimates of the accuracy on the target. No function here takes a label of the target.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import softmax
from threadpoolctl import threadpool_limits

from tttlab.errors import UserError
from tttlab.evaluation import distances
from tttlab.seeding import numpy_generator, stream_seed

MINIMUM = 10
SPLITS = 99
DIRECTIONS = 64
# Estimates of the target's accuracy. For all other metrics, a larger value means farther.
ESTIMATES = ("estimated_accuracy", "estimated_accuracy_atc")


class Sample(NamedTuple):
    """A model's outputs on a sample of images: ``features (N, D)``, ``logits (N, K)``."""

    features: np.ndarray
    logits: np.ndarray

    def take(self, rows: np.ndarray) -> "Sample":
        """Pick some images."""
        return Sample(self.features[rows], self.logits[rows])


class Reference(NamedTuple):
    """Images from the source domain.

    Attributes:
        pool: N images.
        first: rows of the pool, at most N // 2, that every target is compared with.
        labels: ``(N,)``; None if unknown.
        groups: ``(N,)`` by which the targets were balanced, such as the labels; None if by nothing.
    """

    pool: Sample
    first: np.ndarray
    labels: np.ndarray | None = None
    groups: np.ndarray | None = None


def sample_size(reference: int, *targets: int, at_most: int) -> int:
    """Choose how many images to take of the reference and of every target.

    Args:
        reference: number of images of the reference. Half of them can be taken, because its floor
            needs two samples without common images.
        targets: number of images of each target.
        at_most: the limit set in params.yaml.

    Raises:
        UserError: there are fewer than `MINIMUM`.
    """
    size = min(reference // 2, *targets, at_most)
    if size < MINIMUM:
        raise UserError(
            f"distance: expected at least {2 * MINIMUM} reference images, "
            f"{MINIMUM} of every target and distance.images of {MINIMUM}, "
            f"found {reference}, {min(targets)} and {at_most}; raise what is too small"
        )
    return size


def measure_shifts(
    reference: Reference,
    targets: Mapping[str, Sample],
    *,
    seed: int,
    permutations: int,
    splits: int | None = None,
) -> pd.DataFrame:
    """Measure all distances from a reference to targets.

    Args:
        reference: images from the source domain.
        targets: samples by name, each with as many images as ``reference.first``.
        seed: seed of the experiment; the order of targets does not change the results.
        permutations: B of the permutation tests.
        splits: how often the reference is split for the floors; None: ``permutations`` times, but
            no more than `SPLITS`.

    Returns:
        a row per target and metric: ``target``, ``metric``, ``value``, ``floor`` and ``floor_high``
        (mean and 95th percentile between two samples of the reference), ``p`` (NaN for metrics
        without a test), ``n_reference``, ``n_target``.

    Raises:
        UserError: features or logits are not finite.
    """
    for name, target in {"the reference": reference.pool, **targets}.items():
        if not (np.isfinite(target.features).all() and np.isfinite(target.logits).all()):
            raise UserError(
                f"distance: expected finite features and logits, found others on {name}; "
                "train with a smaller learning rate"
            )
    # On matrices of this size, several threads are slower than one.
    with threadpool_limits(1):
        splits = min(permutations, SPLITS) if splits is None else splits
        return _measure(reference, targets, seed, permutations, splits)


def _measure(
    reference: Reference,
    targets: Mapping[str, Sample],
    seed: int,
    permutations: int,
    splits: int,
) -> pd.DataFrame:
    first = reference.pool.take(reference.first)
    labels = None if reference.labels is None else reference.labels[reference.first]
    floors, rows = measure_floors(reference, seed, splits), []
    for name, target in targets.items():
        measured = compare(first, target, labels, seed=seed, permutations=permutations)
        # Permuting would take hundreds of classifiers per target, minutes of work. The divisions of
        # the reference take the place of the permuted ones.
        accuracy = measured["classifier_accuracy"][0]
        accuracies = np.array([accuracy, *floors["classifier_accuracy"]])
        measured["classifier_accuracy"] = accuracy, distances.permutation_p(accuracies)
        for metric, (value, p) in measured.items():
            floor = floors[metric]
            rows.append(
                {
                    "target": name,
                    "metric": metric,
                    "value": value,
                    "floor": floor.mean(),
                    "floor_high": np.quantile(floor, 0.95),
                    "p": p,
                    "n_reference": len(first.logits),
                    "n_target": len(target.logits),
                }
            )
    return pd.DataFrame(rows)


def compare(
    reference: Sample,
    target: Sample,
    labels: np.ndarray | None = None,
    *,
    seed: int,
    permutations: int = 0,
) -> dict[str, tuple[float, float]]:
    """Measure all distances between two samples of equal size.

    Args:
        reference: n images.
        target: n images.
        labels: ``(n,)`` of the reference; None leaves the estimates of accuracy out.
        seed: of directions, folds and permutations.
        permutations: B; 0 for values alone.

    Returns:
        by metric: the value, and its permutation p-value or NaN.
    """
    generator = numpy_generator(seed, "distance", "permutations")
    sizes = len(reference.logits), len(target.logits)
    members = distances.divisions(*sizes, permutations, generator)
    features, logits = (
        np.concatenate(pair).astype(float) for pair in zip(reference, target, strict=True)
    )
    probabilities = softmax(logits, axis=1)
    fitted = _fitted_distances(*np.split(features, [sizes[0]]), seed)
    result = {name: (value, float("nan")) for name, value in fitted.items()}

    # In a permutation test all images have the same scale. The reference's would make the true
    # division differ from the permuted ones.
    pooled = features / distances.feature_scale(features)
    generator = numpy_generator(seed, "distance", "directions")
    directions = distances.draw_directions(features.shape[1], DIRECTIONS, generator)
    scaled = features / distances.feature_scale(reference.features.astype(float))
    value, p = distances.sliced_wasserstein(scaled, members[:1], directions)[0], float("nan")
    if permutations:
        p = distances.permutation_p(distances.sliced_wasserstein(pooled, members, directions))
    result["wasserstein_sliced"] = float(value), p
    for name, values in {
        "mmd": distances.mmd(pooled, members),
        "kl_labels": distances.kl_labels(probabilities, members),
        "confidence_drop": distances.confidence_drop(probabilities.max(axis=1), members),
    }.items():
        result[name] = float(values[0]), distances.permutation_p(values)
    if labels is not None:
        estimators = (estimate_accuracy, estimate_accuracy_atc)
        for name, estimate in zip(ESTIMATES, estimators, strict=True):
            result[name] = estimate(reference.logits, labels, target.logits), float("nan")
    return result


def _fitted_distances(reference: np.ndarray, target: np.ndarray, seed: int) -> dict[str, float]:
    """Measure the distances that fit Gaussians or a classifier to the samples."""
    scale = distances.feature_scale(reference)
    source, shifted = distances.fit_gaussians(reference / scale, target / scale)
    folds = stream_seed(seed, "distance", "folds")
    return {
        "kl_features": distances.kl_gaussians(shifted, source),
        "wasserstein_gaussian": distances.wasserstein_gaussians(source, shifted),
        "fid": distances.fid(reference, target),
        "classifier_accuracy": distances.classifier_accuracy(reference, target, folds),
    }


def measure_floors(reference: Reference, seed: int, splits: int) -> dict[str, np.ndarray]:
    """Measure all distances between two random samples of the reference, without common images.

    Args:
        reference: the images; the samples are as large as ``reference.first``.
        seed: of the splits.
        splits: number of random splits.

    Returns:
        by metric ``(splits,)`` values.
    """
    repetitions = []
    for number in range(splits):
        first, second = split(reference, numpy_generator(seed, "distance", "split", number))
        labels = None if reference.labels is None else reference.labels[first]
        samples = reference.pool.take(first), reference.pool.take(second)
        measured = compare(*samples, labels, seed=seed)
        repetitions.append({metric: value for metric, (value, _) in measured.items()})
    metrics = repetitions[0]
    return {metric: np.array([values[metric] for values in repetitions]) for metric in metrics}


def split(reference: Reference, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw two samples of the reference without common images, each balanced as the targets are.

    Returns:
        their rows in the pool.
    """
    size, count = len(reference.first), len(reference.pool.logits)
    groups = np.zeros(count, dtype=int) if reference.groups is None else reference.groups
    order = generator.permutation(count)
    rank_in_group = np.empty(count, dtype=int)
    for group in np.unique(groups):
        members = order[groups[order] == group]
        rank_in_group[members] = np.arange(len(members))
    # Take equally many of every group while it lasts, then deal them to the samples in turn.
    kept = order[np.argsort(rank_in_group[order], kind="stable")][: 2 * size]
    dealt = kept[np.argsort(groups[kept], kind="stable")]
    return dealt[::2], dealt[1::2]


# --- estimates of accuracy -----------------------------------------------------------------------


def estimate_accuracy(
    reference_logits: np.ndarray, labels: np.ndarray, target_logits: np.ndarray
) -> float:
    """Estimate the target's accuracy as the reference's less the drop of mean confidence.

    Args:
        reference_logits: ``(N, K)``.
        labels: ``(N,)`` of the reference.
        target_logits: ``(M, K)``.

    Returns:
        a fraction, clipped to [0, 1].

    Reference:
        Guillory et al., ICCV 2021, arXiv 2107.03315, section 3.
    """
    accuracy = np.mean(reference_logits.argmax(axis=1) == labels)
    drop = _confidences(reference_logits).mean() - _confidences(target_logits).mean()
    return float(np.clip(accuracy - drop, 0, 1))


def estimate_accuracy_atc(
    reference_logits: np.ndarray, labels: np.ndarray, target_logits: np.ndarray
) -> float:
    """Estimate the target's accuracy as the share of its images above a threshold of confidence.

    The share of reference images above the threshold is the accuracy on the reference.

    Args:
        reference_logits: ``(N, K)``.
        labels: ``(N,)`` of the reference.
        target_logits: ``(M, K)``.

    Reference:
        Garg et al., ICLR 2022, arXiv 2201.04234, section 4; the score is the largest probability.
    """
    reference = np.sort(_confidences(reference_logits))
    wrong = int(np.sum(reference_logits.argmax(axis=1) != labels))
    threshold = reference[wrong] if wrong < len(reference) else np.inf
    return float(np.mean(_confidences(target_logits) >= threshold))


def _confidences(logits: np.ndarray) -> np.ndarray:
    """Compute the largest class probabilities ``(N,)`` from ``logits (N, K)``."""
    return softmax(logits, axis=1).max(axis=1)
