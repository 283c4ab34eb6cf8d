"""Which images of a set are taken: a part of it, some of each class, those for validation; the same on every machine."""

from collections.abc import Sequence

import numpy as np

from tttlab.data.image_sets import ImageSet
from tttlab.data.sources import Source
from tttlab.errors import UserError
from tttlab.seeding import numpy_generator, stream_seed


def _ranks(names: Sequence[str], groups: np.ndarray, seed: int, *key: str) -> np.ndarray:
    """Give every image its place 0, 1, … within its group, in an order drawn from its name alone."""
    drawn = np.array([stream_seed(seed, *key, name) for name in names])
    order = np.lexsort((drawn, groups))
    starts = np.searchsorted(groups[order], groups[order])
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - starts
    return ranks


def take_part(source: Source, part: tuple[float, float], seed: int, name: str) -> np.ndarray:
    """Choose the images of a part: the same share of every class, to within one image.

    Args:
        source: the images.
        part: from and to, fractions of the source; parts that do not overlap share no image, and [0, 1] holds all.
        seed: the seed of the experiment.
        name: the source's name; the choice depends on it, not on which set is being filled.

    Returns:
        sorted indices.
    """
    ranks = _ranks(source.image_ids, source.groups, seed, "part", name)
    sizes = np.bincount(source.groups, minlength=len(source.classes))
    # A random offset per class: else many classes of one image would all fall into the same part.
    offsets = np.array(
        [numpy_generator(seed, "offset", name, each).random() for each in source.classes]
    )
    places = (ranks + offsets[source.groups]) / sizes[source.groups]
    return np.flatnonzero((part[0] <= places) & (places < part[1]))


def balanced_subset(
    names: Sequence[str], groups: np.ndarray, count: int | None, seed: int, *key: str
) -> np.ndarray:
    """Choose ``count`` images (None: all), of every group the same number where it has that many, to within one.

    A smaller subset is contained in a larger one.

    Returns:
        sorted indices.
    """
    if count is None or count >= len(names):
        return np.arange(len(names))
    ranks = _ranks(names, groups, seed, *key)
    drawn = np.array([stream_seed(seed, *key, "turn", name) for name in names])
    return np.sort(np.lexsort((drawn, ranks))[:count])


def split_validation(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split labeled images into training and validation, class by class; images with the same pixels stay together.

    Args:
        images: the labeled images; those with the same pixels have the same label.
        fraction: share of every class that goes to validation, at least one image and never all.
        seed: the seed of the experiment.

    Raises:
        UserError: there are fewer than two classes, or a class has fewer than two different images.
    """
    unique, copied = np.unique(images.firsts, return_inverse=True)
    labels = images.labels[unique]
    sizes = np.bincount(labels, minlength=len(images.classes))
    if len(images.classes) < 2:
        raise UserError(
            f"data.labeled: expected at least two classes, found {', '.join(images.classes) or 'none'}"
        )
    if sizes.min() < 2:
        name = images.classes[int(sizes.argmin())]
        raise UserError(
            f"data.labeled: expected at least two different images of every class (for training and for validation), found "
            f"{sizes.min()} of class {name!r}; widen data.labeled.part, raise data.labeled.limit, or add images"
        )
    ranks = _ranks([images.image_ids[index] for index in unique], labels, seed, "validation")
    counts = np.clip(np.round(sizes * fraction), 1, sizes - 1)
    held = (ranks < counts[labels])[copied]
    return images.take(np.flatnonzero(~held)), images.take(np.flatnonzero(held))
