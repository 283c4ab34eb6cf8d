"""The same function on many items in several processes, in order; small operations gain nothing from several threads."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tttlab.errors import UserError

# In a worker, inherited and so never pickled: what to do, with what, and a place where all see which item is whose.
_job: Callable[[Any], Any] | None = None
_items: Sequence[Any] = ()
_owners: MutableSequence[int] = []


def in_order(
    job: Callable[[Any], Any], items: Sequence[Any], workers: int, name: Callable[[Any], str] = str
) -> Iterator[Any]:
    """Yield ``job(item)`` for every item, in order.

    Args:
        job: what to do; its results must be picklable, and small: they wait for those before them.
        items: what to do it with.
        workers: processes; fewer than two, or a system without fork (each process would import torch anew): this one alone.
        name: what an item is called, for people.

    Raises:
        UserError: a worker was killed or crashed, which no job can do anything about.
    """
    if workers < 2 or len(items) < 2 or sys.platform != "linux":
        yield from map(job, items)
        return
    context, others = multiprocessing.get_context("fork"), set(multiprocessing.active_children())
    owners = context.RawArray(
        "q", len(items)
    )  # the number of the process that has the item in hand, else 0
    executor = ProcessPoolExecutor(min(workers, len(items)), context, _start, (job, items, owners))
    processes: set[BaseProcess] = set()
    try:
        futures = [executor.submit(_call, number) for number in range(len(items))]
        processes = set(multiprocessing.active_children()) - others
        for future in futures:
            yield future.result()
    except BrokenProcessPool as error:
        if (
            error.__cause__ is not None
        ):  # not a process that ended, but a result that cannot be read here
            raise
        executor.shutdown()  # from here on it is known how each of them ended
        raise UserError(_tell(processes, zip(map(name, items), owners, strict=True))) from error
    except BaseException:
        for process in processes:  # nobody wants their results any more
            process.terminate()
        raise
    finally:
        executor.shutdown()


def _tell(processes: Iterable[BaseProcess], owners: Iterable[tuple[str, int]]) -> str:
    """Say which process ended by what, and which items were in its hands.

    Args:
        processes: all workers, ended.
        owners: every item's name, and the number of the process that had it in hand, else 0.
    """
    # The executor ends those that are left by SIGTERM; if there are no others, somebody else did the same to one of them.
    ended = {
        process.pid: process.exitcode
        for process in processes
        if process.exitcode not in (0, -signal.SIGTERM)
    }
    codes = sorted(set(ended.values())) or [-signal.SIGTERM]
    how = " and ".join(
        signal.Signals(-code).name if code < 0 else f"exit code {code}" for code in codes
    )
    in_hand = [name for name, owner in owners if owner and (owner in ended or not ended)]
    advice = {
        -signal.SIGKILL: "memory probably ran out; lower machine.workers or machine.images_per_step",
        -signal.SIGTERM: "something else stopped it",
    }
    cause = advice.get(
        codes[0], "a library probably crashed; machine.workers: 1 works without such processes"
    )
    where = f"at work on {'; '.join(in_hand)}" if in_hand else "before its first piece of work"
    return f"a worker process was ended by {how}, {where}: {cause}; what is done is kept, and the same command goes on"


def _start(job: Callable[[Any], Any], items: Sequence[Any], owners: MutableSequence[int]) -> None:
    """Prepare a worker: one thread, and no life after its parent's, however that ends."""
    global _job, _items, _owners
    _job, _items, _owners = job, items, owners
    # Workers are ended by this signal. What the parent does with it (an exception that closes its run in MLflow) was
    # inherited, and raised in the wrong moment leaves a worker that never ends.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes; the parent ends these
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(
            "500"
        )  # a system short of memory takes a worker, and the parent tells
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(number: int) -> Any:
    _owners[number] = os.getpid()
    try:
        return _job(_items[number])
    finally:
        _owners[number] = 0
