"""The same function on many items in several processes.

Processes with one thread each, because small operations gain nothing from several threads.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from tttlab.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

# In a worker: the function, the items, and for every item the number of the process at work on it.
# Workers inherit them, so that they are never pickled.
_job: Callable[[Any], Any] | None = None
_items: Sequence[Any] = ()
_owners: MutableSequence[int] = []


def in_order(
    job: Callable[[Any], Any], items: Sequence[Any], workers: int, name: Callable[[Any], str] = str
) -> Iterator[Any]:
    """Yield ``job(item)`` for every item, in order; see `working`."""
    with working(job, items, workers, name) as results:
        yield from results


def as_ready(
    job: Callable[[T], R], items: Sequence[T], workers: int, name: Callable[[Any], str] = str
) -> Iterator[tuple[T, R]]:
    """Yield every item with ``job(item)`` as soon as it is known; see `working`.

    Where one fails, those that are known are yielded before its error is raised.
    """
    if _alone(items, workers):
        yield from ((item, job(item)) for item in items)
        return
    with _submitted(job, items, workers, name) as futures:
        item_of, running = dict(zip(futures, items, strict=True)), set(futures)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (
                (item_of[future], future.result()) for future in done if not future.exception()
            )
            for future in done:
                future.result()  # raises what went wrong


@contextmanager
def working(
    job: Callable[[Any], Any], items: Sequence[Any], workers: int, name: Callable[[Any], str] = str
) -> Iterator[Iterator[Any]]:
    """Compute ``job(item)`` for every item inside the context, whether or not anyone waits.

    Args:
        job: the function. Its results must be picklable, and small: each waits for earlier ones.
        items: its arguments.
        workers: number of processes. Fewer than two, or a system other than Linux: this process
            alone (without fork, each worker would import torch anew).
        name: gives an item's name for messages.

    Yields:
        the results, in order. Without workers each is computed when it is asked for.

    Raises:
        UserError: a worker was killed or crashed.
    """
    if _alone(items, workers):
        yield map(job, items)
        return
    with _submitted(job, items, workers, name) as futures:
        yield (future.result() for future in futures)


def _alone(items: Sequence[Any], workers: int) -> bool:
    return workers < 2 or len(items) < 2 or sys.platform != "linux"


@contextmanager
def _submitted(
    job: Callable[[Any], Any], items: Sequence[Any], workers: int, name: Callable[[Any], str]
) -> Iterator[list[Future]]:
    """Start workers on all items, and end them with the context; gives a future for every item."""
    context = multiprocessing.get_context("fork")
    earlier_children = set(multiprocessing.active_children())
    owners = context.RawArray("q", len(items))  # numbers of processes; 0: nobody is at work on it
    executor = ProcessPoolExecutor(min(workers, len(items)), context, _start, (job, items, owners))
    processes: set[BaseProcess] = set()
    try:
        # Else the first full garbage collection in each worker looks at every object, which copies
        # all memory that it shares with this process: 0.6 s.
        gc.freeze()
        futures = [executor.submit(_call, number) for number in range(len(items))]
        gc.unfreeze()
        processes = set(multiprocessing.active_children()) - earlier_children
        yield futures
    except BrokenProcessPool as error:
        if error.__cause__ is not None:  # no process ended, but a result cannot be unpickled
            raise
        executor.shutdown()  # waits for all workers, so that their exit codes are known
        raise UserError(_describe(processes, zip(map(name, items), owners, strict=True))) from error
    except BaseException:
        for process in processes:  # their results are not needed any more
            process.terminate()
        raise
    finally:
        executor.shutdown()


def _describe(processes: Iterable[BaseProcess], owners: Iterable[tuple[str, int]]) -> str:
    """Say how workers ended, and which items they were at work on.

    Args:
        processes: all workers, ended.
        owners: every item's name, and the number of the process at work on it, else 0.
    """
    # The executor ends the remaining workers by SIGTERM. If all ended by it, the first one was
    # sent the signal from elsewhere.
    crashed = {
        process.pid: process.exitcode
        for process in processes
        if process.exitcode not in (0, -signal.SIGTERM)
    }
    codes = sorted(set(crashed.values())) or [-signal.SIGTERM]
    ends = " and ".join(
        signal.Signals(-code).name if code < 0 else f"exit code {code}" for code in codes
    )
    unfinished = [name for name, owner in owners if owner and (owner in crashed or not crashed)]
    causes = {
        -signal.SIGKILL: "memory probably ran out; "
        "lower machine.workers or machine.images_per_step",
        -signal.SIGTERM: "something else stopped it",
    }
    crash = "a library probably crashed; machine.workers: 1 works without such processes"
    cause = causes.get(codes[0], crash)
    when = "before its first piece of work"
    if unfinished:
        when = f"at work on {'; '.join(unfinished)}"
    return (
        f"a worker process was ended by {ends}, {when}: {cause}; "
        "what is done is kept, and the same command goes on"
    )


def _start(job: Callable[[Any], Any], items: Sequence[Any], owners: MutableSequence[int]) -> None:
    """Prepare a worker: one thread, and it ends when its parent does."""
    global _job, _items, _owners
    _job, _items, _owners = job, items, owners
    # SIGTERM ends workers. They inherit the parent's handler, which raises an exception to close
    # its run in MLflow; raised at the wrong moment, it leaves a worker that never ends.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Ctrl-C reaches all processes, and the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A system short of memory then kills a worker, and the parent is left to report it.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    if torch := sys.modules.get("torch"):  # what draws figures has not imported it
        torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for the end of the process that forked this one, and end it, too."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(number: int) -> Any:
    _owners[number] = os.getpid()
    try:
        return _job(_items[number])
    finally:
        _owners[number] = 0
