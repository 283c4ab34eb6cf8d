import numpy as np
import pandas as pd
import pytest

from tttlab.arc.auxiliary import SYMMETRIES, Auxiliary, draw_auxiliaries
from tttlab.arc.results import read_votes
from tttlab.arc.tasks import EMPTY, padded
from tttlab.arc.votes import KEPT, GridKey, count_votes, vote_rows, write_votes

SWAPPED = (0, 2, 1, *range(3, 10))  # red for blue, blue for red
AUXILIARIES = (
    Auxiliary(),
    Auxiliary("turn90", SWAPPED),
    Auxiliary("flip_rows"),
)
L_SHAPE = [[1, 0], [1, 0], [1, 1]]
TURNED_AND_RED = [[0, 0, 2], [2, 2, 2]]  # the L, turned counter-clockwise, in the other colour
UPSIDE_DOWN = [[1, 1], [1, 0], [1, 0]]
NOTHING = np.zeros((0, 0), np.int8)


def views(grids):
    """Place grids ``[auxiliary][placement]`` in an array ``(A, placements, 4, 4)``."""
    return np.stack([padded([np.array(grid) for grid in row], 4) for row in grids])


def as_lists(counts):
    return [(key.grid.tolist(), votes) for key, votes in counts.items()]


class TestCounting:
    def test_what_the_views_say_of_one_grid_is_one_grid(self):
        said = views([[L_SHAPE, [[7]]], [TURNED_AND_RED, TURNED_AND_RED], [UPSIDE_DOWN, L_SHAPE]])
        single, counts = count_votes(said, AUXILIARIES)
        assert single.grid.tolist() == L_SHAPE
        assert as_lists(counts) == [(L_SHAPE, 4), ([[7]], 1), (UPSIDE_DOWN, 1)]

    def test_the_first_to_appear_wins_a_tie(self):
        said = views([[[[5]], [[6]]], [[[7]], [[6]]], [[[7]], [[8]]]])
        assert as_lists(count_votes(said, AUXILIARIES)[1]) == [
            ([[6]], 2),
            ([[7]], 2),
            ([[5]], 1),
            ([[8]], 1),
        ]

    def test_equal_cells_in_another_shape_are_another_grid(self):
        said = views([[[[3, 3]], [[3], [3]]]])
        assert as_lists(count_votes(said, AUXILIARIES[:1])[1]) == [([[3, 3]], 1), ([[3], [3]], 1)]

    def test_empty_grids_do_not_vote(self):
        said = views([[NOTHING, [[3]]], [NOTHING, NOTHING], [NOTHING, [[3]]]])
        single, counts = count_votes(said, AUXILIARIES)
        assert (single.height, single.width) == (0, 0)
        assert as_lists(counts) == [([[3]], 2)]

    def test_black_is_a_colour_and_not_outside(self):
        assert as_lists(count_votes(views([[[[0, 0]]]]), AUXILIARIES[:1])[1]) == [([[0, 0]], 1)]

    def test_as_many_votes_as_views_that_show_the_grid_transformed(self):
        """The slow path turns no view back: it looks for the grid's own picture in each view."""
        generator = np.random.default_rng(0)
        auxiliaries = draw_auxiliaries(generator, SYMMETRIES, 2)
        grids = [generator.integers(10, size=(2, 3)).astype(np.int8) for _ in range(3)]
        drawn = generator.integers(3, size=(len(auxiliaries), 2))
        said = np.stack(
            [
                padded([auxiliary.apply(grids[number]) for number in row], 5)
                for auxiliary, row in zip(auxiliaries, drawn, strict=True)
            ]
        )
        _, counts = count_votes(said, auxiliaries)
        expected = {
            GridKey.of(grid): sum(
                np.array_equal(said[a, p], padded([auxiliary.apply(grid)], 5)[0])
                for a, auxiliary in enumerate(auxiliaries)
                for p in range(2)
            )
            for grid in grids
        }
        assert counts == expected
        assert list(counts.values()) == sorted(expected.values(), reverse=True)


class TestRows:
    def test_a_row_of_the_single_view_then_one_per_grid(self):
        first = views([[[[7]], L_SHAPE], [TURNED_AND_RED, NOTHING], [UPSIDE_DOWN, [[7]]]])
        second = views([[NOTHING, NOTHING]] * 3)
        rows = vote_rows("0a1b", 16, np.stack([first, second]), AUXILIARIES)
        assert {row["task"] for row in rows} == {"0a1b"}
        assert {row["steps"] for row in rows} == {16}
        told = ("question", "place", "votes", "views", "height", "width")
        assert [tuple(row[name] for name in told) for row in rows] == [
            (0, 0, 2, 5, 1, 1),
            (0, 1, 3, 5, 3, 2),
            (0, 2, 2, 5, 1, 1),
            (1, 0, 0, 0, 0, 0),
        ]
        assert [row["cells"].tolist() for row in rows] == [[7], [1, 0, 1, 0, 1, 1], [7], []]

    def test_the_grids_with_fewest_votes_are_left_out_but_counted_as_views(self):
        grids = [[[number % 10, number // 10]] for number in range(KEPT + 3)]
        rows = vote_rows("t", 1, views([[*grids, grids[-1]]])[None], AUXILIARIES[:1])
        assert [row["place"] for row in rows] == list(range(KEPT + 1))
        assert rows[1]["cells"].tolist() == grids[-1][0]
        assert {row["views"] for row in rows} == {KEPT + 4}

    def test_the_file_gives_the_same_grids_back(self, tmp_path):
        said = views([[L_SHAPE, NOTHING]])
        write_votes(
            [
                *vote_rows("0934a4d8", 4, said[None], AUXILIARIES[:1]),
                *vote_rows("1e5", 4, np.full((1, 1, 1, 4, 4), EMPTY, np.int8), AUXILIARIES[:1]),
            ],
            tmp_path / "adapted" / "all" / "votes.parquet",
        )
        raw = pd.read_parquet(tmp_path / "adapted" / "all" / "votes.parquet")
        assert raw["cells"].map(list).tolist() == [[1, 0, 1, 0, 1, 1]] * 2 + [[]]
        table = read_votes(tmp_path, "all")
        assert table["task"].tolist() == ["0934a4d8"] * 2 + ["1e5"]
        assert table["key"].tolist() == [GridKey.of(np.array(L_SHAPE))] * 2 + [GridKey(0, 0, b"")]

    def test_as_many_auxiliary_tasks_as_there_are_views_of(self):
        with pytest.raises(ValueError, match="zip"):
            vote_rows("t", 1, views([[L_SHAPE]])[None], AUXILIARIES)
