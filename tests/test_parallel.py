"""Several processes: order, failures, and no orphans."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tttlab.parallel import in_order


def square(number: int) -> tuple[int, int]:
    if number < 0:
        raise ValueError("negative")
    time.sleep(0.02 * (5 - number))  # later items finish first
    return number * number, os.getpid()


@pytest.mark.parametrize("workers", [0, 1, 2, 8])
def test_results_come_in_order(workers):
    found = list(in_order(square, range(5), workers))
    assert [value for value, _ in found] == [0, 1, 4, 9, 16]
    assert (os.getpid() in {process for _, process in found}) == (workers < 2)


def test_a_workers_mistake_is_raised_here():
    with pytest.raises(ValueError, match="negative"):
        list(in_order(square, [1, -1, 2], 2))


ORPHANS = """
import sys, time
from tttlab.parallel import in_order
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
    time.sleep(0.5)  # long enough for both to have started their watch
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
