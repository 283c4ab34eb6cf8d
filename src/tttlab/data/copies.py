"""The same picture twice: in two sets, where it would leak, or in one, where its labels may contradict each other."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from tttlab.data.image_sets import ImageSet
from tttlab.errors import UserError

Policy = Literal["error", "allow", "skip"]
_WAY_OUT = "remove one of each or set data.duplicates:"


def settle(
    trained: Mapping[str, ImageSet],
    tested: Mapping[str, ImageSet],
    uncorrupted: Collection[str],
    policy: Policy,
) -> tuple[dict[str, ImageSet], dict[str, ImageSet]]:
    """Refuse copies that must not be, or leave them out.

    Args:
        trained: what is trained on, by key in params.yaml, ``data.labeled`` last.
        tested: what is tested on, by key; two of these may share images.
        uncorrupted: keys of those of ``tested`` in which the same pixels are the same picture.
        policy: ``error``: no two sets share an image, and ``data.labeled`` has every image once; ``allow``: sets that are
            trained on may share images, and have some several times; ``skip``: what is trained on loses its copies of what is
            tested on, ``data.unlabeled`` those of ``data.labeled``, and this has every image once.

    Returns:
        both, without what was left out; ``skipped`` of the sets says what that was.

    Raises:
        UserError: two images are identical and must not be; with two labels they never may, ``skip`` leaves out both.
    """
    labeled = trained["data.labeled"]
    if policy == "skip":
        tested = {
            key: _one_label(key, images) if key in uncorrupted else images
            for key, images in tested.items()
        }
        labeled = without(
            "data.labeled", _once("data.labeled", _one_label("data.labeled", labeled)), tested
        )
        unlabeled = without(
            "data.unlabeled", trained["data.unlabeled"], {**tested, "data.labeled": labeled}
        )
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
        key: of the set in params.yaml.
        images: the set.

    Raises:
        UserError: there are such images; it names two.
    """
    wrong = _contradicting(images)
    if len(wrong):
        pair = wrong[0], images.firsts[wrong[0]]
        one, other = (
            f"{images.names[index]} of class {images.classes[images.labels[index]]!r}"
            for index in pair
        )
        raise UserError(
            f"{key}: {one} has the same pixels as {other} ({len(wrong)} such images in all); {_WAY_OUT} skip"
        )


def check_once(key: str, images: ImageSet) -> None:
    """Refuse the same pixels twice in one set; arguments and errors as of `check_labels`."""
    later = np.flatnonzero(images.firsts != np.arange(len(images)))
    if len(later):
        names = images.names
        raise UserError(
            f"{key}: {names[later[0]]} has the same pixels as {names[images.firsts[later[0]]]} "
            f"({len(later)} such images in all); {_WAY_OUT} allow"
        )


def check_duplicates(trained: Mapping[str, ImageSet], tested: Mapping[str, ImageSet]) -> None:
    """Refuse the same pixels in two sets, unless both are tested on.

    Args:
        trained: by key in params.yaml.
        tested: by key in params.yaml.

    Raises:
        UserError: two images of different sets are identical.
    """
    owners: dict[str, tuple[str, str]] = {}
    pairs: list[tuple[str, str, str, str]] = []
    for key, images in (trained | tested).items():
        for name, pixels in zip(images.names, images.hashes, strict=True):
            owner, other = (owners.setdefault if key in trained else owners.get)(
                pixels, (key, name)
            )
            if owner != key:
                pairs.append((owner, other, key, name))
    if pairs:
        owner, other, key, name = pairs[0]
        raise UserError(
            f"{key}: {name} has the same pixels as {other} of {owner} ({len(pairs)} such images in all); "
            f"{_WAY_OUT} {'allow' if key in trained else 'skip'}"
        )


def without(key: str, images: ImageSet, others: Mapping[str, ImageSet]) -> ImageSet:
    """Leave out the images whose pixels are in another set.

    Args:
        key: of the set in params.yaml, for messages.
        images: the set.
        others: the other sets, by the names under which ``skipped`` tells of them.

    Raises:
        UserError: none would be left.
    """
    owners: dict[str, str] = {}
    for owner, other in others.items():
        for name, pixels in zip(other.names, other.hashes, strict=True):
            owners.setdefault(pixels, f"{name} of {owner}")
    return _leave_out(
        key,
        images,
        {
            index: f"has the same pixels as {owners[pixels]}"
            for index, pixels in enumerate(images.hashes)
            if pixels in owners
        },
    )


def _contradicting(images: ImageSet) -> np.ndarray:
    """Find the images whose pixels came before under another label."""
    return np.flatnonzero(images.labels != images.labels[images.firsts])


def _one_label(key: str, images: ImageSet) -> ImageSet:
    """Leave out all images of which there is a copy with another label."""
    wrong = np.isin(images.firsts, images.firsts[_contradicting(images)])
    return _leave_out(
        key,
        images,
        dict.fromkeys(np.flatnonzero(wrong).tolist(), "there are copies of it under two labels"),
    )


def _once(key: str, images: ImageSet) -> ImageSet:
    """Leave out the images whose pixels came before."""
    names = images.names
    return _leave_out(
        key,
        images,
        {
            index: f"has the same pixels as {names[first]}"
            for index, first in enumerate(images.firsts.tolist())
            if first != index
        },
    )


def _leave_out(key: str, images: ImageSet, reasons: Mapping[int, str]) -> ImageSet:
    if not reasons:
        return images
    kept = np.delete(np.arange(len(images)), list(reasons))
    names = images.names
    told = tuple(f"{names[index]}: {reason}" for index, reason in reasons.items())
    if not kept.size:
        raise UserError(
            f"{key}: expected images that are nowhere else, found only copies, the first is {told[0]}; add others"
        )
    return replace(images.take(kept), skipped=images.skipped + told)
