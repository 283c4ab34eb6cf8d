"""Streams: every image of every shift arrives once, in the order of the settings."""

from collections import Counter

import numpy as np
import pytest

from tttlab.errors import UserError
from tttlab.shifts.shift import Shift, list_shifts
from tttlab.shifts.streams import Stream, Visit

SHIFTS = [*list_shifts(("fog", "snow"), (1, 3, 5)), Shift("photos/night")]
LABELS = np.arange(11) % 3


def visits_of(route):
    return [("+".join(shift.name for shift in visit.shifts), visit.half) for visit in route]


class TestOrder:
    LABELS = np.repeat(np.arange(5), 40)

    def test_shuffled_is_a_permutation_of_seed_and_name(self):
        order = Stream().arrange(self.LABELS, 0, "fog-5-0")
        assert sorted(order) == list(range(200))
        of_other_labels = Stream().arrange(self.LABELS[::-1], 0, "fog-5-0")
        assert np.array_equal(order, of_other_labels)
        for seed, name in ((1, "fog-5-0"), (0, "fog-4-0")):
            assert not np.array_equal(order, Stream().arrange(self.LABELS, seed, name))

    def test_classes_come_one_after_another_each_shuffled(self):
        order = Stream(order="by_class").arrange(self.LABELS, 0, "fog-5-0")
        assert sorted(order) == list(range(200))
        assert np.count_nonzero(np.diff(self.LABELS[order])) == 4
        assert not np.array_equal(order, np.arange(200))

    def test_by_class_needs_labels(self):
        with pytest.raises(UserError, match="needs the labels of all images"):
            Stream(order="by_class").arrange(np.array([0, -1]), 0, "x")


class TestRoutes:
    def test_separate_streams_are_one_per_shift(self):
        assert [visits_of(route) for route in Stream().routes(SHIFTS)] == [
            [(shift.name, None)] for shift in SHIFTS
        ]

    def test_continual_streams_lead_through_all_of_one_severity(self):
        first, *routes = map(visits_of, Stream(shifts="continual").routes(SHIFTS))
        assert first == [("clean", None)]
        assert routes == [
            [("photos/night", None)],
            *([(f"fog-{severity}", None), (f"snow-{severity}", None)] for severity in (1, 3, 5)),
        ]

    def test_a_gradual_stream_swells_and_ebbs(self):
        clean, swelling, natural = map(visits_of, Stream(shifts="gradual").routes(SHIFTS))
        assert clean == [("clean", None)]
        assert natural == [("photos/night", None)]
        assert swelling == [
            (f"{name}-{severity}", half)
            for name in ("fog", "snow")
            for severity, half in ((1, 0), (3, 0), (5, None), (3, 1), (1, 1))
        ]

    def test_mixed_streams_visit_all_of_one_severity_at_once(self):
        routes = Stream(shifts="mixed").routes(SHIFTS)
        assert list(map(visits_of, routes)) == [
            [(name, None)]
            for name in ("clean", "photos/night", "fog-1+snow-1", "fog-3+snow-3", "fog-5+snow-5")
        ]

    @pytest.mark.parametrize("order", ["shuffled", "by_class"])
    @pytest.mark.parametrize("shifts", ["separate", "continual", "gradual", "mixed"])
    @pytest.mark.parametrize("count", [1, 11])
    def test_every_image_of_every_shift_arrives_once(self, shifts, order, count):
        stream, seen = Stream(4, order, shifts), Counter()
        for route in stream.routes(SHIFTS):
            for visit in route:
                for batch in stream.batches(visit, [LABELS[:count]] * len(visit.shifts), seed=0):
                    assert 1 <= len(batch) <= 4
                    seen.update((visit.shifts[number].name, int(index)) for number, index in batch)
        expected = {(shift.name, index): 1 for shift in SHIFTS for index in range(count)}
        assert seen == Counter(expected)


def test_an_order_is_the_same_in_a_separate_and_in_a_continual_stream():
    alone = Stream(4).batches(Visit((Shift("fog", 5),)), [LABELS], seed=3)
    assert np.array_equal(np.concatenate(alone)[:, 1], Stream(4).arrange(LABELS, 3, "fog-5-0"))
    assert not np.array_equal(np.concatenate(alone)[:, 1], np.arange(11))


def test_a_mixed_stream_mixes_shifts_within_batches_and_can_still_come_by_class():
    visit = Visit(tuple(Shift(name, 5) for name in ("fog", "snow")))
    shuffled = Stream(4, shifts="mixed").batches(visit, [LABELS, LABELS], seed=0)
    assert sum(len(set(batch[:, 0])) == 2 for batch in shuffled) >= 4  # of 6
    batches = Stream(4, "by_class", "mixed").batches(visit, [LABELS, LABELS], seed=0)
    shifts, indices = np.concatenate(batches).T
    assert (np.diff(LABELS[indices]) >= 0).all()
    assert np.count_nonzero(np.diff(shifts)) > 5  # the shifts are mixed within each class


def test_halves_are_random_and_by_class_each():
    visits = [Visit((Shift("fog", 1),), half) for half in (0, 1)]
    halves = [
        np.concatenate(Stream(4, "by_class").batches(visit, [LABELS], seed=0))[:, 1]
        for visit in visits
    ]
    assert all((np.diff(LABELS[half]) >= 0).all() for half in halves)
    assert not set(halves[0]) & set(halves[1])
    # All classes are in both: not the first ones on the way up and the last on the way down.
    assert all(len(set(LABELS[half])) == 3 for half in halves)
