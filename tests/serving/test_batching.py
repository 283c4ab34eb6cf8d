"""Requests that arrive together: who is worked on with whom, and who gets which error."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tttlab.serving.batching import Batcher, Full


class Work:
    """Doubles numbers; notes the groups, and waits until it may."""

    def __init__(self):
        self.groups, self.may, self.begun = [], threading.Event(), threading.Semaphore(0)

    def __call__(self, kind, items):
        self.groups.append((kind, list(items)))
        self.begun.release()
        assert self.may.wait(10)
        if "bad" in items:
            raise ValueError("bad")
        if "end" in items:
            raise SystemExit("end")
        return [(kind, 2 * item) for item in items]


@pytest.fixture
def gathered():
    """Ask for things while the first request is worked on: → (batcher, work, ask, threads)."""
    work = Work()
    batcher = Batcher(work, largest=4, waiting=12)
    with ThreadPoolExecutor(32) as threads:

        def ask(kind, *items, seconds=10):
            before = batcher.waiting
            future = threads.submit(batcher.ask, kind, items, seconds)
            while batcher.waiting == before and not future.done():
                time.sleep(0.001)
            return future

        yield batcher, work, ask
        work.may.set()


def test_what_waits_is_worked_on_together_by_kind_and_the_oldest_comes_first(gathered):
    batcher, work, ask = gathered
    asked = {(0,): ask("a", 0)}
    assert work.begun.acquire(timeout=10)  # alone: it waits for nobody
    for kind, items in (("b", (1,)), ("a", (2, 3)), ("b", (4,)), ("a", (5, 6, 7)), ("a", (8,))):
        asked[items] = ask(kind, *items)
    assert batcher.waiting == 9
    work.may.set()
    for items, future in asked.items():
        kind = "b" if items in ((1,), (4,)) else "a"
        assert future.result(10) == [(kind, 2 * item) for item in items]
    groups = [("a", [0]), ("b", [1, 4]), ("a", [2, 3, 8]), ("a", [5, 6, 7])]
    assert work.groups == groups
    assert settled(batcher)


def settled(batcher):
    """The thread hands results out before it counts down."""
    deadline = time.monotonic() + 10
    while batcher.waiting and time.monotonic() < deadline:
        time.sleep(0.001)
    return batcher.waiting == 0


def test_a_request_larger_than_a_group_is_worked_on_alone(gathered):
    _, work, ask = gathered
    work.may.set()
    assert ask("a", *range(9)).result(10) == [("a", 2 * item) for item in range(9)]
    assert work.groups == [("a", list(range(9)))]


@pytest.mark.parametrize(("item", "error"), [("bad", ValueError), ("end", SystemExit)])
def test_an_error_reaches_only_who_causes_it(gathered, item, error):
    batcher, work, ask = gathered
    first = ask("a", 0)
    assert work.begun.acquire(timeout=10)
    before, wrong, after = ask("a", 1), ask("a", item), ask("a", 2)
    work.may.set()
    assert [future.result(10) for future in (first, before, after)] == [
        [("a", 0)],
        [("a", 2)],
        [("a", 4)],
    ]
    with pytest.raises(error, match=item):
        wrong.result(10)
    assert work.groups == [("a", [0]), ("a", [1, item, 2]), ("a", [1]), ("a", [item]), ("a", [2])]
    assert ask("a", 3).result(10) == [("a", 6)]
    assert settled(batcher)


def test_too_much_is_refused_at_once_and_what_waits_stays(gathered):
    batcher, work, ask = gathered
    first = ask("a", *range(4))
    assert work.begun.acquire(timeout=10)
    second = ask("a", *range(8))
    with pytest.raises(Full):
        batcher.ask("a", [1], 10)
    work.may.set()
    assert len(first.result(10)) + len(second.result(10)) == 12
    assert settled(batcher)
    assert ask("a", *range(20)).result(10)  # nothing waits: it may be larger than the limit


def test_a_request_whose_time_is_over_is_left_out(gathered):
    batcher, work, ask = gathered
    first = ask("a", 0)
    assert work.begun.acquire(timeout=10)
    late, other = ask("a", 1, seconds=0.05), ask("a", 2)
    with pytest.raises(TimeoutError):
        late.result(10)
    assert batcher.waiting == 2
    work.may.set()
    assert (first.result(10), other.result(10)) == ([("a", 0)], [("a", 4)])
    assert work.groups == [("a", [0]), ("a", [2])]
    assert settled(batcher)


def test_a_request_that_was_begun_is_late_without_harm(gathered):
    batcher, work, ask = gathered
    late = ask("a", 0, seconds=0.05)
    with pytest.raises(TimeoutError):
        late.result(10)
    work.may.set()
    assert ask("a", 1).result(10) == [("a", 2)]
    assert settled(batcher)


def test_results_of_another_number_are_an_error_and_no_mix_up():
    batcher = Batcher(lambda kind, items: items[:-1], largest=4, waiting=12)
    with pytest.raises(RuntimeError, match="2 items gave 1 results"):
        batcher.ask("a", [1, 2], 10)


def test_a_thousand_requests_from_32_threads_get_their_own_results():
    batcher = Batcher(lambda kind, items: [(kind, item) for item in items], 16, 10_000)
    with ThreadPoolExecutor(32) as threads:
        asked = [(number % 3, [number, -number][: 1 + number % 2]) for number in range(1000)]
        found = list(threads.map(lambda one: batcher.ask(*one, 30), asked))
    assert found == [[(kind, item) for item in items] for kind, items in asked]
    assert settled(batcher)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are never forked here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_answers_though_its_parent_had_answered_before():
    batcher = Batcher(lambda kind, items: [2 * item for item in items], 4, 12)
    assert batcher.ask("a", [1], 10) == [2]
    assert settled(batcher)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, str(batcher.ask("a", [4], 10)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == b"[8]"
