"""The same function on many items in several processes, in order; small operations gain nothing from several threads."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

_job: Callable[[Any], Any] | None = None  # in a worker: what it does


def in_order(job: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    """Yield ``job(item)`` for every item, in order.

    Args:
        job: what to do; its results must be picklable.
        items: what to do it with.
        workers: processes; fewer than two, or a system without fork (each process would import torch anew): this one alone.
    """
    if workers < 2 or len(items) < 2 or sys.platform != "linux":
        yield from map(job, items)
        return
    with multiprocessing.get_context("fork").Pool(min(workers, len(items)), _start, (job,)) as pool:
        yield from pool.imap(_call, items)


def _start(job: Callable[[Any], Any]) -> None:
    """Prepare a worker: one thread, and no life after its parent's, however that ends."""
    global _job
    _job = job
    # The pool ends its workers by this signal. What the parent does with it (an exception that closes its run in MLflow) was
    # inherited, and raised in the wrong moment leaves a worker that never ends.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends these
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(item: Any) -> Any:
    return _job(item)
