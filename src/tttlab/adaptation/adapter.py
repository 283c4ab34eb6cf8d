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
from torch.nn.modules.batchnorm import _BatchNorm

from tttlab.adaptation.inner_loop import InnerLoop, Parameters, bind, over_images, train
from tttlab.adaptation.method import Method
from tttlab.adaptation.normalisation import normalised
from tttlab.data.views import log_mean_probabilities, random_views
from tttlab.errors import UserError
from tttlab.networks.classifiers import as_network
from tttlab.networks.gradients import rows
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import Statistics, kinds
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
    network = as_network(network)
    statistics = {name: value.to(images.device) for name, value in (statistics or {}).items()}
    sizes = images_per_step if isinstance(images_per_step, GroupSize) else GroupSize(images_per_step)
    names = [str(name) for name in (range(len(images)) if image_ids is None else image_ids)]
    if not names:
        raise UserError("expected images, found none")
    parts: list[Adaptation] = []
    with evaluating(network):
        check(network, images[:2], method, loop, statistics)
        while (done := sum(len(part.logits) for part in parts)) < len(images):
            with sizes.open(len(images) - done, images.device) as group:
                part = slice(done, done + group.size)
                result, group.work = adapt_together(network, images[part], method, loop, statistics, names[part], seed, record)
                parts.append(result)
                if on_images:
                    on_images(group.size)
    return Adaptation(*(torch.cat(values) for values in zip(*parts, strict=True)))


def adapt_together(
    network: nn.Module,
    images: Tensor,
    method: Method,
    loop: InnerLoop,
    statistics: Statistics,
    names: list[str],
    seed: int,
    record: Sequence[int] = (),
) -> tuple[Adaptation, float]:
    """Adapt one group of ``B`` images, each on its own; → results, and the work as a number of images (see `Group`)."""
    net = bind(network, method, loop)
    if leaves_alone(net, method, loop):
        return unadapted(net, images, record), len(images)
    source_logits = predict_by_source(net, images)
    curve = Curve(record, images.device)
    streams = [[torch_generator(seed, "views", name, step) for name in names] for step in range(max(loop.steps, 1))]
    looks = draw_looks(images, loop, [torch_generator(seed, "average", name) for name in names])
    with normalised(network, loop.normalisation, statistics):
        if net.trained and loop.steps:
            logits, losses, usable, work = train_and_predict(net, images, looks, method, loop, statistics, streams, curve)
        else:
            views = method.views(network, images, streams[0])
            logits = predict(net, {}, looks, views, method, statistics)
            losses = images.new_full((len(images), 1), float("nan"))  # nothing was measured
            usable, work = torch.ones(len(images), dtype=torch.bool, device=images.device), len(images)
    usable &= logits.isfinite().all(-1)
    logits = torch.where(usable[:, None], logits, source_logits)
    cost = torch.full((len(images),), curve.spent() / len(images))
    logits_at, milliseconds_at = curve.collect(logits, source_logits, losses)
    return Adaptation(logits.cpu(), source_logits.cpu(), losses.cpu(), ~usable.cpu(), cost, logits_at, milliseconds_at), work


def leaves_alone(net: Bound, method: Method, loop: InnerLoop) -> bool:
    """Tell whether predictions are the source network's: nothing is trained, normalised otherwise, averaged or corrected."""
    plain = type(method).predict is Method.predict and loop.normalisation.policy == "source" and not loop.average
    return plain and not (net.trained and loop.steps)


def unadapted(net: Bound, images: Tensor, record: Sequence[int]) -> Adaptation:
    """Classify images ``(B, 3, H, W)`` once, for with and without are the same; the clock runs."""
    curve = Curve(record, images.device)
    logits = predict_by_source(net, images)
    cost = torch.full((len(images),), curve.spent() / len(images))
    losses = images.new_full((len(images), 1), float("nan"))  # nothing was measured
    at = curve.collect(logits, logits, losses)
    return Adaptation(logits.cpu(), logits.cpu(), losses.cpu(), ~logits.isfinite().all(-1).cpu(), cost, *at)


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
    images: Tensor,
    looks: Tensor,
    method: Method,
    loop: InnerLoop,
    statistics: Statistics,
    streams: Sequence[Sequence[torch.Generator]],
    curve: Curve,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Train a group and classify it: logits ``(B, K)``, losses ``(B, S + 1)``, where they can be used ``(B,)``, the work."""

    def classify(moved: Tensor, parameters: Parameters, views: Any) -> Tensor:
        if len(moved) == len(images):
            return predict(net, parameters, looks, views, method, statistics)
        logits = predict(net, {}, looks, images.unsqueeze(1), method, statistics)  # then these are the views
        if not len(moved):
            return logits
        return logits.index_copy(0, moved, predict(net, parameters, looks[moved], views, method, statistics))

    def observe(step: int, *trained: Any) -> None:
        curve.note(step, lambda: classify(*trained))

    moved, parameters, views, losses = train(net, images, method, loop, statistics, streams, observe)
    usable = ~diverged(losses)
    logits = classify(moved, parameters, views)
    if len(moved):
        finite = torch.stack([rows(value.detach()).sum(1) for value in parameters.values()]).isfinite().all(0)
        usable[moved] &= finite
    work = len(moved) + (len(images) - len(moved)) / losses.shape[1]
    return logits, losses, usable, work


@torch.no_grad()
def predict(
    net: Bound,
    parameters: Parameters,
    looks: Tensor,
    views: Any,
    method: Method,
    statistics: Statistics,
) -> Tensor:
    """Classify every image with its own parameters: logits ``(B, K)``.

    Args:
        net: the source network, as `bind` binds it.
        parameters: name → ``(B, *shape)``; those that are not among them are the source network's.
        looks: the image and the views to average over ``(B, 1 + A, 3, H, W)``; with A > 0 the result are log-probabilities.
        views: what the method drew last, None if it needs none.
        method: whose prediction it is, unless views are averaged.
        statistics: source statistics.
    """

    def one(parameters: dict[str, Tensor], looks: Tensor, views: Any) -> Tensor:
        own = net.rebound(parameters)
        if len(looks) > 1:
            return log_mean_probabilities(own(looks).logits)
        return method.predict(own, looks[0], views, statistics)

    return over_images(one, in_dims=(0, 0, None if views is None else 0))(parameters, looks, views)


def draw_looks(images: Tensor, loop: InnerLoop, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw what predictions look at: every image itself, and the views to average over ``(B, 1 + A, 3, H, W)``."""
    looks = images.unsqueeze(1)
    if not loop.average:
        return looks
    return torch.cat([looks, random_views(images, generators, loop.average, loop.augmentation)], dim=1)


