"""Test-time training of many images at once, each on its own.

Every image starts from the source weights, takes optimiser steps on its own loss, and is classified
by its own weights. Images are grouped only to use the processor fully; see
`tttlab.adaptation.inner_loop`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tttlab.adaptation.checks import check
from tttlab.adaptation.curve import Curve, diverged, finite, where
from tttlab.adaptation.inner_loop import Parameters, train
from tttlab.adaptation.method import Method, overrides
from tttlab.adaptation.normalisation import normalised
from tttlab.adaptation.predicting import CLASSES, Readout, predict, predict_by_source
from tttlab.adaptation.task import Task
from tttlab.adaptation.trainable import bind
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.networks.gradients import as_rows, with_gradients
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import Statistics
from tttlab.runtime.group_size import GroupSize, Wish, as_sizes
from tttlab.seeding import torch_generator


class Adaptation(NamedTuple):
    """Results for ``N`` images after S steps, on the CPU.

    Where a `Readout` predicts something else than classes, it stands in place of the logits, with
    dimensions of its own in place of K.

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


@with_gradients
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
    readout: Readout = CLASSES,
    checked: bool = False,
) -> Adaptation:
    """Adapt the network to every image on its own, and predict with and without.

    Args:
        network: a `Network`, or any module from images to logits (see
            `tttlab.networks.classifiers`); it is not changed.
        images: ``(N, 3, H, W)`` on any device: in [0, 1] for a `Network`, preprocessed for any
            other module; or whatever method and readout take.
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
        readout: says what a prediction is.
        checked: whether an earlier call has taken the same network, method and loop.

    Returns:
        logits, losses and cost per image.

    Raises:
        UserError: the network or the statistics do not fit the method, or predictions depend on the
            other images in a batch.
    """
    task = Task(network, method, loop, statistics or {}, seed, readout).ready(images.device)
    sizes = as_sizes(images_per_step)
    names = [str(name) for name in (range(len(images)) if image_ids is None else image_ids)]
    if not names:
        raise UserError("expected images, found none")
    results: list[Adaptation] = []
    with evaluating(task.network):
        if not checked:
            check(task.network, images[:2], method, loop, task.statistics, readout=readout)
        while (done := sum(len(result.losses) for result in results)) < len(images):
            # A group that runs out of memory adds no results, and the next one is smaller.
            with sizes.open(len(images) - done, images.device) as group:
                part = slice(done, done + group.size)
                result, group.work = adapt_together(task, images[part], names[part], record)
                results.append(result)
                if on_images:
                    on_images(group.size)
    return joined(results)


def joined(parts: Sequence[Adaptation]) -> Adaptation:
    """Join the results of groups or batches, in their order."""
    return Adaptation(*(torch.cat(values) for values in zip(*parts, strict=True)))


def adapt_together(
    task: Task, images: Tensor, names: Sequence[str], record: Sequence[int] = ()
) -> tuple[Adaptation, float]:
    """Adapt one group of B images, each on its own.

    Returns:
        results, and the work in images; see `tttlab.runtime.group_size.Group`.
    """
    network, method, loop, seed = task.network, task.method, task.loop, task.seed
    net, readout = bind(network, method, loop), task.readout

    def draw_looks(loop: InnerLoop) -> Any:
        generators = [torch_generator(seed, "average", name) for name in names]
        return readout.looks(images, loop, generators)

    plain_looks = draw_looks(replace(loop, average=0))
    if leaves_alone(net, method, loop):
        return unadapted(net, plain_looks, record, task), len(images)
    # Before a plain prediction's first step it is the source network's: made once, for the record.
    once = 0 in record and predicts_plainly(method, loop)
    source_logits = None if once else predict_by_source(net, plain_looks, readout)
    curve = Curve(record, images.device)
    if once:
        curve.note(0, lambda: predict_by_source(net, plain_looks, readout))
        source_logits = curve.logits[0]
    looks = draw_looks(loop)
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
    usable &= finite(logits)
    logits = where(usable, logits, source_logits)
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
    return predicts_plainly(method, loop) and not (net.trained and loop.steps)


def predicts_plainly(method: Method, loop: InnerLoop) -> bool:
    """Tell whether only trained weights can make a prediction differ from the source network's."""
    return not overrides(method, "predict") and loop.normalisation == "source" and not loop.average


def unadapted(net: Bound, looks: Any, record: Sequence[int], task: Task) -> Adaptation:
    """Predict once, where adaptation changes nothing; this is timed."""
    curve = Curve(record, tree_leaves(looks)[0].device)
    logits = predict_by_source(net, looks, task.readout)
    cost = torch.full((len(logits),), curve.spent() / len(logits))
    losses = unmeasured(logits)
    recorded = curve.collect(logits, logits, losses)
    unusable = ~finite(logits)
    return Adaptation(logits.cpu(), logits.cpu(), losses.cpu(), unusable.cpu(), cost, *recorded)


def unmeasured(logits: Tensor) -> Tensor:
    """Give losses ``(B, 1)`` of images that were not trained on."""
    return logits.new_full((len(logits), 1), float("nan"))


def predict_untrained(
    net: Bound, task: Task, looks: Any, views: Any
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Predict for a group without training; returns what `train_and_predict` does."""
    logits = predict(net, {}, looks, views, task.method, task.statistics, task.readout)
    usable = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    return logits, unmeasured(logits), usable, len(logits)


def train_and_predict(
    net: Bound,
    task: Task,
    images: Tensor,
    looks: Any,
    streams: Sequence[Sequence[torch.Generator]],
    curve: Curve,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Train a group of images, then predict for them.

    Args:
        net: the source network, bound.
        task: method, settings of the steps and source statistics.
        images: ``(B, 3, H, W)``.
        looks: what predictions look at, ``(B, 1 + A, 3, H, W)`` where they are classes.
        streams: for every step a random stream per image.
        curve: records predictions after some steps.

    Returns:
        logits ``(B, K)``, losses ``(B, S + 1)``, whether the logits can be used ``(B,)``, and the
        work in images.
    """
    method, loop, statistics, readout = task.method, task.loop, task.statistics, task.readout

    def classify(moved: Tensor, parameters: Parameters, views: Any) -> Tensor:
        if len(moved) == len(images):
            return predict(net, parameters, looks, views, method, statistics, readout)
        # Only a method that draws no views leaves images out of the training.
        plain_views = images.unsqueeze(1)
        source_logits = predict(net, {}, looks, plain_views, method, statistics, readout)
        if not len(moved):
            return source_logits
        looked_at = tree_map(lambda part: part[moved], looks)
        trained_logits = predict(net, parameters, looked_at, views, method, statistics, readout)
        return source_logits.index_copy(0, moved, trained_logits)

    def observe(step: int, *trained: Any) -> None:
        curve.note(step, lambda: classify(*trained))

    moved, parameters, views, losses = train(
        net, images, method, loop, statistics, streams, observe
    )
    usable = ~diverged(losses)
    logits = curve.after_all(loop.steps, lambda: classify(moved, parameters, views))
    if len(moved):
        sums = torch.stack([as_rows(value.detach()).sum(1) for value in parameters.values()])
        usable[moved] &= sums.isfinite().all(0)
    # An image that is not trained costs one of the S + 1 evaluations of the loss.
    work = len(moved) + (len(images) - len(moved)) / losses.shape[1]
    return logits, losses, usable, work
