"""The same picture twice, by the hash of its pixels.

A picture in two sets would leak from training into the test. Two copies in one set may have
contradicting labels.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from tttlab.data.image_sets import ImageSet
from tttlab.errors import UserError

Policy = Literal["error", "allow", "skip"]
_ADVICE = "remove one of each or set data.duplicates:"


def settle(
    trained: Mapping[str, ImageSet],
    tested: Mapping[str, ImageSet],
    uncorrupted: Collection[str],
    policy: Policy,
) -> tuple[dict[str, ImageSet], dict[str, ImageSet]]:
    """Refuse forbidden copies, or leave them out.

    Args:
        trained: training sets by their keys in params.yaml, ``data.labeled`` last.
        tested: test sets by key; two of these may share images.
        uncorrupted: keys of the test sets in which the same pixels are the same picture.
        policy: ``error``: no two sets share an image, and ``data.labeled`` has every image once.
            ``allow``: training sets may share images, and have some several times.
            ``skip``: training sets lose their copies of test images, ``data.unlabeled`` loses those
            of ``data.labeled``, and ``data.labeled`` has every image once.

    Returns:
        both, without the images left out; ``skipped`` of the sets names these.

    Raises:
        UserError: there are forbidden copies. Copies under two labels are always forbidden, unless
            ``skip`` leaves out all of them.
    """
    labeled = trained["data.labeled"]
    if policy == "skip":
        tested = {
            key: _one_label(key, images) if key in uncorrupted else images
            for key, images in tested.items()
        }
        labeled = _once("data.labeled", _one_label("data.labeled", labeled))
        labeled = without("data.labeled", labeled, tested)
        unlabeled = trained["data.unlabeled"]
        unlabeled = without("data.unlabeled", unlabeled, {**tested, "data.labeled": labeled})
        return {"data.unlabeled": unlabeled, "data.labeled": labeled}, tested
    for key in ("data.labeled", *uncorrupted):
        check_labels(key, labeled if key == "data.labeled" else tested[key])
    if policy == "error":
        check_once("data.labeled", labeled)
        check_duplicates(trained, tested)
    else:
        for key, images in trained.items():
            check_duplicates({key: images}, tested)
    return dict(trained), dict(tested)


def check_labels(key: str, images: ImageSet) -> None:
    """Refuse the same pixels under two labels in one set.

    Args:
        key: the set's key in params.yaml.
        images: the set.

    Raises:
        UserError: there are such images; it names two.
    """
    contradicting = _contradicting(images)
    if len(contradicting):
        pair = contradicting[0], images.firsts[contradicting[0]]
        copy, first = (
            f"{images.names[index]} of class {images.classes[images.labels[index]]!r}"
            for index in pair
        )
        raise UserError(
            f"{key}: {copy} has the same pixels as {first} "
            f"({len(contradicting)} such images in all); {_ADVICE} skip"
        )


def check_once(key: str, images: ImageSet) -> None:
    """Refuse the same pixels twice in one set; arguments and errors as of `check_labels`."""
    copies = np.flatnonzero(images.firsts != np.arange(len(images)))
    if len(copies):
        names = images.names
        raise UserError(
            f"{key}: {names[copies[0]]} has the same pixels as {names[images.firsts[copies[0]]]} "
            f"({len(copies)} such images in all); {_ADVICE} allow"
        )


def check_duplicates(trained: Mapping[str, ImageSet], tested: Mapping[str, ImageSet]) -> None:
    """Refuse the same pixels in two sets, unless both are test sets.

    Args:
        trained: training sets by their keys in params.yaml.
        tested: test sets by key.

    Raises:
        UserError: two images of different sets are identical.
    """
    owners: dict[str, tuple[str, str]] = {}  # by hash: the first set that has it, the image's name
    pairs: list[tuple[str, str, str, str]] = []
    for key, images in (trained | tested).items():
        # Test images are looked up and not entered: two test sets may share images.
        find_owner = owners.setdefault if key in trained else owners.get
        for name, pixels in zip(images.names, images.hashes, strict=True):
            first_key, first_name = find_owner(pixels, (key, name))
            if first_key != key:
                pairs.append((first_key, first_name, key, name))
    if pairs:
        first_key, first_name, key, name = pairs[0]
        raise UserError(
            f"{key}: {name} has the same pixels as {first_name} of {first_key} "
            f"({len(pairs)} such images in all); "
            f"{_ADVICE} {'allow' if key in trained else 'skip'}"
        )


def without(key: str, images: ImageSet, others: Mapping[str, ImageSet]) -> ImageSet:
    """Leave out the images whose pixels are in another set.

    Args:
        key: the set's key in params.yaml, for messages.
        images: the set.
        others: the other sets, by the names that ``skipped`` gives them.

    Raises:
        UserError: no image would be left.
    """
    owners: dict[str, str] = {}
    for other_key, other_images in others.items():
        for name, pixels in zip(other_images.names, other_images.hashes, strict=True):
            owners.setdefault(pixels, f"{name} of {other_key}")
    reasons = {
        index: f"has the same pixels as {owners[pixels]}"
        for index, pixels in enumerate(images.hashes)
        if pixels in owners
    }
    return _leave_out(key, images, reasons)


def _contradicting(images: ImageSet) -> np.ndarray:
    """Find the images whose label differs from that of the first image with the same pixels."""
    return np.flatnonzero(images.labels != images.labels[images.firsts])


def _one_label(key: str, images: ImageSet) -> ImageSet:
    """Leave out all images that have a copy with another label."""
    ambiguous = np.isin(images.firsts, images.firsts[_contradicting(images)])
    reason = "there are copies of it under two labels"
    return _leave_out(key, images, dict.fromkeys(np.flatnonzero(ambiguous).tolist(), reason))


def _once(key: str, images: ImageSet) -> ImageSet:
    """Leave out the copies of earlier images."""
    names = images.names
    reasons = {
        index: f"has the same pixels as {names[first]}"
        for index, first in enumerate(images.firsts.tolist())
        if first != index
    }
    return _leave_out(key, images, reasons)


def _leave_out(key: str, images: ImageSet, reasons: Mapping[int, str]) -> ImageSet:
    if not reasons:
        return images
    kept = np.delete(np.arange(len(images)), list(reasons))
    names = images.names
    skipped = tuple(f"{names[index]}: {reason}" for index, reason in reasons.items())
    if not kept.size:
        raise UserError(
            f"{key}: expected images that are nowhere else, found only copies, "
            f"the first is {skipped[0]}; add others"
        )
    return replace(images.take(kept), skipped=images.skipped + skipped)