def diverged(losses: Tensor) -> Tensor:
    """Find images ``(B,)`` whose loss curve ``(B, S + 1)`` is not finite or has exploded."""
    growth = losses[:, -1] - losses[:, 0]
    return ~losses.isfinite().all(1) | (growth > EXPLOSION * losses[:, 0].abs().clamp_min(1))


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given, so that the clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check(
    network: nn.Module,
    images: Tensor,
    method: Method,
    loop: InnerLoop,
    statistics: Statistics,
    protocol: str = "episodic",
) -> None:
    """Refuse what cannot be adapted, before any work.

    Raises:
        UserError: the protocol, the statistics or the network do not fit.
    """
    if protocol not in method.protocols:
        raise UserError(f"{method} is defined for {' and '.join(method.protocols)}, found {protocol}; "
                        f"use tttlab.{'online.adapt_stream' if protocol == 'episodic' else 'adapter.adapt'}")  # fmt: skip
    check_precision(network, images, bind(network, method, loop) if loop.steps else Bound(network, {}))
    method.check(network)
    own = type(method)
    if loop.average and (own.predict is not Method.predict or own.predict_batch is not Method.predict_batch):
        raise UserError(f"average: {loop.average} views cannot replace the prediction that {method} makes itself; set it to 0")
    if missing := set(method.needs) - kinds(statistics):
        raise UserError(f"{method} needs source statistics of the kind {', '.join(sorted(missing))}; measure them with "
                        "its source_statistics or with tttlab.networks.source_statistics")  # fmt: skip
    unknown = [layer for layer in loop.normalisation.layers(network) if f"{layer}.mean_center" not in statistics]
    if unknown:
        raise UserError(f"normalisation {loop.normalisation.policy!r} needs source statistics of {len(unknown)} layers that "
                        f"have none, such as {unknown[0]}; see tttlab.networks.source_statistics.layer_statistics")  # fmt: skip
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and not module.track_running_stats:
            raise UserError(
                f"layer {name} has no running statistics, so that a prediction depends on the other images of its "
                "batch; load the backbone with running statistics or with GroupNorm"
            )
    if len(images):
        check_forward(network, images, method, loop, protocol)


def check_precision(network: nn.Module, images: Tensor, net: Bound) -> None:
    """Refuse images of another dtype than the network's, and training in one so coarse that small steps are rounded away."""
    coarse = sorted({str(value.dtype) for value in net.trained.values()} & {"torch.float16", "torch.bfloat16"})
    if coarse:
        raise UserError(f"the parameters to be trained are {coarse[0]}, in which small steps are rounded away; make it "
                        "float(), and for speed adapt under torch.autocast")  # fmt: skip
    known = {value.dtype for value in network.parameters() if value.is_floating_point()}
    converted = torch.is_autocast_enabled(images.device.type) and images.is_floating_point()
    if known and images.dtype not in known and not converted:
        raise UserError(f"expected images of {min(map(str, known))}, as the network's parameters are, found {images.dtype}; "
                        "convert one of them")  # fmt: skip


@torch.no_grad()
def check_forward(network: nn.Module, images: Tensor, method: Method, loop: InnerLoop, protocol: str) -> None:
    """Refuse networks that do not do with one or two images what the method and the adapter ask of them."""
    kind = type(network.encoder).__name__
    if method.features and network(images[:1]).features is None:
        raise UserError(f"{method} looks at features (N, D), and none are known of this {kind}; name the layer that gives "
                        "them: tttlab.networks.classifiers.Classifier(model, features='name')")  # fmt: skip
    if len(images) == 2 and not torch.allclose(network(images).logits[:1], network(images[:1]).logits, atol=1e-3, rtol=1e-3):
        raise UserError(f"the predictions of this {kind} depend on the other images of a batch; per-image adaptation needs a "
                        "backbone without batch-dependent layers")  # fmt: skip
    if protocol == "online" and not method.whole_batch:
        predict_by_source(bind(network, method, loop), images[:1])


def predict_by_source(net: Bound, images: Tensor) -> Tensor:
    """Classify images ``(B, C, H, W)`` by the source network, each on its own: logits ``(B, K)``.

    Raises:
        UserError: the network cannot be vectorised over images.
    """
    try:
        return predict(net, {}, images.unsqueeze(1), None, Method(), {})
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if "vmap" not in reason and "batching rule" not in reason.lower():
            raise
        raise UserError(f"this {type(net.module.encoder).__name__} cannot be called for many images at once, as per-image "
                        f"adaptation does ({reason}); its forward must not branch on values, draw random numbers or write to "
                        "buffers") from error  # fmt: skip
