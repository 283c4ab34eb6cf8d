"""Test-time training of many images at once, each on its own.

Every image starts from the source weights, takes optimiser steps on its own loss, and is classified
by its own weights. Images are grouped only to use the processor fully; see
`tttlab.adaptation.inner_loop`.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tttlab.adaptation.checks import check
from tttlab.adaptation.inner_loop import Parameters, train
from tttlab.adaptation.method import Method
from tttlab.adaptation.normalisation import normalised
from tttlab.adaptation.predicting import draw_looks, predict, predict_by_source
from tttlab.adaptation.task import Task
from tttlab.adaptation.trainable import bind
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.networks.gradients import as_rows
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import Statistics
from tttlab.runtime.devices import wait_for
from tttlab.runtime.group_size import GroupSize, Wish, as_sizes
from tttlab.seeding import torch_generator

EXPLOSION = 10.0  # a loss that grew by this factor (and by this much) has diverged, not improved


class Adaptation(NamedTuple):
    """Results for ``N`` images after S steps, on the CPU.

    Attributes:
        logits: ``(N, K)`` with adaptation.
        source_logits: ``(N, K)`` without.
        losses: ``(N, S + 1)``, before every step and after the last, there on the last step's
            views; ``(N, 1)`` of NaN without training.
        fell_back: ``(N,)``, whether ``logits`` are the source's because adaptation failed.
        milliseconds: ``(N,)``, the image's share of its group's time for adapting and predicting.
        logits_at: ``(N, R, K)``, the logits after each of R recorded numbers of steps.
        milliseconds_at: ``(N, R)``, the time that an adaptation of so many steps takes.
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
    images_per_step: Wish | GroupSize = "auto",
    on_images: Callable[[int], None] | None = None,
    checked: bool = False,
) -> Adaptation:
    """Adapt the network to every image on its own, and predict with and without.

    Args:
        network: a `Network`, or any module from images to logits (see
            `tttlab.networks.classifiers`); it is not changed.
        images: ``(N, 3, H, W)`` on any device: in [0, 1] for a `Network`, preprocessed for any
            other module.
        method: gives the loss.
        loop: settings of the steps.
        statistics: source statistics that the method and the normalisation policy need.
        image_ids: names of the images, which key their random streams; by default their positions.
        seed: of all random streams.
        record: numbers of steps, from 0 to ``loop.steps``, after which to predict as well. After 0
            steps only the normalisation policy has acted.
        images_per_step: images in a group; ``auto`` measures which number is fastest and fits. A
            `GroupSize` keeps what it has learnt from one call to the next. Changes no result.
        on_images: called after each group, with the number of its images.
        checked: whether an earlier call has taken the same network, method and loop.

    Returns:
        logits, losses and cost per image.

    Raises:
        UserError: the network or the statistics do not fit the method, or predictions depend on the
            other images in a batch.
    """
    task = Task(network, method, loop, statistics or {}, seed).ready(images.device)
    sizes = as_sizes(images_per_step)
    names = [str(name) for name in (range(len(images)) if image_ids is None else image_ids)]
    if not names:
        raise UserError("expected images, found none")
    results: list[Adaptation] = []
    done = 0
    with evaluating(task.network):
        if not checked:
            check(task.network, images[:2], method, loop, task.statistics)
        while done < len(images):
            # A group that runs out of memory adds no results, and the next one is smaller.
            with sizes.open(len(images) - done, images.device) as group:
                part = slice(done, done + group.size)
                result, group.work = adapt_together(task, images[part], names[part], record)
                results.append(result)
                done += group.size
                if on_images:
                    on_images(group.size)
    return Adaptation(*(torch.cat(values) for values in zip(*results, strict=True)))


def adapt_together(
    task: Task, images: Tensor, names: Sequence[str], record: Sequence[int] = ()
) -> tuple[Adaptation, float]:
    """Adapt one group of B images, each on its own.

    Returns:
        results, and the work in images; see `tttlab.runtime.group_size.Group`.
    """
    network, method, loop, seed = task.network, task.method, task.loop, task.seed
    net = bind(network, method, loop)
    if leaves_alone(net, method, loop):
        return unadapted(net, images, record), len(images)
    source_logits = predict_by_source(net, images)
    curve = Curve(record, images.device)
    looks = draw_looks(images, loop, [torch_generator(seed, "average", name) for name in names])
    # Without steps, a method's prediction may still need the views of the first one.
    streams = [
        [torch_generator(seed, "views", name, step) for name in names]
        for step in range(max(loop.steps, 1))
    ]
    with normalised(network, loop, task.statistics):
        if net.trained and loop.steps:
            outcome = train_and_predict(net, task, images, looks, streams, curve)
        else:
            views = method.views(network, images, streams[0])
            outcome = predict_untrained(net, task, looks, views)
    logits, losses, usable, work = outcome
    usable &= logits.isfinite().all(-1)
    logits = torch.where(usable[:, None], logits, source_logits)
    cost = torch.full((len(images),), curve.spent() / len(images))
    recorded = curve.collect(logits, source_logits, losses)
    adaptation = Adaptation(
        logits.cpu(), source_logits.cpu(), losses.cpu(), ~usable.cpu(), cost, *recorded
    )
    return adaptation, work


def leaves_alone(net: Bound, method: Method, loop: InnerLoop) -> bool:
    """Tell whether all predictions are the source network's.

    They are if no step is taken and normalisation and prediction are the ordinary ones.
    """
    plain = (
        type(method).predict is Method.predict
        and loop.normalisation == "source"
        and not loop.average
    )
    return plain and not (net.trained and loop.steps)


