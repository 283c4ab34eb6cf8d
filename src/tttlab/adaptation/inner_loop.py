"""The inner loop: the optimiser steps of a group of images, each with its own parameters.

The trained parameters are stacked as leaves ``(B, *shape)``, and ``torch.func.vmap`` vectorises the
loss over images. Each image's loss depends on its own slice of the leaves alone. So one backward
pass through the sum of the losses and one elementwise optimiser step serve all images.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from tttlab.adaptation.method import Method, first_states, overrides
from tttlab.adaptation.per_image import PerImageLayers
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.networks.gradients import as_rows, clip_gradients, norms, present_gradients, scale
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics

Parameters = dict[str, Tensor]
Observer = Callable[[int, Tensor, Parameters, Any], None]


class Trained(NamedTuple):
    """A group of B images after S steps.

    An image that has no gradient in the first step and can get none later is not trained.

    Attributes:
        moved: ``(M,)``, positions of the trained images in the group, in order.
        parameters: of the trained images, name → ``(M, *shape)``. Parameters that never had a
            gradient are left out: they are the source network's.
        views: of the trained images, those of the first step, which every prediction looks at: else
            what the steps change would be partly what another draw changes. None where the method
            makes no prediction of its own.
        losses: ``(B, S + 1)`` of all images, before every step and after the last.
    """

    moved: Tensor
    parameters: Parameters
    views: Any
    losses: Tensor


def train(
    net: Bound,
    images: Tensor,
    method: Method,
    loop: InnerLoop,
    statistics: Statistics,
    streams: Sequence[Sequence[torch.Generator]],
    observe: Observer = lambda _step, _moved, _parameters, _views: None,
) -> Trained:
    """Train a group of images, each on its own.

    Args:
        net: the source network, in evaluation mode, from `tttlab.adaptation.trainable.bind`.
        images: ``(B, 3, H, W)``, or whatever the method's views are drawn from.
        method: gives the loss.
        loop: settings of the steps.
        statistics: source statistics.
        streams: for every step a random stream per image.
        observe: called with the number of steps taken and the ``moved``, ``parameters`` and
            ``views`` of `Trained`: before the first step, without parameters, and after every step.

    Raises:
        UserError: no trainable parameter influences the loss.
    """

    def loss(parameters: Parameters, views: Any, state: Any) -> tuple[Tensor, Any]:
        return method.loss(net.rebound(parameters), views, statistics, state)

    losses_of, stacked = over_images(loss), Stacked(net.trained, len(images), loop)
    state = first_states(method, images)
    same_views, stateless = not overrides(method, "views"), not tree_leaves(state)
    moved = torch.arange(len(images), device=images.device)
    views = method.views(net.module, images, streams[0])
    observe(0, moved, {}, views)
    losses, gradients, state = loss_and_gradients(
        losses_of, stacked.values, views, state, method, loop.sharpness
    )
    if same_views and stateless and not tree_leaves(state):
        # The loss depends on the image and its weights alone, and a step without a gradient does
        # not change the weights. So an image that has no gradient now never gets one.
        moved = have_gradient(gradients).nonzero().flatten()
        views, gradients = tree_map(lambda part: part[moved], (views, gradients))
        stacked = Stacked(net.trained, len(moved), loop)
    first, curve = views if overrides(method, "predict") else None, [losses.detach()]
    stacked.step(gradients)
    del gradients  # as large as all images' weights
    observe(1, moved, stacked.copies, first)
    for step, generators in enumerate(streams[1:] if len(moved) else [], start=2):
        views = views if same_views else method.views(net.module, images, generators)
        losses, gradients, state = loss_and_gradients(
            losses_of, stacked.values, views, state, method, loop.sharpness
        )
        curve.append(curve[0].index_copy(0, moved, losses.detach()))
        stacked.step(gradients)
        observe(step, moved, stacked.copies, first)
    if len(moved):
        with torch.no_grad():
            curve.append(curve[0].index_copy(0, moved, losses_of(stacked.values, views, state)[0]))
    curves = torch.stack(curve, dim=1).expand(-1, len(streams) + 1)
    return Trained(moved, stacked.copies, first, curves)


def have_gradient(gradients: Parameters) -> Tensor:
    """Tell which images ``(B,)`` have a gradient other than zero."""
    return torch.stack([as_rows(gradient).any(1) for gradient in gradients.values()]).any(0)


class Stacked:
    """The trainable parameters of a group of B images, and their optimiser.

    Before its first gradient a parameter is not copied: all images share the source's memory.

    Attributes:
        values: name → ``(B, *shape)``, all parameters.
        copies: those of them that have had a gradient, with memory of their own for every image.
    """

    def __init__(self, source: Mapping[str, Tensor], count: int, loop: InnerLoop) -> None:
        self.values: Parameters = {
            name: value.expand(count, *value.shape).requires_grad_()
            for name, value in source.items()
        }
        self.copies: Parameters = {}
        self._loop, self._optimizer, self._steps = loop, None, 0

    def step(self, gradients: Parameters) -> None:
        """Take a step; a parameter may have no gradient, in this step or ever."""
        fresh = [name for name in gradients if name not in self.copies]
        for name in fresh:
            copy = torch.empty_like(gradients[name]).copy_(self.values[name].detach())
            self.copies[name] = copy.requires_grad_()
        self.values |= self.copies
        leaves = [self.copies[name] for name in fresh]
        if self._optimizer is None:
            self._optimizer = make_optimizer(leaves, self._loop)
        elif leaves:
            self._optimizer.add_param_group({"params": leaves})
        self._steps += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self._loop.rate(self._steps)
        # A loss that has reached zero asks for no step, and momentum alone would take one.
        remembers = self._steps > 1 and (self._loop.optimizer == "adam" or self._loop.momentum > 0)
        still = (~have_gradient(gradients)).nonzero().flatten() if remembers else ()
        before = {name: value.detach()[still] for name, value in self.copies.items() if len(still)}
        update(self._optimizer, self.copies, gradients, self._loop.clip)
        with torch.no_grad():
            for name, values in before.items():
                self.copies[name][still] = values


def over_images(function: Callable[..., Any], in_dims: Any = 0) -> Callable[..., Any]:
    """Vectorise a function of one image's parameters and data over images.

    The function must not draw random numbers; ``in_dims`` is that of `torch.func.vmap`.
    """
    vectorised = vmap(function, in_dims=in_dims, randomness="error")

    def call(*arguments: Any) -> Any:
        with PerImageLayers():
            return vectorised(*arguments)

    return call


def loss_and_gradients(
    losses_of: Callable[[Parameters, Any, Any], tuple[Tensor, Any]],
    parameters: Parameters,
    views: Any,
    state: Any,
    method: Method,
    sharpness: float,
) -> tuple[Tensor, Parameters, Any]:
    """Compute the losses, the gradients to step along, and the next state, detached.

    Args:
        losses_of: (parameters, views, state) → the images' losses and the next state.
        parameters: name → ``(B, *shape)``.
        views: of the images.
        state: of the method.
        method: named in the error if nothing influences its loss.
        sharpness: ρ: the gradients are those at the point that lies ρ up the gradient; 0: those at
            ``parameters``.

    Raises:
        UserError: no parameter influences the loss.
    """
    losses, next_state = losses_of(parameters, views, state)
    gradients = gradients_of(losses, parameters, method)
    if sharpness:
        raised = climb(parameters, gradients, sharpness)
        raised_losses, next_state = losses_of(raised, views, state)
        gradients = gradients_of(raised_losses, raised, method)
    weights_memory = {value.untyped_storage().data_ptr() for value in parameters.values()}

    def detach(part: Tensor) -> Tensor:
        # The optimiser will write to the weights' memory.
        overwritten = part.untyped_storage().data_ptr() in weights_memory
        return part.detach().clone() if overwritten else part.detach()

    return losses, gradients, tree_map(detach, next_state)


@torch.no_grad()
def climb(parameters: Parameters, gradients: Parameters, radius: float) -> Parameters:
    """Move every image's parameters ``(B, *shape)`` the distance ``radius`` up its gradient."""
    ascent = scale(gradients, radius / norms(gradients.values()).clamp_min(1e-12))
    return {
        name: (value + ascent[name] if name in ascent else value.detach()).requires_grad_()
        for name, value in parameters.items()
    }


