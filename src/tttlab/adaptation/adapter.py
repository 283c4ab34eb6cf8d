"""Test-time training of many images at once, each on its own.

Every image starts from the source weights, takes its own optimiser steps on its own loss, and is classified by its own
weights. The images are worked on together only to fill the processor; see `tttlab.adaptation.inner_loop`. Frozen parameters
stay shared.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tttlab.adaptation.checks import check
from tttlab.adaptation.inner_loop import InnerLoop, Parameters, bind, train
from tttlab.adaptation.method import Method
from tttlab.adaptation.normalisation import normalised
from tttlab.adaptation.predicting import draw_looks, predict, predict_by_source
from tttlab.adaptation.task import Task
from tttlab.errors import UserError
from tttlab.networks.gradients import rows
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import Statistics
from tttlab.runtime.group_size import GroupSize
from tttlab.seeding import torch_generator

EXPLOSION = 10.0  # a loss that grew by this factor (and by this much) has diverged, not improved


class Adaptation(NamedTuple):
    """Results for ``N`` images, on the CPU.

    ``logits`` and ``source_logits (N, K)`` with and without adaptation; ``losses (N, steps + 1)`` before every step and after
    the last one on the last step's views, or without training one column that is not a number; ``fell_back (N,)`` where the
    adapted prediction was given up for the source's; ``milliseconds (N,)`` spent on adapting and predicting, an image's share
    of its group's time. Of the R steps that `adapt` was asked to record ``logits_at (N, R, K)`` and ``milliseconds_at (N, R)``:
    what an adaptation of so many steps gives and takes.
    """

    logits: Tensor
    source_logits: Tensor
    losses: Tensor
    fell_back: Tensor
    milliseconds: Tensor
    logits_at: Tensor
    milliseconds_at: Tensor


def adapt(
    network: nn.Module,
    images: Tensor,
    method: Method,
    loop: InnerLoop = InnerLoop(),
    *,
    statistics: Statistics | None = None,
    image_ids: Sequence[str | int] | None = None,
    seed: int = 0,
    record: Sequence[int] = (),
    images_per_step: int | Literal["auto"] | GroupSize = "auto",
    on_images: Callable[[int], None] | None = None,
) -> Adaptation:
    """Adapt the network to every image on its own and predict with and without.

    Args:
        network: a `Network`, or any module from images to logits (see `tttlab.networks.classifiers`); it is left as it was.
        images: ``(N, 3, H, W)`` on any device: in [0, 1] for a `Network`, as it wants them for any other module.
        method: what to minimise.
        loop: how.
        statistics: source statistics, as the method and the normalisation policy need them.
        image_ids: names of the images, which key their random streams; by default their positions.
        seed: of all random streams.
        record: numbers of steps, from 0 to ``loop.steps``, after which to predict too: the curve along the steps in one pass.
            After 0 steps nothing but the normalisation policy has acted.
        images_per_step: images worked on at once; ``auto`` measures what is fastest and fits, and a `GroupSize` passes what
            one call has learnt on to the next. Changes time and memory, never a result.
        on_images: called with the number of images done, after each group.

    Returns:
        logits, losses and cost per image.

    Raises:
        UserError: the network or the statistics do not fit the method, or predictions depend on the other images in a batch.
    """
    task = Task(network, method, loop, statistics or {}, seed).ready(images.device)
    sizes = (
        images_per_step if isinstance(images_per_step, GroupSize) else GroupSize(images_per_step)
    )
    names = [str(name) for name in (range(len(images)) if image_ids is None else image_ids)]
    if not names:
        raise UserError("expected images, found none")
    parts: list[Adaptation] = []
    with evaluating(task.network):
        check(task.network, images[:2], method, loop, task.statistics)
        while (done := sum(len(part.logits) for part in parts)) < len(images):
            with sizes.open(len(images) - done, images.device) as group:
                part = slice(done, done + group.size)
                result, group.work = adapt_together(task, images[part], names[part], record)
                parts.append(result)
                if on_images:
                    on_images(group.size)
    return Adaptation(*(torch.cat(values) for values in zip(*parts, strict=True)))


def adapt_together(
    task: Task, images: Tensor, names: Sequence[str], record: Sequence[int] = ()
) -> tuple[Adaptation, float]:
    """Adapt one group of ``B`` images, each on its own; → results, and the work as a number of images (see `Group`)."""
    network, method, loop, seed = task.network, task.method, task.loop, task.seed
    net = bind(network, method, loop)
    if leaves_alone(net, method, loop):
        return unadapted(net, images, record), len(images)
    source_logits = predict_by_source(net, images)
    curve = Curve(record, images.device)
    looks = draw_looks(images, loop, [torch_generator(seed, "average", name) for name in names])
    streams = [
        [torch_generator(seed, "views", name, step) for name in names]
        for step in range(max(loop.steps, 1))
    ]
    with normalised(network, loop, task.statistics):
        if net.trained and loop.steps:
            logits, losses, usable, work = train_and_predict(
                net, task, images, looks, streams, curve
            )
        else:
            views = method.views(network, images, streams[0])
            logits = predict(net, {}, looks, views, method, task.statistics)
            losses = images.new_full((len(images), 1), float("nan"))  # nothing was measured
            usable = torch.ones(len(images), dtype=torch.bool, device=images.device)
            work = len(images)
    usable &= logits.isfinite().all(-1)
    logits = torch.where(usable[:, None], logits, source_logits)
    cost = torch.full((len(images),), curve.spent() / len(images))
    logits_at, milliseconds_at = curve.collect(logits, source_logits, losses)
    adaptation = Adaptation(
        logits.cpu(),
        source_logits.cpu(),
        losses.cpu(),
        ~usable.cpu(),
        cost,
        logits_at,
        milliseconds_at,
    )
    return adaptation, work


def leaves_alone(net: Bound, method: Method, loop: InnerLoop) -> bool:
    """Tell whether predictions are the source network's: nothing is trained, normalised otherwise, averaged or corrected."""
    plain = (
        type(method).predict is Method.predict
        and loop.normalisation == "source"
        and not loop.average
    )
    return plain and not (net.trained and loop.steps)


