"""How far is the target? All distances of a model's outputs, each with what no shift at all would give, before adapting.

Also what accuracy to expect there, from confidences. No function here takes a label of the target.
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
# A larger value means farther, but for these: estimates of the target's accuracy.
ESTIMATES = ("estimated_accuracy", "estimated_accuracy_atc")


class Sample(NamedTuple):
    """What a model makes of some images: ``features (N, D)``, ``logits (N, K)``."""

    features: np.ndarray
    logits: np.ndarray

    def take(self, rows: np.ndarray) -> "Sample":
        """Pick some images."""
        return Sample(self.features[rows], self.logits[rows])


class Reference(NamedTuple):
    """Images the model is at home with.

    Attributes:
        pool: N of them.
        first: rows of the pool, at most N // 2, that every target is compared with.
        labels: ``(N,)``; None where they are unknown.
        groups: ``(N,)`` what the targets were balanced by, for instance the labels; None: by nothing.
    """

    pool: Sample
    first: np.ndarray
    labels: np.ndarray | None = None
    groups: np.ndarray | None = None


def sample_size(reference: int, *targets: int, at_most: int) -> int:
    """Choose how many images a reference and its targets are compared by: as many on each side.

    Args:
        reference: images of the reference; half of them, since its own floor needs two samples without common images.
        targets: images of each target.
        at_most: the limit set in params.yaml.

    Raises:
        UserError: these are fewer than `MINIMUM`.
    """
    size = min(reference // 2, *targets, at_most)
    if size < MINIMUM:
        raise UserError(
            f"distance: expected at least {2 * MINIMUM} reference images, {MINIMUM} of every target and distance.images of "
            f"{MINIMUM}, found {reference}, {min(targets)} and {at_most}; raise what is too small"
        )
    return size


def measure(
    reference: Reference,
    targets: Mapping[str, Sample],
    *,
    seed: int,
    permutations: int,
    splits: int = SPLITS,
) -> pd.DataFrame:
    """Measure all distances from a reference to targets.

    Args:
        reference: where from.
        targets: where to, by name, each as many images as ``reference.first``.
        seed: seed of the experiment; the results depend on no order of targets.
        permutations: B of the permutation tests.
        splits: how often the reference is split for the floors.

    Returns:
        a row per target and metric: ``target``, ``metric``, ``value``, ``floor`` and ``floor_high`` (mean and 95th
        percentile between two samples of the reference), ``p`` (NaN where there is none), ``n_reference``, ``n_target``.

    Raises:
        UserError: features or logits are not finite.
    """
    first = reference.pool.take(reference.first)
    labels = None if reference.labels is None else reference.labels[reference.first]
    for name, target in {"the reference": reference.pool, **targets}.items():
        if not (np.isfinite(target.features).all() and np.isfinite(target.logits).all()):
            raise UserError(
                f"distance: expected finite features and logits, found others on {name}; train with a smaller learning rate"
            )
    # Several threads only get into each other's way on matrices of this size.
    with threadpool_limits(1):
        return _measure(reference, first, labels, targets, seed, permutations, splits)


def _measure(
    reference: Reference,
    first: Sample,
    labels: np.ndarray | None,
    targets: Mapping[str, Sample],
    seed: int,
    permutations: int,
    splits: int,
) -> pd.DataFrame:
    floors, rows = measure_floors(reference, seed, splits), []
    for name, target in targets.items():
        found = compare(first, target, labels, seed=seed, permutations=permutations)
        value, floor = found["classifier_accuracy"][0], floors["classifier_accuracy"]
        # Hundreds of classifiers for every target would take minutes; the reference's own divisions stand for them.
        found["classifier_accuracy"] = value, distances.permutation_p(np.array([value, *floor]))
        for metric, (value, p) in found.items():
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
    drawn = numpy_generator(seed, "distance", "permutations")
    members = distances.divisions(len(reference.logits), len(target.logits), permutations, drawn)
    features, logits = (
        np.concatenate(pair).astype(float) for pair in zip(reference, target, strict=True)
    )
    probabilities = softmax(logits, axis=1)
    fitted = _fitted(*np.split(features, [len(reference.logits)]), seed)
    result = {name: (value, float("nan")) for name, value in fitted.items()}

    # What is permuted is scaled by the spread of all: that of the reference would know which images these are.
    pooled = features / distances.feature_scale(features)
    directions = distances.draw_directions(
        features.shape[1], DIRECTIONS, numpy_generator(seed, "distance", "directions")
    )
    scaled = features / distances.feature_scale(reference.features.astype(float))
    apart = float(distances.sliced_wasserstein(scaled, members[:1], directions)[0])
    p = (
        distances.permutation_p(distances.sliced_wasserstein(pooled, members, directions))
        if permutations
        else float("nan")
    )
    result["wasserstein_sliced"] = apart, p
    for name, values in {
        "mmd": distances.mmd(pooled, members),
        "kl_labels": distances.kl_labels(probabilities, members),
        "confidence_drop": distances.confidence_drop(probabilities.max(axis=1), members),
    }.items():
        result[name] = float(values[0]), distances.permutation_p(values)
    if labels is not None:
        for name, estimate in zip(
            ESTIMATES, (estimate_accuracy, estimate_accuracy_atc), strict=True
        ):
            result[name] = estimate(reference.logits, labels, target.logits), float("nan")
    return result


def _fitted(reference: np.ndarray, target: np.ndarray, seed: int) -> dict[str, float]:
    """Measure what is fitted to the samples: Gaussians and a classifier."""
    scale = distances.feature_scale(reference)
    source, shifted = distances.fit_gaussians(reference / scale, target / scale)
    return {
        "kl_features": distances.kl_gaussians(shifted, source),
        "wasserstein_gaussian": distances.wasserstein_gaussians(source, shifted),
        "fid": distances.fid(reference, target),
        "classifier_accuracy": distances.classifier_accuracy(
            reference, target, stream_seed(seed, "distance", "folds")
        ),
    }


def measure_floors(reference: Reference, seed: int, splits: int = SPLITS) -> dict[str, np.ndarray]:
    """Measure the same between two samples of the reference, without common images, again and again.

    Args:
        reference: what to split; the samples are as large as ``reference.first``.
        seed: of the splits.
        splits: how many.

    Returns:
        by metric ``(splits,)`` values.
    """
    found = []
    for number in range(splits):
        one, other = split(reference, numpy_generator(seed, "distance", "split", number))
        labels = None if reference.labels is None else reference.labels[one]
        compared = compare(reference.pool.take(one), reference.pool.take(other), labels, seed=seed)
        found.append({metric: value for metric, (value, _) in compared.items()})
    return {metric: np.array([values[metric] for values in found]) for metric in found[0]}


def split(reference: Reference, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw two samples of the reference without common images: rows of its pool, each balanced as the targets are."""
    size, count = len(reference.first), len(reference.pool.logits)
    groups = np.zeros(count, dtype=int) if reference.groups is None else reference.groups
    order = generator.permutation(count)
    place = np.empty(count, dtype=int)
    for group in np.unique(groups):
        own = order[groups[order] == group]
        place[own] = np.arange(len(own))
    # As many of every group as there are; then one for each sample in turn, group by group.
    kept = order[np.argsort(place[order], kind="stable")][: 2 * size]
    dealt = kept[np.argsort(groups[kept], kind="stable")]
    return dealt[::2], dealt[1::2]


