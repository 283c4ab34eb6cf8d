"""Which images are taken: a part of a source, some of each class, those for validation.

Every choice is drawn from (seed, source, image id), so it is the same on every machine and for
every order of the work. Parts of one source that do not overlap hold different images, whatever set
asks for them.
"""

from collections.abc import Sequence

import numpy as np

from tttlab.data.image_sets import ImageSet
from tttlab.data.sources import ImageSource
from tttlab.errors import UserError
from tttlab.seeding import numpy_generator, stream_seed


def _ranks(names: Sequence[str], groups: np.ndarray, seed: int, *key: str) -> np.ndarray:
    """Rank the images 0, 1, … within their groups, in an order drawn from their names alone."""
    drawn = np.array([stream_seed(seed, *key, name) for name in names])
    order = np.lexsort((drawn, groups))
    starts = np.searchsorted(groups[order], groups[order])
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - starts
    return ranks


def take_part(source: ImageSource, part: tuple[float, float], seed: int, name: str) -> np.ndarray:
    """Choose the images of a part: the same share of every class, to within one image.

    Args:
        source: the images.
        part: from and to, fractions of the source; parts that do not overlap share no image, and
            [0, 1] holds all.
        seed: the seed of the experiment.
        name: the source's name; the choice depends on it, not on which set is being filled.

    Returns:
        sorted indices.
    """
    ranks = _ranks(source.image_ids, source.groups, seed, "part", name)
    sizes = np.bincount(source.groups, minlength=len(source.classes))
    # A random offset per class: else all classes of a single image would fall into the same part.
    offsets = np.array(
        [numpy_generator(seed, "offset", name, label).random() for label in source.classes]
    )
    fractions = (ranks + offsets[source.groups]) / sizes[source.groups]
    return np.flatnonzero((part[0] <= fractions) & (fractions < part[1]))


def balanced_subset(
    names: Sequence[str], groups: np.ndarray, count: int | None, seed: int, *key: str
) -> np.ndarray:
    """Choose ``count`` images (None: all), as evenly as possible from the groups.

    Every group gives the same number, to within one, or all its images where it has fewer. A
    smaller subset is contained in a larger one.

    Returns:
        sorted indices.
    """
    if count is None or count >= len(names):
        return np.arange(len(names))
    ranks = _ranks(names, groups, seed, *key)
    drawn = np.array([stream_seed(seed, *key, "turn", name) for name in names])
    return np.sort(np.lexsort((drawn, ranks))[:count])


def check_sizes(classes: Sequence[str], sizes: np.ndarray) -> None:
    """Refuse labeled images that cannot be split, from their numbers ``sizes (K,)`` by class.

    Raises:
        UserError: there are fewer than two classes, or a class has fewer than two images.
    """
    if len(classes) < 2:
        raise UserError(
            "data.labeled: expected at least two classes, "
            f"found {', '.join(classes) or 'none'}; data.labeled.root must be the folder that "
            "holds the folders of the classes"
        )
    if sizes.min() < 2:
        name = classes[int(sizes.argmin())]
        raise UserError(
            "data.labeled: expected at least two different images of every class "
            f"(for training and for validation), found {sizes.min()} of class {name!r}; "
            "widen data.labeled.part, raise data.labeled.limit, or add images"
        )


def split_validation(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split labeled images into training and validation, class by class.

    Images with the same pixels stay together.

    Args:
        images: the labeled images; copies of an image have its label.
        fraction: share of every class that goes to validation, at least one image and never all.
        seed: the seed of the experiment.

    Raises:
        UserError: there are fewer than two classes, or a class has fewer than two different images.
    """
    unique, row_of_image = np.unique(images.firsts, return_inverse=True)
    labels = images.labels[unique]
    sizes = np.bincount(labels, minlength=len(images.classes))
    check_sizes(images.classes, sizes)
    ranks = _ranks([images.image_ids[index] for index in unique], labels, seed, "validation")
    counts = np.clip(np.round(sizes * fraction), 1, sizes - 1)
    validation = (ranks < counts[labels])[row_of_image]
    return images.take(np.flatnonzero(~validation)), images.take(np.flatnonzero(validation))
