"""Several processes: order, failures, and no orphans."""

import faulthandler
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from tttlab.errors import UserError
from tttlab.runtime.parallel import as_ready, in_order
from tttlab.runtime.resuming import Work


def square(number: int) -> tuple[int, int]:
    if number < 0:
        raise ValueError("negative")
    time.sleep(0.02 * (5 - number))  # later items finish first
    return number * number, os.getpid()


@pytest.mark.parametrize("workers", [0, 1, 2, 8])
def test_results_come_in_order(workers):
    results = list(in_order(square, range(5), workers))
    assert [value for value, _ in results] == [0, 1, 4, 9, 16]
    assert (os.getpid() in {process for _, process in results}) == (workers < 2)


def test_a_workers_mistake_is_raised_here():
    with pytest.raises(ValueError, match="negative"):
        list(in_order(square, [1, -1, 2], 2))


def wait_or_fail(seconds: float) -> float:
    time.sleep(abs(seconds))
    if seconds < 0:
        raise ValueError("negative")
    return seconds


@pytest.mark.parametrize(("workers", "order"), [(1, [0.6, 0.0, 0.1]), (2, [0.0, 0.1, 0.6])])
def test_results_come_as_they_are_ready(workers, order):
    assert list(as_ready(wait_or_fail, [0.6, 0.0, 0.1], workers)) == [
        (each, each) for each in order
    ]


def test_what_is_ready_comes_before_the_error_of_another():
    pairs = as_ready(wait_or_fail, [-0.6, 0.0, 0.1, 60.0], 2)
    assert [next(pairs), next(pairs)] == [(0.0, 0.0), (0.1, 0.1)]
    with pytest.raises(ValueError, match="negative"):
        next(pairs)


ORPHANS = """
import sys, time
from tttlab.runtime.parallel import in_order
def work(item):
    time.sleep(60)
print("ready", flush=True)
list(in_order(work, range(4), 2))
"""


def test_workers_end_with_a_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 20
    while len(workers := psutil.Process(parent.pid).children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # long enough for both to watch their parent
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert len(workers) == 2
    assert not alive


def handler(_item: int) -> str:
    return str(signal.getsignal(signal.SIGTERM))


def test_a_worker_can_be_ended_whatever_its_parent_does_with_the_signal():
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        assert set(in_order(handler, range(4), 2)) == {str(signal.SIG_DFL)}
    finally:
        signal.signal(signal.SIGTERM, before)


def test_items_and_what_is_done_with_them_are_inherited_and_need_no_pickling():
    items = [lambda number=number: number + 1 for number in range(3)]
    assert list(in_order(lambda item: item(), items, 2)) == [1, 2, 3]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "cause"),
    [
        (
            "SIGKILL",
            r"memory probably ran out; lower machine\.workers or machine\.images_per_step",
        ),
        (
            "SIGSEGV",
            r"a library probably crashed; machine\.workers: 1 works without such processes",
        ),
        ("SIGTERM", "something else stopped it"),
    ],
)
def test_a_worker_that_the_system_ends_is_told_with_its_work_and_what_is_done_is_kept(
    tmp_path, name, cause
):
    """The third of five items ends its worker; the fourth waits in the other worker until then."""
    work = Work(tmp_path)

    def compute(item: int) -> int:
        if item == 2 and not work.has("killed"):
            work.save("killed", {})
            while not work.has("waiting"):
                time.sleep(0.01)
            faulthandler.disable()  # pytest's, which would write to the terminal
            os.kill(os.getpid(), signal.Signals[name])
        if item == 3 and not work.has("restarted"):
            work.save("waiting", {})
            time.sleep(50)
        work.save(f"shift-{item}", {"value": torch.tensor(item)})
        return item

    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        list(in_order(compute, range(5), 2, name=lambda item: f"shift-{item}"))
    assert time.monotonic() - started < 20
    assert caught.match(
        rf"^a worker process was ended by {name}, "
        rf"at work on (shift-\d; )*shift-2\b[^:]*: {cause}; what is done"
    )
    # The executor ends the other worker by SIGTERM, too: then either may be the first.
    assert ("shift-3" in str(caught.value)) == (name == "SIGTERM")
    assert "\n" not in str(caught.value)
    assert [item for item in range(5) if work.has(f"shift-{item}")] == [0, 1]
    work.save("restarted", {})
    missing = [item for item in range(5) if not work.has(f"shift-{item}")]
    assert list(in_order(compute, missing, 2)) == [2, 3, 4]


def nap(item: int) -> int:
    time.sleep(60 if item else 0)
    return os.getpid()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, None])
def test_nobody_waits_for_workers_whose_results_are_not_wanted(error):
    """Ctrl-C and SIGTERM are exceptions in the parent; a consumer may also just stop."""
    results = in_order(nap, range(4), 2)
    first = psutil.Process(next(results))
    siblings = [child for child in psutil.Process().children() if child != first]
    if error is None:
        results.close()
    else:
        with pytest.raises(error):
            results.throw(error)
    assert siblings
    assert not any(process.is_running() for process in [first, *siblings])