def unadapted(net: Bound, images: Tensor, record: Sequence[int]) -> Adaptation:
    """Classify images ``(B, 3, H, W)`` once, where adaptation changes nothing; this is timed."""
    curve = Curve(record, images.device)
    logits = predict_by_source(net, images)
    cost = torch.full((len(images),), curve.spent() / len(images))
    losses = images.new_full((len(images), 1), float("nan"))  # nothing was measured
    recorded = curve.collect(logits, logits, losses)
    unusable = ~logits.isfinite().all(-1)
    return Adaptation(logits.cpu(), logits.cpu(), losses.cpu(), unusable.cpu(), cost, *recorded)


class Curve:
    """A group's predictions after recorded numbers of steps, and the time that each takes.

    The clock stands still while a prediction is made only for the record.

    Attributes:
        steps: numbers of steps to record.
        device: where the work is done.
        logits: step → ``(B, K)``, as far as recorded.
        milliseconds: step → time of the whole group for so many steps and one prediction.
    """

    def __init__(self, steps: Sequence[int], device: torch.device) -> None:
        self.steps, self.device = steps, device
        self.logits: dict[int, Tensor] = {}
        self.milliseconds: dict[int, float] = {}
        self._recording = 0.0
        wait_for(device)
        self._started = time.perf_counter()

    def spent(self) -> float:
        """Return the milliseconds since the start, without those for the record."""
        wait_for(self.device)
        return (time.perf_counter() - self._started) * 1e3 - self._recording

    def note(self, step: int, predict: Callable[[], Tensor]) -> None:
        """Predict ``(B, K)`` after a step, if it is to be recorded."""
        if step in self.steps:
            before = self.spent()
            self.logits[step] = predict()
            self.milliseconds[step] = self.spent()
            self._recording += self.milliseconds[step] - before

    def collect(self, final: Tensor, source: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``(B, R, K)`` and milliseconds ``(B, R)`` per image.

        Where adaptation failed by the recorded step, the logits are the source's.

        Args:
            final: ``(B, K)``, for steps that were not taken because no image had a gradient.
            source: ``(B, K)``.
            losses: ``(B, S + 1)``.
        """
        logits = source.new_empty(len(source), len(self.steps), source.shape[1])
        milliseconds = torch.empty(len(source), len(self.steps))
        for column, step in enumerate(self.steps):
            predicted = self.logits.get(step, final)
            usable = predicted.isfinite().all(-1)
            if step and losses.shape[1] > 1:
                usable = usable & ~diverged(losses[:, : step + 1])
            logits[:, column] = torch.where(usable[:, None], predicted, source)
            milliseconds[:, column] = self.milliseconds.get(step, self.spent()) / len(source)
        return logits.cpu(), milliseconds


def predict_untrained(
    net: Bound, task: Task, looks: Tensor, views: Any
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Classify a group without training; returns what `train_and_predict` does."""
    logits = predict(net, {}, looks, views, task.method, task.statistics)
    losses = looks.new_full((len(looks), 1), float("nan"))  # nothing was measured
    usable = torch.ones(len(looks), dtype=torch.bool, device=looks.device)
    return logits, losses, usable, len(looks)


def train_and_predict(
    net: Bound,
    task: Task,
    images: Tensor,
    looks: Tensor,
    streams: Sequence[Sequence[torch.Generator]],
    curve: Curve,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Train a group of images, then classify them.

    Args:
        net: the source network, bound.
        task: method, settings of the steps and source statistics.
        images: ``(B, 3, H, W)``.
        looks: ``(B, 1 + A, 3, H, W)``, what predictions look at.
        streams: for every step a random stream per image.
        curve: records predictions after some steps.

    Returns:
        logits ``(B, K)``, losses ``(B, S + 1)``, whether the logits can be used ``(B,)``, and the
        work in images.
    """
    method, loop, statistics = task.method, task.loop, task.statistics

    def classify(moved: Tensor, parameters: Parameters, views: Any) -> Tensor:
        if len(moved) == len(images):
            return predict(net, parameters, looks, views, method, statistics)
        # Only a method that draws no views leaves images out of the training.
        source_logits = predict(net, {}, looks, images.unsqueeze(1), method, statistics)
        if not len(moved):
            return source_logits
        trained_logits = predict(net, parameters, looks[moved], views, method, statistics)
        return source_logits.index_copy(0, moved, trained_logits)

    def observe(step: int, *trained: Any) -> None:
        curve.note(step, lambda: classify(*trained))

    moved, parameters, views, losses = train(
        net, images, method, loop, statistics, streams, observe
    )
    usable = ~diverged(losses)
    logits = classify(moved, parameters, views)
    if len(moved):
        sums = torch.stack([as_rows(value.detach()).sum(1) for value in parameters.values()])
        usable[moved] &= sums.isfinite().all(0)
    # An image that is not trained costs one of the S + 1 evaluations of the loss.
    work = len(moved) + (len(images) - len(moved)) / losses.shape[1]
    return logits, losses, usable, work


def diverged(losses: Tensor) -> Tensor:
    """Find images ``(B,)`` whose losses ``(B, S + 1)`` are not finite or have exploded."""
    growth = losses[:, -1] - losses[:, 0]
    return ~losses.isfinite().all(1) | (growth > EXPLOSION * losses[:, 0].abs().clamp_min(1))
