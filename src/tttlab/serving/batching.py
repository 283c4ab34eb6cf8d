"""Requests that arrive together are worked on together.

Adapting to many images at once costs little more than adapting to one, so a server gains by it. No
request waits for others to come: while one group is worked on, the next one gathers.
"""

import queue
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

Work = Callable[[Hashable, list[Any]], list[Any]]


class Full(Exception):
    """Too much waits already."""


@dataclass(frozen=True)
class Request:
    """Items that one caller waits for.

    Attributes:
        kind: items are worked on together only with items of the same kind.
        items: what to work on.
        results: one per item, once they are there.
    """

    kind: Hashable
    items: Sequence[Any]
    results: "Future[list[Any]]" = field(default_factory=Future)


class Batcher:
    """Gathers the items of concurrent requests, and works on them in one thread.

    A group that fails is tried again request by request, so that an error reaches only the request
    that causes it.

    Args:
        work: (kind, items) → one result per item; an item's result must not depend on the others.
        largest: most items that are worked on together, unless a single request has more.
        waiting: most items that wait.
    """

    def __init__(self, work: Work, largest: int, waiting: int) -> None:
        self._work, self._largest, self._limit = work, largest, waiting
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._lock, self._waiting = threading.Lock(), 0
        self._kept: Request | None = None  # the first one that no longer fitted into a group
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Number of items that wait or are worked on."""
        return self._waiting

    def ask(self, kind: Hashable, items: Sequence[Any], seconds: float | None = None) -> list[Any]:
        """Wait for the results of some items.

        Args:
            kind: items are worked on together only with items of the same kind.
            items: at least one.
            seconds: longest time to wait; None: any.

        Raises:
            Full: too many items wait already.
            TimeoutError: the time is over; items that nobody has begun with are left out.
            Exception: what ``work`` raised on these items.
        """
        with self._lock:
            if self._waiting and self._waiting + len(items) > self._limit:
                raise Full
            self._waiting += len(items)
            if self._thread is None:  # after a fork, the first request starts the thread
                self._thread = threading.Thread(target=self._run, name="adapt", daemon=True)
                self._thread.start()
        request = Request(kind, items)
        self._requests.put(request)
        try:
            return request.results.result(seconds)
        except TimeoutError:
            request.results.cancel()
            raise

    def _run(self) -> None:
        while True:
            group = self._gather()
            begun = [one for one in group if one.results.set_running_or_notify_cancel()]
            try:
                self._settle(begun)
            finally:
                with self._lock:
                    self._waiting -= sum(len(one.items) for one in group)

    def _gather(self) -> list[Request]:
        """Take the next request, and those behind it that are of its kind and fit."""
        first = self._kept or self._requests.get()
        group, count, self._kept = [first], len(first.items), None
        while True:
            try:
                request = self._requests.get_nowait()
            except queue.Empty:
                return group
            if request.kind != first.kind or count + len(request.items) > self._largest:
                self._kept = request
                return group
            group.append(request)
            count += len(request.items)

    def _settle(self, group: Sequence[Request]) -> None:
        """Work on requests of one kind, and hand out their results or errors."""
        if not group:
            return
        try:
            results = self._work(group[0].kind, [item for one in group for item in one.items])
        except Exception as error:
            if len(group) == 1:
                group[0].results.set_exception(error)
            else:
                for one in group:
                    self._settle([one])
            return
        start = 0
        for one in group:
            one.results.set_result(results[start : start + len(one.items)])
            start += len(one.items)