# --- what accuracy to expect -----------------------------------------------------------------------------------------


def estimate_accuracy(
    reference_logits: np.ndarray, labels: np.ndarray, target_logits: np.ndarray
) -> float:
    """Estimate the target's accuracy: the reference's less the drop of mean confidence, within [0, 1].

    Args:
        reference_logits: ``(N, K)``.
        labels: ``(N,)`` of the reference.
        target_logits: ``(M, K)``.

    Reference:
        Guillory et al., ICCV 2021, arXiv 2107.03315, section 3.
    """
    right = np.mean(reference_logits.argmax(axis=1) == labels)
    reference, target = (
        softmax(logits, axis=1).max(axis=1).mean() for logits in (reference_logits, target_logits)
    )
    return float(np.clip(right - (reference - target), 0, 1))


def estimate_accuracy_atc(
    reference_logits: np.ndarray, labels: np.ndarray, target_logits: np.ndarray
) -> float:
    """Estimate the target's accuracy: the share of images above the confidence that as many reference images pass as are right.

    Args:
        reference_logits: ``(N, K)``.
        labels: ``(N,)`` of the reference.
        target_logits: ``(M, K)``.

    Reference:
        Garg et al., ICLR 2022, arXiv 2201.04234, section 4, with the largest class probability as score.
    """
    reference, target = (
        np.sort(softmax(logits, axis=1).max(axis=1)) for logits in (reference_logits, target_logits)
    )
    wrong = int(np.sum(reference_logits.argmax(axis=1) != labels))
    threshold = reference[wrong] if wrong < len(reference) else np.inf
    return float(np.mean(target >= threshold))
