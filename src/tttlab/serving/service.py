"""A model that answers requests: what is sent is checked, gathered, adapted to and counted."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tttlab.data.pixels import as_images
from tttlab.errors import UserError
from tttlab.runtime.group_size import Groups
from tttlab.serving.adaptive_model import AdaptiveModel
from tttlab.serving.answers import Wish, answer
from tttlab.serving.batching import Batcher, Full
from tttlab.serving.pictures import Limits, decode

Watcher = Callable[[Sequence[dict[str, Any]], float], None]


class Busy(Exception):
    """The request is right, but the server has too much to do."""


class Service:
    """Answers requests about images; safe to call from several threads.

    An answer depends on the image and on the wish alone: random views are keyed by the image's
    pixels, every image starts from the source weights, and nothing is kept. Requests that arrive
    together are adapted to together, which changes an answer by rounding only.

    Args:
        model: what to answer by.
        limits: what to refuse.
        together: most images that are adapted to at once.
    """

    def __init__(self, model: AdaptiveModel, limits: Limits = Limits(), together: int = 64) -> None:
        self.model, self.limits = model, limits
        self.watchers: list[Watcher] = []
        self._groups: dict[str, Groups] = {}  # by run
        self._batcher = Batcher(self.adapt, together, limits.waiting)

    @property
    def waiting(self) -> int:
        """Number of images that wait or are worked on."""
        return self._batcher.waiting

    def answer(self, pictures: Iterable[Any], wish: Wish = Wish()) -> list[dict[str, Any]]:
        """Classify images without and with adaptation.

        Args:
            pictures: images as `tttlab.serving.pictures.decode` takes them.
            wish: how they are to be adapted to.

        Returns:
            for each image what `tttlab.serving.answers.answer` tells, and the ``run``.

        Raises:
            UserError: an image or the wish cannot be served; the line counts images from 1.
            Busy: there is too much to do, or it took too long.
        """
        started, limits = time.perf_counter(), self.limits
        wish, pixels = self.checked(pictures, wish)
        try:
            rows = self._batcher.ask(wish, pixels, limits.seconds)
        except Full as error:
            raise Busy(f"{self.waiting} images wait already; try again later") from error
        except TimeoutError as error:
            raise Busy(f"no answer within {limits.seconds:g} s; send fewer images") from error
        for watcher in self.watchers:
            watcher(rows, time.perf_counter() - started)
        return rows

    def checked(self, pictures: Iterable[Any], wish: Wish) -> tuple[Wish, list[np.ndarray]]:
        """Check a request and decode its images; arguments and errors as for `answer`.

        Returns:
            the wish with the name of its run, and what `adapt` takes.
        """
        name, _ = wish.applied(self.model, self.limits.steps)
        return replace(wish, run=name), self._decode(pictures)

    def _decode(self, pictures: Iterable[Any]) -> list[np.ndarray]:
        pictures, pixels = list(pictures), []
        if not 0 < len(pictures) <= self.limits.images:
            raise UserError(f"expected 1 to {self.limits.images} images, found {len(pictures)}")
        for number, picture in enumerate(pictures, 1):
            try:
                pixels.append(decode(picture, self.model.image_size, self.model.depth, self.limits))
            except UserError as error:
                raise UserError(f"image {number}: {error}") from error
        return pixels

    def adapt(self, wish: Wish, pixels: list[np.ndarray]) -> list[dict[str, Any]]:
        """Answer about images that share a wish; to be called in one thread at a time."""
        model = self.model
        name, run = wish.applied(model)
        images = as_images(torch.from_numpy(np.stack(pixels))).to(model.like)
        keys = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
        groups = self._groups.setdefault(name, Groups())
        rows = answer(run, images, keys, model.classes, wish.return_curve, groups)
        return [{"run": name, **row} for row in rows]
