"""The same picture twice: what is refused or left out; no split separates copies."""

import numpy as np
import pytest

from tttlab.data.copies import settle, without
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import pixel_hash
from tttlab.data.splits import split_validation
from tttlab.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (100, 4, 4, 3), dtype=np.uint8)
CLASSES = ("ape", "bee")


def images(pictures, labels=None, prefix="x"):
    """Make a set of numbered pictures; without ``labels`` they are unknown."""
    labels = np.full(len(pictures), -1) if labels is None else np.array(labels)
    names = tuple(f"{prefix}{index}" for index in range(len(pictures)))
    return ImageSet(PIXELS[list(pictures)], labels, names, CLASSES if (labels >= 0).all() else ())


def pictures(images):
    """Find the numbers of the pictures in a set."""
    hashes = [pixel_hash(pixels) for pixels in PIXELS]
    return [hashes.index(pixels) for pixels in images.hashes]


def settled(
    policy,
    unlabeled=(50,),
    labeled=((0, 0), (1, 0), (2, 1), (3, 1)),
    test=((60, 0), (61, 1)),
    shifted=(),
):
    """Settle sets, given by the numbers of their pictures and (except unlabeled) their labels."""
    trained = {
        "data.unlabeled": images(unlabeled, prefix="u"),
        "data.labeled": images(*zip(*labeled, strict=True), prefix="l"),
    }
    tested = {"data.test": images(*zip(*test, strict=True), prefix="t")}
    if shifted:
        tested["shifts.sets.s"] = images(*zip(*shifted, strict=True), prefix="s")
    trained, tested = settle(trained, tested, ["data.test"], policy)
    return {key.rpartition(".")[2]: value for key, value in (trained | tested).items()}


POLICIES = ("error", "allow", "skip")


@pytest.mark.parametrize("policy", POLICIES)
def test_sets_without_copies_stay_as_they_are(policy):
    sets = settled(policy, shifted=((70, 0),))
    assert {key: pictures(value) for key, value in sets.items()} == {
        "unlabeled": [50],
        "labeled": [0, 1, 2, 3],
        "test": [60, 61],
        "s": [70],
    }
    assert all(value.skipped == () for value in sets.values())


@pytest.mark.parametrize("policy", ["error", "allow"])
def test_a_picture_of_two_classes_is_always_an_error(policy):
    message = (
        r"^data\.labeled: l2 of class 'bee' has the same pixels as l1 of class 'ape' "
        r"\(1 such images in all\); remove one of each or set data\.duplicates: skip$"
    )
    with pytest.raises(UserError, match=message):
        settled(policy, labeled=((0, 0), (1, 0), (1, 1), (3, 1)))
    message = r"^data\.test: t2 of class 'bee' has the same pixels as t0 of class 'ape' \(2 such "
    with pytest.raises(UserError, match=message):
        settled(policy, test=((60, 0), (61, 1), (60, 1), (60, 1)))


def test_a_picture_twice_in_one_class_is_an_error_unless_allowed():
    twice = ((0, 0), (1, 0), (0, 0), (2, 1), (3, 1))
    message = (
        r"^data\.labeled: l2 has the same pixels as l0 \(1 such images in all\); "
        r"remove one of each or set data\.duplicates: allow$"
    )
    with pytest.raises(UserError, match=message):
        settled("error", labeled=twice)
    assert pictures(settled("allow", labeled=twice)["labeled"]) == [0, 1, 0, 2, 3]


@pytest.mark.parametrize("policy", POLICIES)
def test_test_images_may_be_there_twice_with_one_label_or_corrupted_beyond_recognition(policy):
    sets = settled(policy, test=((60, 0), (61, 1), (60, 0)), shifted=((70, 0), (70, 1), (60, 0)))
    assert pictures(sets["test"]) == [60, 61, 60]
    assert pictures(sets["s"]) == [70, 70, 60]


def test_what_pretraining_and_training_share_is_an_error_unless_allowed():
    message = (
        r"^data\.labeled: l1 has the same pixels as u0 of data\.unlabeled .*duplicates: allow$"
    )
    with pytest.raises(UserError, match=message):
        settled("error", unlabeled=(1, 50))
    assert pictures(settled("allow", unlabeled=(1, 50))["unlabeled"]) == [1, 50]


