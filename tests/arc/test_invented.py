"""Invented tasks of all rules: their number, sizes and seeds."""

import numpy as np
import pytest

from tests.arc.inventions import LARGEST, PAIRS, invented_by_rule
from tttlab.arc.invented.inventing import RULES, invent, invent_one


@pytest.fixture(scope="module")
def invented():
    """Several tasks of every rule, by its name."""
    return invented_by_rule()


class TestAllOfThem:
    def test_every_task_has_as_many_different_pairs_as_asked_for(self, invented):
        for tasks in invented.values():
            for task in tasks:
                inputs = {(pair.input.shape, pair.input.tobytes()) for pair in task.demonstrations}
                assert len(inputs) == len(task.demonstrations) == PAIRS
                assert not task.questions

    def test_grids_are_as_small_as_asked_for_in_ten_colours(self, invented):
        for tasks in invented.values():
            for pair in (pair for task in tasks for pair in task.demonstrations):
                assert min(*pair.input.shape, *pair.output.shape) >= 1
                assert pair.longest_side <= LARGEST
                assert {pair.input.dtype, pair.output.dtype} == {np.dtype(np.int8)}
                assert min(pair.input.min(), pair.output.min()) >= 0
                assert max(pair.input.max(), pair.output.max()) < 10

    def test_no_pair_is_its_own_answer(self, invented):
        for tasks in invented.values():
            for pair in (pair for task in tasks for pair in task.demonstrations):
                assert not np.array_equal(pair.input, pair.output)

    def test_two_tasks_of_a_rule_differ_and_a_seed_repeats_them(self):
        (first, again, other) = (invent_one(0, 3, LARGEST, seed) for seed in (0, 0, 1))
        inputs = [[pair.input.tolist() for pair in task.demonstrations] for task in (first, again)]
        assert inputs[0] == inputs[1]
        assert inputs[0] != [pair.input.tolist() for pair in other.demonstrations]
        assert first.name == again.name == "invented-recolour-0"

    def test_a_task_is_the_same_however_many_others_there_are(self):
        few, many = invent(3, 2, LARGEST, 0), invent(5, 2, LARGEST, 0)
        for one, same in zip(few, many, strict=False):
            assert one.name == same.name
            assert all(
                np.array_equal(*grids)
                for pairs in zip(one.demonstrations, same.demonstrations, strict=True)
                for grids in zip(*pairs, strict=True)
            )

    @pytest.mark.parametrize("largest", [6, 30])
    def test_other_sizes(self, largest):
        for number in range(len(RULES)):
            task = invent_one(number, 3, largest, 0)
            assert task.longest_side <= largest
