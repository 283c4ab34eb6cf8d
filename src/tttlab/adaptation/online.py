"""Test-time training on a stream: parameters, optimiser and the method's state flow from one batch to the next.

The methods are those of the episodic protocol; what differs is who shares the weights. A method that is written for one image
sees every image of a batch on its own, and the step is taken on the mean of their losses; one that is written for a whole
batch (``whole_batch``) sees all its images together. Predictions are made batch by batch, after the batch's steps, and so the
moments of the normalisation policies ``image``, ``mixed`` and ``shrink`` are those of a whole batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from tttlab.adaptation.adapter import Adaptation, Curve
from tttlab.adaptation.checks import check
from tttlab.adaptation.inner_loop import (
    InnerLoop,
    Parameters,
    bind,
    loss_and_gradients,
    make_optimizer,
    over_images,
    update,
)
from tttlab.adaptation.method import Method
from tttlab.adaptation.normalisation import normalised
from tttlab.adaptation.predicting import draw_looks
from tttlab.adaptation.predicting import predict as predict_each
from tttlab.adaptation.task import Task
from tttlab.data.views import log_mean_probabilities
from tttlab.errors import UserError
from tttlab.networks.network import Bound, evaluating
from tttlab.networks.source_statistics import Statistics
from tttlab.seeding import torch_generator


def adapt_stream(
    network: nn.Module,
    images: Tensor,
    method: Method,
    loop: InnerLoop = InnerLoop(),
    *,
    batch_size: int = 64,
    statistics: Statistics | None = None,
    image_ids: Sequence[str | int] | None = None,
    seed: int = 0,
    record: Sequence[int] = (),
    on_images: Callable[[int], None] | None = None,
) -> Adaptation:
    """Adapt the network to one stream of images, from the source weights on, and predict with and without.

    Args:
        network: a `Network`, or any module from images to logits; it is left exactly as it was.
        images: ``(N, 3, H, W)`` in order of arrival, on any device.
        method: what to minimise.
        loop: how; ``steps`` are those on every batch.
        batch_size: most images of a batch.
        statistics: source statistics.
        image_ids: names of the images, which key their random streams.
        seed: of all random streams.
        record: of 0 (the source weights under the normalisation policy) and ``loop.steps``, those to predict after as well.
        on_images: called with the number of images done, after each batch.

    Returns:
        as `adapter.adapt`, but for ``losses (N, steps)``: before every step on the image's batch. A batch with a loss or
        a gradient that is not finite takes no further step (that loss stands for those that would have followed) and gets the
        source network's predictions; so does one whose step leaves weights that are not finite, and the next batch starts
        again from the source weights.

    Raises:
        UserError: the network, the statistics or the numbers of steps do not fit.
    """
    names = [str(name) for name in (range(len(images)) if image_ids is None else image_ids)]
    if not names:
        raise UserError("expected images, found none")
    parts = []
    bounds = np.array_split(np.arange(len(images)), math.ceil(len(images) / batch_size))
    check_batch(method, min(map(len, bounds)))
    task = Task(network, method, loop, statistics or {}, seed)
    with learning(task, images, record) as learner:
        for places in bounds:
            part = slice(places[0], places[-1] + 1)
            parts.append(learner.adapt(images[part], names[part]))
            if on_images:
                on_images(len(places))
    return joined(parts)


def check_batch(method: Method, count: int) -> None:
    """Raise a `UserError` if a batch of ``count`` images is smaller than the method can work on."""
    if count < method.smallest_batch:
        raise UserError(
            f"{method} needs batches of {method.smallest_batch} images or more, found one of {count}; "
            "give it larger ones, or use another method"
        )


def joined(parts: Sequence[Adaptation]) -> Adaptation:
    """Put the results of batches together, in their order."""
    return Adaptation(*(torch.cat(values) for values in zip(*parts, strict=True)))


@contextmanager
def learning(task: Task, images: Tensor, record: Sequence[int] = ()) -> Iterator["Learner"]:
    """Open a stream: what learns along it, one ``adapt(images, names)`` after another.

    The network is in evaluation mode as long as the stream is open.

    Args:
        task: what the images are adapted by.
        images: ``(N, 3, H, W)``, those of the first batch, to see whether the method fits.
        record: of 0 and ``loop.steps``, those to predict after as well.

    Raises:
        UserError: see `adapt_stream`.
    """
    if unknown := set(record) - {0, task.loop.steps}:
        raise UserError(
            f"record: a stream can be looked at after 0 and all {task.loop.steps} steps, found {sorted(unknown)}; "
            "another number of steps leads to other weights for the next batch"
        )
    task = task.ready(images.device)
    with evaluating(task.network):
        check(task.network, images[:2], task.method, task.loop, task.statistics, "online")
        yield Learner(task, record)


class Learner:
    """The network on its way along a stream.

    Its parameters are leaves ``(1, *shape)``: those of a group of one image, for the inner loop's functions.
    """

    def __init__(self, task: Task, record: Sequence[int] = ()) -> None:
        self.network, self.method, self.loop = task.network, task.method, task.loop
        self.statistics, self.seed = task.statistics, task.seed
        self.record = record
        self.state = self.first_state()
        if tree_leaves(self.state) and not self.method.whole_batch:
            raise UserError(
                f"{self.method} keeps a state for every image, which cannot flow along a stream; use protocol episodic"
            )
        self.net = bind(self.network, self.method, self.loop)
        moving = self.net.trained if self.loop.steps else {}
        self.parameters: Parameters = {
            name: value.unsqueeze(0).clone().requires_grad_() for name, value in moving.items()
        }
        self.optimizer = (
            make_optimizer(list(self.parameters.values()), self.loop) if moving else None
        )
        self.taken = 0  # steps

    def first_state(self) -> Any:
        """Give the method's state at the start of a stream."""
        device = next(self.network.parameters()).device
        return tree_map(lambda value: value.to(device), self.method.init_state())

    def adapt(self, images: Tensor, names: Sequence[str]) -> Adaptation:
        """Take the steps of a batch ``images (N, 3, H, W)`` and predict it with and without."""
        check_batch(self.method, len(images))
        with torch.no_grad():
            source = self.network(images).logits
        curve = Curve(self.record, images.device)
        looks = draw_looks(
            images, self.loop, [torch_generator(self.seed, "average", name) for name in names]
        )
        with normalised(self.network, self.loop, self.statistics):
            curve.note(0, lambda: self.predict({}, looks, names))
            losses, usable = self.train(images, names)
            logits = self.classify(looks, names)
        spent = curve.milliseconds | {self.loop.steps: curve.spent()}
        usable = usable & logits.isfinite().all(-1)
        logits = torch.where(usable[:, None], logits, source)
        at = curve.logits | {self.loop.steps: logits}
        logits_at = (
            torch.stack([at[step] for step in self.record], dim=1)
            if self.record
            else logits[:, None][:, :0]
        )
        cost = torch.tensor([spent[step] for step in (self.loop.steps, *self.record)]).expand(
            len(images), -1
        ) / len(images)
        return Adaptation(
            logits.cpu(),
            source.cpu(),
            losses.cpu(),
            ~usable.cpu(),
            cost[:, 0],
            logits_at.cpu(),
            cost[:, 1:],
        )

    def train(self, images: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Take the steps on one batch; → losses ``(N, steps)`` before each, and whether they could be taken ``(N,)``."""
        usable = torch.ones(len(images), dtype=torch.bool, device=images.device)
        if not self.parameters:
            return images.new_full((len(images), 1), float("nan")), usable  # nothing was measured
        curve = []
        for step in range(self.loop.steps):
            streams = [torch_generator(self.seed, "views", name, step) for name in names]
            views = self.method.views(self.network, images, streams)
            losses, gradients, state = loss_and_gradients(
                self.losses, self.parameters, views, self.state, self.method, self.loop.sharpness
            )
            curve.append(len(images) * losses.detach())
            if not all(part.isfinite().all() for part in (losses, *gradients.values())):
                usable[:] = False
                break
            if any(
                part.any() for part in gradients.values()
            ):  # where nothing is to be learnt, momentum must not roll on
                update(self.optimizer, self.parameters, gradients, self.loop.clip)
            if not all(value.isfinite().all() for value in self.parameters.values()):
                usable[:] = False
                self.restart()
                break
            self.state = state
            self.after_step()
        return torch.stack(curve + curve[-1:] * (self.loop.steps - len(curve)), dim=1), usable

    @torch.no_grad()
    def restart(self) -> None:
        """Go back to the source weights and the initial state: from weights that are not finite there is no way on."""
        for name, value in self.parameters.items():
            value[0].copy_(self.net.source[name])
        self.optimizer = make_optimizer(list(self.parameters.values()), self.loop)
        self.state = self.first_state()

    @torch.no_grad()
    def after_step(self) -> None:
        """Let the method have its word on the weights."""
        if type(self.method).after_step is Method.after_step:
            return
        own = {name: value[0] for name, value in self.parameters.items()}
        source = dict(self.net.trained)
        generator, self.taken = torch_generator(self.seed, "after_step", self.taken), self.taken + 1
        found, self.state = self.method.after_step(own, source, self.state, generator)
        for name, value in self.parameters.items():
            value[0].copy_(found[name])
        if all(found[name] is source[name] for name in own):
            self.optimizer = make_optimizer(
                list(self.parameters.values()), self.loop
            )  # with no momentum of what is undone

    def losses(self, parameters: Parameters, views: Any, state: Any) -> tuple[Tensor, Any]:
        """Compute every image's share ``(N,)`` of the loss to minimise, which is their sum, and the next state."""
        count = len(tree_leaves(views)[0])
        if self.method.whole_batch:
            together = tree_map(lambda part: part.flatten(0, 1), views)
            loss, state = self.method.loss(self.bound(parameters), together, self.statistics, state)
            return loss.expand(count) / count, state

        def one(parameters: Parameters, views: Any) -> Tensor:
            return self.method.loss(self.net.rebound(parameters), views, self.statistics, ())[0]

        return over_images(one)(self.shared(parameters, count), views) / count, state

    @torch.no_grad()
    def classify(self, looks: Tensor, names: Sequence[str]) -> Tensor:
        """Classify a batch after its steps; a method's own way may change its state: ``(N, K)``."""
        if type(self.method).predict_batch is Method.predict_batch:
            return self.predict(self.parameters, looks, names)
        net = self.bound(self.parameters)
        logits, self.state = self.method.predict_batch(
            net, looks[:, 0], self.statistics, self.state
        )
        return logits

    @torch.no_grad()
    def predict(self, parameters: Parameters, looks: Tensor, names: Sequence[str]) -> Tensor:
        """Classify a batch ``looks (N, 1 + A, 3, H, W)``, all its images together: ``(N, K)``."""
        if type(self.method).predict is not Method.predict:
            streams = [torch_generator(self.seed, "views", name, 0) for name in names]
            views, own = (
                self.method.views(self.network, looks[:, 0], streams),
                self.shared(parameters, len(looks)),
            )
            return predict_each(self.net, own, looks, views, self.method, self.statistics)
        logits = self.bound(parameters)(looks.flatten(0, 1)).logits.unflatten(0, looks.shape[:2])
        return vmap(log_mean_probabilities)(logits) if looks.shape[1] > 1 else logits[:, 0]

    def bound(self, parameters: Parameters) -> Bound:
        """Bind the network to the stream's parameters."""
        return self.net.rebound({name: value[0] for name, value in parameters.items()})

    @staticmethod
    def shared(parameters: Parameters, count: int) -> Parameters:
        """Give the same parameters to every image of a batch, without copying them."""
        return {name: value.expand(count, *value.shape[1:]) for name, value in parameters.items()}