@pytest.mark.parametrize("policy", ["error", "allow"])
@pytest.mark.parametrize("where", ["unlabeled", "labeled"])
@pytest.mark.parametrize("tested", ["test", "shifted"])
def test_what_is_tested_on_is_never_trained_on(policy, where, tested):
    trained = {"unlabeled": (50, 9), "labeled": ((0, 0), (9, 0), (2, 1), (3, 1))}[where]
    key, name = ("data.test", "t1") if tested == "test" else ("shifts.sets.s", "s1")
    message = (
        rf"^{key}: {name} has the same pixels as {where[0]}1 of data\.{where} "
        r"\(1 such .* set data\.duplicates: skip$"
    )
    with pytest.raises(UserError, match=message):
        settled(policy, **{where: trained, tested: ((60, 0), (9, 0))})


def test_skip_leaves_out_what_is_trained_on_before_what_is_tested_on_and_says_so():
    first = ((0, 0), (1, 0), (2, 1), (0, 0), (61, 1), (3, 1))
    ambiguous = ((4, 0), (4, 1), (5, 0), (5, 1), (5, 1))
    sets = settled(
        "skip",
        unlabeled=(50, 1, 60, 51, 70, 5),
        labeled=first + ambiguous,
        test=((60, 0), (61, 1), (62, 0), (62, 1)),
        shifted=((70, 0),),
    )
    assert pictures(sets["test"]) == [60, 61]  # 62 has two labels, as 4 and 5 have
    assert pictures(sets["labeled"]) == [0, 1, 2, 3]
    assert pictures(sets["unlabeled"]) == [50, 51, 5]
    assert pictures(sets["s"]) == [70]
    assert sets["labeled"].labels.tolist() == [0, 0, 1, 1]
    assert sets["unlabeled"].skipped == (
        "u1: has the same pixels as l1 of data.labeled",
        "u2: has the same pixels as t0 of data.test",
        "u4: has the same pixels as s0 of shifts.sets.s",
    )
    assert sets["labeled"].skipped == (
        *(f"l{number}: there are copies of it under two labels" for number in (6, 7, 8, 9, 10)),
        "l3: has the same pixels as l0",
        "l4: has the same pixels as t1 of data.test",
    )
    assert [line.partition(":")[0] for line in sets["test"].skipped] == ["t2", "t3"]


def test_a_set_of_nothing_but_copies_is_refused():
    message = (
        r"^data\.unlabeled: expected images that are nowhere else, "
        "found only copies, .* is u0: "
    )
    with pytest.raises(UserError, match=message):
        settled("skip", unlabeled=(60, 1))
    others = {"labeled_validation": images((6, 7), prefix="v")}
    message = r"u0: has the same pixels as v1 of labeled_validation; add others$"
    with pytest.raises(UserError, match=message):
        without("data.unlabeled", images((7,), prefix="u"), others)


# --- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_a_picture_stay_on_one_side_of_the_split(seed):
    """Ten apes, each four times, as when a rare class has been filled up, and 40 bees."""
    labeled = images([*np.repeat(np.arange(10), 4), *range(20, 60)], [0] * 40 + [1] * 40)
    train, validation = split_validation(labeled, 0.2, seed)
    assert set(pictures(train)).isdisjoint(pictures(validation))
    assert len(train) + len(validation) == 80
    apes = [picture for picture in pictures(validation) if picture < 10]
    assert len(apes) == 8
    assert len(set(apes)) == 2  # a fifth of the pictures, with all their copies
    assert sum(picture >= 20 for picture in pictures(validation)) == 8


def test_copies_change_nothing_for_the_images_that_have_none():
    pairs = [(picture, picture % 2) for picture in range(40)]
    with_copies = [*pairs, (7, 1), (8, 0), (8, 0)]
    plain, filled = (
        split_validation(images(*zip(*rows, strict=True)), 0.25, 3)[1]
        for rows in (pairs, with_copies)
    )
    assert set(pictures(plain)) == set(pictures(filled))


def test_a_class_of_one_picture_in_many_copies_cannot_be_split():
    message = r"at least two different images of every class .*, found 1 of class 'ape'; widen"
    with pytest.raises(UserError, match=message):
        split_validation(images([0, 0, 0, 1, 2], [0, 0, 0, 1, 1]), 0.5, 0)