def gradients_of(losses: Tensor, parameters: Parameters, method: Method) -> Parameters:
    """Differentiate every image's loss ``(B,)`` by its own parameters ``(B, *shape)``.

    Parameters that do not influence the loss are left out.

    Raises:
        UserError: none does.
    """
    gradients = present_gradients(losses, parameters)
    if not gradients:
        raise UserError(
            f"none of the {len(parameters)} trainable parameters influences the loss of {method}; "
            "widen trainable"
        )
    return gradients


@torch.no_grad()
def update(
    optimizer: torch.optim.Optimizer,
    parameters: Parameters,
    gradients: Parameters,
    clip: float | None,
) -> None:
    """Take one step along every image's gradient, each clipped on its own."""
    if clip is not None:
        gradients = clip_gradients(gradients, clip)
    for name, parameter in parameters.items():
        parameter.grad = laid_out_like(parameter, gradients[name]) if name in gradients else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Give a gradient the memory layout of its parameter, which fused optimisers assume."""
    same = gradient.stride() == parameter.stride()
    return gradient if same else torch.empty_like(parameter).copy_(gradient)


def make_optimizer(leaves: list[Tensor], loop: InnerLoop) -> torch.optim.Optimizer:
    """Create an elementwise optimiser over stacked leaves; fused, it passes over them once."""
    if loop.optimizer == "adam":
        return torch.optim.Adam(leaves, lr=loop.lr, fused=True)
    return torch.optim.SGD(leaves, lr=loop.lr, momentum=loop.momentum, fused=True)
