"""A model that answers requests: what is sent is checked, gathered, adapted to and counted."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from tttlab.data.pixels import as_images
from tttlab.errors import UserError
from tttlab.runtime.group_size import Groups
from tttlab.serving.adaptive_model import AdaptiveModel
from tttlab.serving.answers import Wish, answer
from tttlab.serving.batching import Batcher, Full
from tttlab.serving.pictures import Limits, check_pixels, squared, take


class Watcher(Protocol):
    """Is told what a service does, from several threads."""

    def worked(self, run: str, images: int) -> None:
        """Take note of images that were adapted to together by a run."""

    def answered(self, rows: Sequence[dict[str, Any]], seconds: float) -> None:
        """Take note of a request's answer and of the time it took, waiting included."""


class Busy(Exception):
    """The request is right, but the server has too much to do."""


class Late(Busy):
    """The time that a request may take is over."""


class Service:
    """Answers requests about images; safe to call from several threads.

    An answer depends on the image and on the wish alone: random views are keyed by the image's
    pixels, every image starts from the source weights, and nothing is kept. Requests that arrive
    together are adapted to together, which changes an answer by rounding only.

    Args:
        model: what to answer by.
        limits: what to refuse.
        together: most images that are adapted to at once.

    Attributes:
        watchers: are told what is done.
    """

    def __init__(self, model: AdaptiveModel, limits: Limits = Limits(), together: int = 64) -> None:
        self.model, self.limits = model, limits
        self.watchers: list[Watcher] = []
        self._groups: dict[str, Groups] = {}  # by run
        self._batcher = Batcher(self.adapt, together, limits.waiting)
        # Bounds the memory of decoded images: more at once would not be faster.
        self._decoding = threading.Semaphore(os.cpu_count() or 1)

    @property
    def _seconds(self) -> float:
        """Give the longest time that a request may take, as locks can wait for it."""
        return min(self.limits.seconds, threading.TIMEOUT_MAX)

    @property
    def waiting(self) -> int:
        """Number of images that wait or are worked on."""
        return self._batcher.waiting

    def answer(self, pictures: Iterable[Any], wish: Wish = Wish()) -> list[dict[str, Any]]:
        """Classify images without and with adaptation.

        Args:
            pictures: images as `tttlab.serving.pictures.take` takes them.
            wish: how they are to be adapted to.

        Returns:
            for each image what `tttlab.serving.answers.answer` tells, and the ``run``.

        Raises:
            UserError: an image or the wish cannot be served; the line counts images from 1.
            Busy: there is too much to do.
            Late: it took too long.
        """
        started = time.perf_counter()
        wish, pixels = self.checked(pictures, wish)
        left = max(self._seconds - (time.perf_counter() - started), 0)
        try:
            rows = self._batcher.ask(wish, pixels, left)
        except Full as error:
            raise Busy(f"{self.waiting} images wait already; try again later") from error
        except TimeoutError as error:
            raise self._late() from error
        for watcher in self.watchers:
            watcher.answered(rows, time.perf_counter() - started)
        return rows

    def checked(self, pictures: Iterable[Any], wish: Wish) -> tuple[Wish, list[np.ndarray]]:
        """Check a request and decode its images; arguments and errors as for `answer`.

        Returns:
            the wish with the name of its run, and what `adapt` takes.
        """
        name, _ = wish.applied(self.model, self.limits.steps)
        return replace(wish, run=name), self._decode(list(pictures))

    def _decode(self, pictures: list[Any]) -> list[np.ndarray]:
        limits, size, depth = self.limits, self.model.image_size, self.model.depth
        if not 0 < len(pictures) <= limits.images:
            raise UserError(f"expected 1 to {limits.images} images, found {len(pictures)}")
        ends = time.perf_counter() + self._seconds

        def in_time(items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
            for number, item in enumerate(items, 1):
                if time.perf_counter() > ends:
                    raise self._late()
                yield number, item

        if not self._decoding.acquire(timeout=self._seconds):
            raise self._late()
        try:
            taken = [_named(number, take, part, limits) for number, part in in_time(pictures)]
            check_pixels(taken, limits)
            return [_named(number, squared, one, size, depth) for number, one in in_time(taken)]
        finally:
            self._decoding.release()

    def _late(self) -> Late:
        return Late(f"no answer within {self.limits.seconds:g} s; send fewer images")

    def adapt(self, wish: Wish, pixels: list[np.ndarray]) -> list[dict[str, Any]]:
        """Answer about images that share a wish; to be called in one thread at a time."""
        model = self.model
        name, run = wish.applied(model)
        images = as_images(torch.from_numpy(np.stack(pixels))).to(model.like)
        keys = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
        groups = self._groups.setdefault(name, Groups())
        rows = answer(run, images, keys, model.classes, wish.return_curve, groups)
        for watcher in self.watchers:
            watcher.worked(name, len(pixels))
        return [{"run": name, **row} for row in rows]


def _named(number: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; say which image of the request a mistake is about."""
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"image {number}: {error}") from error
