"""The same picture twice: what is refused, what is left out, and that copies never lie on both sides of a split."""

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
    """Make a set of numbered pictures; without labels they are unknown."""
    labels = np.full(len(pictures), -1) if labels is None else np.array(labels)
    names = tuple(f"{prefix}{place}" for place in range(len(pictures)))
    return ImageSet(PIXELS[list(pictures)], labels, names, CLASSES if (labels >= 0).all() else ())


def pictures(images):
    """Tell which pictures a set holds."""
    known = [pixel_hash(pixels) for pixels in PIXELS]
    return [known.index(pixels) for pixels in images.hashes]


def settled(
    policy,
    unlabeled=(50,),
    labeled=((0, 0), (1, 0), (2, 1), (3, 1)),
    test=((60, 0), (61, 1)),
    shifted=(),
):
    """Settle sets, given by the numbers of their pictures and, but for the first, their labels."""
    named = [
        images(*zip(*pairs, strict=True), prefix=key)
        for key, pairs in (("l", labeled), ("t", test))
    ]
    trained = {"data.unlabeled": images(unlabeled, prefix="u"), "data.labeled": named[0]}
    tested = {"data.test": named[1]}
    if shifted:
        tested["shifts.sets.s"] = images(*zip(*shifted, strict=True), prefix="s")
    trained, tested = settle(trained, tested, ["data.test"], policy)
    return {key.rpartition(".")[2]: value for key, value in (trained | tested).items()}


POLICIES = ("error", "allow", "skip")


@pytest.mark.parametrize("policy", POLICIES)
def test_sets_without_copies_stay_as_they_are(policy):
    found = settled(policy, shifted=((70, 0),))
    assert {key: pictures(value) for key, value in found.items()} == {
        "unlabeled": [50],
        "labeled": [0, 1, 2, 3],
        "test": [60, 61],
        "s": [70],
    }
    assert all(value.skipped == () for value in found.values())


@pytest.mark.parametrize("policy", ["error", "allow"])
def test_a_picture_of_two_classes_is_always_an_error(policy):
    told = r"^data\.labeled: l2 of class 'bee' has the same pixels as l1 of class 'ape' \(1 such "
    with pytest.raises(
        UserError,
        match=told + r"images in all\); remove one of each or set data\.duplicates: skip$",
    ):
        settled(policy, labeled=((0, 0), (1, 0), (1, 1), (3, 1)))
    with pytest.raises(
        UserError,
        match=r"^data\.test: t2 of class 'bee' has the same pixels as t0 of class 'ape' \(2 such ",
    ):
        settled(policy, test=((60, 0), (61, 1), (60, 1), (60, 1)))


def test_a_picture_twice_in_one_class_is_an_error_unless_allowed():
    twice = ((0, 0), (1, 0), (0, 0), (2, 1), (3, 1))
    told = r"^data\.labeled: l2 has the same pixels as l0 \(1 such images in all\); remove one of each or set "
    with pytest.raises(UserError, match=told + r"data\.duplicates: allow$"):
        settled("error", labeled=twice)
    assert pictures(settled("allow", labeled=twice)["labeled"]) == [0, 1, 0, 2, 3]


@pytest.mark.parametrize("policy", POLICIES)
def test_test_images_may_be_there_twice_with_one_label_or_corrupted_beyond_recognition(policy):
    found = settled(policy, test=((60, 0), (61, 1), (60, 0)), shifted=((70, 0), (70, 1), (60, 0)))
    assert pictures(found["test"]) == [60, 61, 60]
    assert pictures(found["s"]) == [70, 70, 60]


def test_what_pretraining_and_training_share_is_an_error_unless_allowed():
    with pytest.raises(
        UserError,
        match=r"^data\.labeled: l1 has the same pixels as u0 of data\.unlabeled .*duplicates: allow$",
    ):
        settled("error", unlabeled=(1, 50))
    assert pictures(settled("allow", unlabeled=(1, 50))["unlabeled"]) == [1, 50]


@pytest.mark.parametrize("policy", ["error", "allow"])
@pytest.mark.parametrize("where", ["unlabeled", "labeled"])
@pytest.mark.parametrize("tested", ["test", "shifted"])
def test_what_is_tested_on_is_never_trained_on(policy, where, tested):
    sets = (
        {"unlabeled": (50, 9)}
        if where == "unlabeled"
        else {"labeled": ((0, 0), (9, 0), (2, 1), (3, 1))}
    )
    key, name = ("data.test", "t1") if tested == "test" else ("shifts.sets.s", "s1")
    told = rf"^{key}: {name} has the same pixels as {where[0]}1 of data\.{where} \(1 such .* set data\.duplicates: skip$"
    with pytest.raises(UserError, match=told):
        settled(policy, **sets, **{tested: ((60, 0), (9, 0))})


def test_skip_leaves_out_what_is_trained_on_before_what_is_tested_on_and_says_so():
    found = settled(
        "skip",
        unlabeled=(50, 1, 60, 51, 70, 5),
        labeled=(
            (0, 0),
            (1, 0),
            (2, 1),
            (0, 0),
            (61, 1),
            (3, 1),
            (4, 0),
            (4, 1),
            (5, 0),
            (5, 1),
            (5, 1),
        ),
        test=((60, 0), (61, 1), (62, 0), (62, 1)),
        shifted=((70, 0),),
    )
    assert pictures(found["test"]) == [60, 61]  # nobody knows what 62 is, nor 4 and 5
    assert pictures(found["labeled"]) == [0, 1, 2, 3]
    assert pictures(found["unlabeled"]) == [50, 51, 5]
    assert pictures(found["s"]) == [70]
    assert found["labeled"].labels.tolist() == [0, 0, 1, 1]
    assert found["unlabeled"].skipped == (
        "u1: has the same pixels as l1 of data.labeled",
        "u2: has the same pixels as t0 of data.test",
        "u4: has the same pixels as s0 of shifts.sets.s",
    )
    assert found["labeled"].skipped == (
        *(f"l{number}: there are copies of it under two labels" for number in (6, 7, 8, 9, 10)),
        "l3: has the same pixels as l0",
        "l4: has the same pixels as t1 of data.test",
    )
    assert [line.partition(":")[0] for line in found["test"].skipped] == ["t2", "t3"]


def test_a_set_of_nothing_but_copies_is_refused():
    with pytest.raises(
        UserError,
        match=r"^data\.unlabeled: expected images that are nowhere else, found only copies, .* is u0: ",
    ):
        settled("skip", unlabeled=(60, 1))
    with pytest.raises(
        UserError, match=r"u0: has the same pixels as v1 of labeled_validation; add others$"
    ):
        without(
            "data.unlabeled",
            images((7,), prefix="u"),
            {"labeled_validation": images((6, 7), prefix="v")},
        )


# --- validation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_a_picture_stay_on_one_side_of_the_split(seed):
    """Ten apes of which each is there four times, as when a rare class has been filled up, and 40 bees."""
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
    plain, filled = (
        images(*zip(*chosen, strict=True)) for chosen in (pairs, [*pairs, (7, 1), (8, 0), (8, 0)])
    )
    one, other = (split_validation(each, 0.25, 3)[1] for each in (plain, filled))
    assert set(pictures(one)) == set(pictures(other))


def test_a_class_of_one_picture_in_many_copies_cannot_be_split():
    with pytest.raises(
        UserError,
        match=r"at least two different images of every class .*, found 1 of class 'ape'; widen",
    ):
        split_validation(images([0, 0, 0, 1, 2], [0, 0, 0, 1, 1]), 0.5, 0)