def unadapted(net: Bound, images: Tensor, record: Sequence[int]) -> Adaptation:
    """Classify images ``(B, 3, H, W)`` once, for with and without are the same; the clock runs."""
    curve = Curve(record, images.device)
    logits = predict_by_source(net, images)
    cost = torch.full((len(images),), curve.spent() / len(images))
    losses = images.new_full((len(images), 1), float("nan"))  # nothing was measured
    at = curve.collect(logits, logits, losses)
    return Adaptation(
        logits.cpu(), logits.cpu(), losses.cpu(), ~logits.isfinite().all(-1).cpu(), cost, *at
    )


class Curve:
    """What a group's images would be classified as on the way, and what it took; its clock stands still meanwhile.

    Attributes:
        steps: those to look at.
        device: where the work is done.
        logits: ``(B, K)`` after those that have come.
        milliseconds: of the whole group until then, a prediction included.
    """

    def __init__(self, steps: Sequence[int], device: torch.device) -> None:
        self.steps, self.device = steps, device
        self.logits: dict[int, Tensor] = {}
        self.milliseconds: dict[int, float] = {}
        self._aside = 0.0
        wait_for(device)
        self._began = time.perf_counter()

    def spent(self) -> float:
        """Give the milliseconds since the beginning, without those spent on looking aside."""
        wait_for(self.device)
        return (time.perf_counter() - self._began) * 1e3 - self._aside

    def note(self, step: int, predict: Callable[[], Tensor]) -> None:
        """Predict ``(B, K)`` after a step, if it is one of those to look at."""
        if step in self.steps:
            before = self.spent()
            self.logits[step] = predict()
            self.milliseconds[step] = self.spent()
            self._aside += self.milliseconds[step] - before

    def collect(self, final: Tensor, source: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Give ``(B, R, K)`` logits and ``(B, R)`` milliseconds per image, by the rule that decides on falling back.

        Args:
            final: ``(B, K)``, for steps that never came because no image had a gradient.
            source: ``(B, K)``.
            losses: ``(B, S + 1)``.
        """
        logits = source.new_empty(len(source), len(self.steps), source.shape[1])
        milliseconds = torch.full((len(source), len(self.steps)), self.spent() / len(source))
        for place, step in enumerate(self.steps):
            found = self.logits.get(step, final)
            usable = found.isfinite().all(-1)
            if step and losses.shape[1] > 1:
                usable = usable & ~diverged(losses[:, : step + 1])
            logits[:, place] = torch.where(usable[:, None], found, source)
            milliseconds[:, place] = self.milliseconds.get(step, self.spent()) / len(source)
        return logits.cpu(), milliseconds


def train_and_predict(
    net: Bound,
    task: Task,
    images: Tensor,
    looks: Tensor,
    streams: Sequence[Sequence[torch.Generator]],
    curve: Curve,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Train a group and classify it: logits ``(B, K)``, losses ``(B, S + 1)``, where they can be used ``(B,)``, the work."""
    method, loop, statistics = task.method, task.loop, task.statistics

    def classify(moved: Tensor, parameters: Parameters, views: Any) -> Tensor:
        if len(moved) == len(images):
            return predict(net, parameters, looks, views, method, statistics)
        unmoved = images.unsqueeze(1)  # the views of a method that draws none
        logits = predict(net, {}, looks, unmoved, method, statistics)
        if not len(moved):
            return logits
        trained = predict(net, parameters, looks[moved], views, method, statistics)
        return logits.index_copy(0, moved, trained)

    def observe(step: int, *trained: Any) -> None:
        curve.note(step, lambda: classify(*trained))

    moved, parameters, views, losses = train(
        net, images, method, loop, statistics, streams, observe
    )
    usable = ~diverged(losses)
    logits = classify(moved, parameters, views)
    if len(moved):
        finite = (
            torch.stack([rows(value.detach()).sum(1) for value in parameters.values()])
            .isfinite()
            .all(0)
        )
        usable[moved] &= finite
    work = len(moved) + (len(images) - len(moved)) / losses.shape[1]
    return logits, losses, usable, work


def diverged(losses: Tensor) -> Tensor:
    """Find images ``(B,)`` whose loss curve ``(B, S + 1)`` is not finite or has exploded."""
    growth = losses[:, -1] - losses[:, 0]
    return ~losses.isfinite().all(1) | (growth > EXPLOSION * losses[:, 0].abs().clamp_min(1))


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given, so that the clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
