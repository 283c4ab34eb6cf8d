"""Auxiliary tasks: every transform by hand, and back."""

import numpy as np
import pytest

from tests.arc.tiny import grid
from tttlab.arc.auxiliary import SYMMETRIES, Auxiliary, draw_auxiliaries, turned

ASKED = grid("123", "456")
BY_HAND = {
    "none": ASKED,
    "turn90": grid("36", "25", "14"),
    "turn180": grid("654", "321"),
    "turn270": grid("41", "52", "63"),
    "flip_rows": grid("456", "123"),
    "flip_columns": grid("321", "654"),
    "transpose": grid("14", "25", "36"),
    "antitranspose": grid("63", "52", "41"),
}


def test_every_symmetry_has_its_values():
    assert list(BY_HAND) == list(SYMMETRIES)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_symmetries_by_hand(symmetry):
    np.testing.assert_array_equal(turned(ASKED, symmetry), BY_HAND[symmetry])


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_every_auxiliary_task_is_undone(symmetry):
    generator = np.random.default_rng(3)
    colours = tuple(generator.permutation(10).tolist())
    cells = generator.integers(0, 10, (3, 5)).astype(np.int8)
    auxiliary = Auxiliary(symmetry, colours)
    np.testing.assert_array_equal(auxiliary.invert(auxiliary.apply(cells)), cells)


def test_colours_are_replaced_by_the_map():
    swapped = Auxiliary(colours=(0, 2, 1, 3, 4, 5, 6, 7, 8, 9))
    np.testing.assert_array_equal(swapped.apply(grid("0123")), grid("0213"))


def test_the_task_itself_comes_first_and_black_stays_black():
    drawn = draw_auxiliaries(np.random.default_rng(0), ("turn90", "transpose"), 3)
    assert len(drawn) == 1 + 2 * 3
    assert drawn[0] == Auxiliary()
    assert all(auxiliary.colours[0] == 0 for auxiliary in drawn)
    assert all(sorted(auxiliary.colours) == list(range(10)) for auxiliary in drawn)
    assert [auxiliary.symmetry for auxiliary in drawn[1:]] == ["turn90"] * 3 + ["transpose"] * 3


def test_the_published_set_has_51():
    published = ("turn90", "turn180", "turn270", "flip_rows", "flip_columns")
    assert len(draw_auxiliaries(np.random.default_rng(0), published, 10)) == 51
