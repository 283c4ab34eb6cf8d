"""Requests that arrive together are worked on together.

Adapting to many images at once costs little more than adapting to one, so a server gains by it. No
request waits for others to come: while one group is worked on, the next one gathers.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

Work = Callable[[Hashable, list[Any]], list[Any]]


class Full(Exception):
    """Too much waits already."""


@dataclass(frozen=True, eq=False)  # two requests for the same image are two requests
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

    The request that has waited longest is always in the next group, with those of its kind that
    fit. A group that fails is tried again request by request, so that an error reaches only the
    request that causes it.

    Args:
        work: (kind, items) → one result per item; an item's result must not depend on the others.
        largest: most items that are worked on together, unless a single request has more.
        waiting: most items that wait, unless a single request has more and nothing else waits.
    """

    def __init__(self, work: Work, largest: int, waiting: int) -> None:
        self._work, self._largest, self._limit = work, largest, waiting
        self._requests: deque[Request] = deque()  # the oldest first
        self._changed, self._waiting = threading.Condition(), 0
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
        request = Request(kind, items)
        with self._changed:
            if self._waiting and self._waiting + len(items) > self._limit:
                raise Full
            self._waiting += len(items)
            self._requests.append(request)
            if self._thread is None or not self._thread.is_alive():  # it does not outlive a fork
                self._thread = threading.Thread(target=self._run, name="adapt", daemon=True)
                self._thread.start()
            self._changed.notify()
        try:
            return request.results.result(seconds)
        except TimeoutError:
            self._forget(request)
            raise

    def _forget(self, request: Request) -> None:
        """Leave out a request that nobody has begun with."""
        with self._changed:
            if request in self._requests:
                self._requests.remove(request)
                self._waiting -= len(request.items)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._requests)
                group = self._gather()
            try:
                self._settle(group)
            finally:
                with self._changed:
                    self._waiting -= sum(len(one.items) for one in group)

    def _gather(self) -> list[Request]:
        """Take the oldest request, and the others of its kind that fit; the rest keep their order.

        Called with the lock, while there are requests.
        """
        first = self._requests.popleft()
        group, count, left = [first], len(first.items), []
        for request in self._requests:
            if request.kind == first.kind and count + len(request.items) <= self._largest:
                group.append(request)
                count += len(request.items)
            else:
                left.append(request)
        self._requests = deque(left)
        return group

    def _settle(self, group: Sequence[Request]) -> None:
        """Work on requests of one kind, and hand out their results or errors."""
        items = [item for one in group for item in one.items]
        try:
            results = self._work(group[0].kind, items)
            if len(results) != len(items):
                raise RuntimeError(f"{len(items)} items gave {len(results)} results")
        except BaseException as error:  # whatever it is, somebody waits for it, not this thread
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
