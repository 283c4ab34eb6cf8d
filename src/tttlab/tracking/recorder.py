"""The recorder: a process of its own for MLflow, which imports it while the stage imports torch.

Each of the two imports takes two seconds. Without a recorder, MLflow works in the process that
calls it.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

from tttlab.errors import UserError
from tttlab.runtime.parallel import end_with_parent
from tttlab.tracking.store import import_mlflow

P, T = ParamSpec("P"), TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # they end a stage, which then closes its run
_recorder: Connection | None = None  # takes (function, args, options), answers (result, error)


@contextmanager
def recorder(wanted: bool = True) -> Iterator[None]:
    """Let functions that are marked `by_recorder` be carried out by a recorder inside the context.

    There is none on systems other than Linux, with a single processor, or where torch is there
    already: then nothing is left to be imported side by side, and torch's threads forbid to fork.

    Args:
        wanted: whether this process records anything.
    """
    global _recorder
    several = sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1
    if not (wanted and several) or "torch" in sys.modules:
        yield
        return
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_record, args=(there,))
    process.start()
    there.close()  # so that the end of the recorder is the end of the pipe
    _recorder = here
    try:
        yield
    finally:
        _recorder = None
        # Every call has been answered. It may still import, and nobody waits for that.
        process.kill()
        process.join()
        here.close()


def by_recorder(function: Callable[P, T]) -> Callable[P, T]:
    """Have the recorder carry out a function, if there is one.

    What the function takes, returns and raises must be picklable. Ctrl-C and SIGTERM wait for its
    end, so that an answer is never left to the next call.

    Raises:
        UserError: the recorder was killed or crashed.
    """

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        if _recorder is None:
            return function(*args, **options)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            _recorder.send((call, args, options))
            result, error = _recorder.recv()
        except (EOFError, ConnectionError) as end:
            raise UserError(
                "the process that writes to MLflow was ended from outside: memory probably ran "
                "out; what is done is kept, and the same command goes on"
            ) from end
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if error is not None:
            raise error
        return result

    return call


def _record(calls: Connection) -> None:
    """Be the recorder: it ends with its parent or is killed by it."""
    global _recorder
    _recorder = None  # of an earlier context
    for number in _SIGNALS:  # which may reach all processes of a stage
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    with suppress(Exception):  # whose reason the first call tells
        import_mlflow()
    while True:
        function, args, options = calls.recv()
        try:
            answer = function(*args, **options), None
        except Exception as error:
            error.add_note(traceback.format_exc())  # a pickled error lacks its traceback
            answer = None, error
        calls.send(answer)
