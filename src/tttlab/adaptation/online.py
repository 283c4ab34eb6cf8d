"""Test-time training on a stream: each batch starts from the weights that the last one left.

The optimiser and the method's state are carried on too. All images of a batch share the weights. A
method written for single images computes its loss for each image, and the steps minimise the mean;
a method written for batches (``whole_batch``) sees all images together. Predictions are made after
the batch's steps, for all its images together. So the moments that the normalisation policies
``image``, ``mixed`` and ``shrink`` use are those of the batch.
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

from tttlab.adaptation import predicting
from tttlab.adaptation.adapter import Adaptation, joined
from tttlab.adaptation.checks import check
from tttlab.adaptation.curve import Curve
from tttlab.adaptation.inner_loop import (
    Parameters,
    loss_and_gradients,
    make_optimizer,
    over_images,
    update,
)
from tttlab.adaptation.method import Method, first_state, overrides
from tttlab.adaptation.normalisation import normalised
from tttlab.adaptation.task import Task
from tttlab.adaptation.trainable import bind
from tttlab.config.inner_loop import InnerLoop
from tttlab.data.views import log_mean_probabilities
from tttlab.errors import UserError
from tttlab.networks.gradients import with_gradients
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
    """Adapt the network along a stream, from the source weights on; predict with and without.

    A batch with a loss or a gradient that is not finite takes no further step and keeps the source
    network's predictions. So does a batch whose step makes weights that are not finite; the next
    batch then starts from the source weights.

    Args:
        network: a `Network`, or any module from images to logits; it is not changed.
        images: ``(N, 3, H, W)`` in order of arrival, on any device.
        method: gives the loss.
        loop: settings of the steps; ``steps`` are taken on every batch.
        batch_size: most images of a batch.
        statistics: source statistics.
        image_ids: names of the images, which key their random streams.
        seed: of all random streams.
        record: numbers of steps after which to predict as well: 0 (the source weights under the
            normalisation policy) or ``loop.steps``.
        on_images: called after each batch, with the number of its images.

    Returns:
        what `tttlab.adaptation.adapter.adapt` returns, except ``losses (N, steps)``: before every
        step on the image's batch. Where steps are missing, the last loss is repeated.

    Raises:
        UserError: the network, the statistics or the numbers of steps do not fit.
    """
    names = [str(name) for name in (range(len(images)) if image_ids is None else image_ids)]
    if not names:
        raise UserError("expected images, found none")
    results = []
    batches = np.array_split(np.arange(len(images)), math.ceil(len(images) / batch_size))
    check_batch(method, min(map(len, batches)))
    task = Task(network, method, loop, statistics or {}, seed)
    with learning(task, images, record) as learner:
        for positions in batches:
            part = slice(positions[0], positions[-1] + 1)
            results.append(learner.adapt(images[part], names[part]))
            if on_images:
                on_images(len(positions))
    return joined(results)


def check_batch(method: Method, count: int) -> None:
    """Raise a `UserError` if a batch of ``count`` images is too small for the method."""
    if count < method.smallest_batch:
        raise UserError(
            f"{method} needs batches of {method.smallest_batch} images or more, found one of "
            f"{count}; give it larger ones, or use another method"
        )


@contextmanager
def learning(task: Task, images: Tensor, record: Sequence[int] = ()) -> Iterator["Learner"]:
    """Open a stream, to call `Learner.adapt` on one batch after the other.

    The network is in evaluation mode as long as the stream is open.

    Args:
        task: what the images are adapted by.
        images: ``(N, 3, H, W)`` of the first batch, to check whether the method fits.
        record: numbers of steps after which to predict as well, 0 or ``loop.steps``.

    Raises:
        UserError: see `adapt_stream`.
    """
    if unknown := set(record) - {0, task.loop.steps}:
        raise UserError(
            f"record: a stream can be looked at after 0 and all {task.loop.steps} steps, found "
            f"{sorted(unknown)}; another number of steps leads to other weights for the next batch"
        )
    task = task.ready(images.device)
    with evaluating(task.network):
        check(task.network, images[:2], task.method, task.loop, task.statistics, "online")
        yield Learner(task, record)


class Learner:
    """The network on its way along a stream.

    Its parameters are leaves ``(1, *shape)``: the inner loop's functions see a group of one image.
    """

    @with_gradients
    def __init__(self, task: Task, record: Sequence[int] = ()) -> None:
        self.network, self.method, self.loop = task.network, task.method, task.loop
        self.statistics, self.seed = task.statistics, task.seed
        self.record = record
        self.state = self.first_state()
        if tree_leaves(self.state) and not self.method.whole_batch:
            raise UserError(
                f"{self.method} keeps a state for every image, which cannot flow along a stream; "
                "use protocol episodic"
            )
        self.net = bind(self.network, self.method, self.loop)
        trained = self.net.trained if self.loop.steps else {}
        self.parameters: Parameters = {
            name: value.unsqueeze(0).clone().requires_grad_() for name, value in trained.items()
        }
        self.optimizer = self.fresh_optimizer() if trained else None
        self.steps_taken = 0

    def first_state(self) -> Any:
        """Make the method's state at the start of a stream."""
        return first_state(self.method, next(self.network.parameters()).device)

    def fresh_optimizer(self) -> torch.optim.Optimizer:
        """Make an optimiser without momentum from earlier steps."""
        return make_optimizer(list(self.parameters.values()), self.loop)

    @with_gradients
    def adapt(self, images: Tensor, names: Sequence[str]) -> Adaptation:
        """Take the steps of a batch ``images (N, 3, H, W)``; predict it with and without."""
        check_batch(self.method, len(images))
        with torch.no_grad():
            source_logits = self.network(images).logits
        curve = Curve(self.record, images.device)
        average = [torch_generator(self.seed, "average", name) for name in names]
        looks = predicting.CLASSES.looks(images, self.loop, average)
        with normalised(self.network, self.loop, self.statistics, batch_size=len(images)):
            curve.note(0, lambda: self.predict({}, looks, names))
            losses, usable = self.train(images, names)
            logits = self.classify(looks, names)
        milliseconds = curve.milliseconds | {self.loop.steps: curve.spent()}
        usable = usable & logits.isfinite().all(-1)
        logits = torch.where(usable[:, None], logits, source_logits)
        predicted = [(curve.logits | {self.loop.steps: logits})[step] for step in self.record]
        recorded = [torch.where(p.isfinite().all(-1, True), p, source_logits) for p in predicted]
        logits_at = torch.stack(recorded, dim=1) if recorded else logits.unsqueeze(1)[:, :0]
        cost = torch.tensor([milliseconds[step] for step in (self.loop.steps, *self.record)])
        cost = cost.expand(len(images), -1) / len(images)
        return Adaptation(
            logits=logits.cpu(),
            source_logits=source_logits.cpu(),
            losses=losses.cpu(),
            fell_back=~usable.cpu(),
            milliseconds=cost[:, 0],
            logits_at=logits_at.cpu(),
            milliseconds_at=cost[:, 1:],
        )

    def train(self, images: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Take the steps on one batch.

        Returns:
            losses ``(N, steps)`` before every step, and whether all steps succeeded ``(N,)``.
        """
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
            # Without any gradient there is no step: momentum alone must not move the weights.
            if any(gradient.any() for gradient in gradients.values()):
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
        """Go back to the source weights and the first state, after weights that are not finite."""
        for name, value in self.parameters.items():
            value[0].copy_(self.net.source[name])
        self.optimizer = self.fresh_optimizer()
        self.state = self.first_state()

    @torch.no_grad()
    def after_step(self) -> None:
        """Let the method change the weights."""
        if not overrides(self.method, "after_step"):
            return
        current = {name: value[0] for name, value in self.parameters.items()}
        source = dict(self.net.trained)
        generator = torch_generator(self.seed, "after_step", self.steps_taken)
        self.steps_taken += 1
        changed, self.state = self.method.after_step(current, source, self.state, generator)
        for name, value in self.parameters.items():
            value[0].copy_(changed[name])
        if all(changed[name] is source[name] for name in current):
            self.optimizer = self.fresh_optimizer()  # all steps are undone, so is their momentum

    def losses(self, parameters: Parameters, views: Any, state: Any) -> tuple[Tensor, Any]:
        """Compute every image's share ``(N,)`` of the batch's loss, and the next state."""
        count = len(tree_leaves(views)[0])
        if self.method.whole_batch:
            views = tree_map(lambda part: part.flatten(0, 1), views)
            loss, state = self.method.loss(self.bound(parameters), views, self.statistics, state)
            return loss.expand(count) / count, state

        def loss_of_image(parameters: Parameters, views: Any) -> Tensor:
            return self.method.loss(self.net.rebound(parameters), views, self.statistics, ())[0]

        return over_images(loss_of_image)(self.shared(parameters, count), views) / count, state

    @torch.no_grad()
    def classify(self, looks: Tensor, names: Sequence[str]) -> Tensor:
        """Classify a batch after its steps: ``(N, K)``; the method's hook may change its state."""
        if not overrides(self.method, "predict_batch"):
            return self.predict(self.parameters, looks, names)
        net = self.bound(self.parameters)
        logits, self.state = self.method.predict_batch(
            net, looks[:, 0], self.statistics, self.state
        )
        return logits

    @torch.no_grad()
    def predict(self, parameters: Parameters, looks: Tensor, names: Sequence[str]) -> Tensor:
        """Classify a batch ``looks (N, 1 + A, 3, H, W)``: ``(N, K)``.

        Its images are classified together, unless the method predicts image by image itself.
        """
        if overrides(self.method, "predict"):
            streams = [torch_generator(self.seed, "views", name, 0) for name in names]
            views = self.method.views(self.network, looks[:, 0], streams)
            shared = self.shared(parameters, len(looks))
            return predicting.predict(self.net, shared, looks, views, self.method, self.statistics)
        logits = self.bound(parameters)(looks.flatten(0, 1)).logits.unflatten(0, looks.shape[:2])
        return vmap(log_mean_probabilities)(logits) if looks.shape[1] > 1 else logits[:, 0]

    def bound(self, parameters: Parameters) -> Bound:
        """Bind the network to the stream's parameters."""
        return self.net.rebound({name: value[0] for name, value in parameters.items()})

    @staticmethod
    def shared(parameters: Parameters, count: int) -> Parameters:
        """Give the same parameters to every image of a batch, without copying them."""
        return {name: value.expand(count, *value.shape[1:]) for name, value in parameters.items()}
