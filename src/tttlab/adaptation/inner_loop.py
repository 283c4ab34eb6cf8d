"""The inner loop: what is trained for an image, and the steps, for a group of images that never meet.

The trainable parameters are stacked as leaves ``(B, *shape)``, the loss is vectorised over images with ``torch.func.vmap``, and
since the sum of the losses has independent parts, one backward pass and one elementwise optimiser step serve all images.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map

from tttlab.adaptation.method import Method
from tttlab.adaptation.per_image import PerImageLayers
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.networks.gradients import clip_gradients, norms, rows, scale
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics

Parameters = dict[str, Tensor]
Observer = Callable[[int, Tensor, Parameters, Any], None]


class Trained(NamedTuple):
    """What the inner loop made of a group of B images.

    ``moved (M,)`` numbers of the images that were trained, in order; ``parameters`` name → ``(M, *shape)``, all that ever had a
    gradient, and ``views`` of the last step, both of these images alone; ``losses (B, S + 1)`` of all, before every step and
    after the last. Images that are not among ``moved`` had no gradient and never would: they keep the source weights.
    """

    moved: Tensor
    parameters: Parameters
    views: Any
    losses: Tensor


def bind(network: nn.Module, method: Method, loop: InnerLoop) -> Bound:
    """Bind a network to its own parameters, of which those are trained that the loop names, if the method trains any.

    Raises:
        UserError: the loop names none that can be trained.
    """
    chosen = select_parameters(network, loop.trainable) if method.trains else {}
    return Bound(network, {name: value.detach() for name, value in chosen.items()})


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
        net: the source network, in evaluation mode, as `bind` binds it.
        images: ``(B, 3, H, W)``.
        method: what to minimise.
        loop: how.
        statistics: source statistics.
        streams: for every step a random stream per image.
        observe: called after every step with its number, and what `Trained` holds of it; the first time with number 0 and
            no parameters, before the first step.

    Raises:
        UserError: no trainable parameter influences the loss.
    """

    def loss(parameters: Parameters, views: Any, state: Any) -> tuple[Tensor, Any]:
        return method.loss(net.rebound(parameters), views, statistics, state)

    losses_of, stacked = over_images(loss), Stacked(net.trained, len(images), loop)
    state = tree_map(lambda value: value.expand(len(images), *value.shape), method.init_state())
    same_views, stateless = type(method).views is Method.views, not tree_leaves(state)
    moved = torch.arange(len(images), device=images.device)
    views = method.views(net.module, images, streams[0])
    observe(0, moved, {}, views)
    losses, gradients, state = loss_and_gradients(
        losses_of, stacked.values, views, state, method, loop.sharpness
    )
    if same_views and stateless and not tree_leaves(state):
        # The loss is a function of the image and its weights alone, and a step along no gradient leaves these where they are:
        # whoever has none now never will.
        moved = (
            torch.stack([rows(part).any(1) for part in gradients.values()])
            .any(0)
            .nonzero()
            .flatten()
        )
        views, gradients = views[moved], {name: part[moved] for name, part in gradients.items()}
        stacked = Stacked(net.trained, len(moved), loop)
    curve = [losses.detach()]
    stacked.step(gradients)
    del gradients  # as large as all images' weights
    observe(1, moved, stacked.own, views)
    for step, generators in enumerate(streams[1:] if len(moved) else [], start=2):
        if not same_views:
            views = method.views(net.module, images, generators)
        losses, gradients, state = loss_and_gradients(
            losses_of, stacked.values, views, state, method, loop.sharpness
        )
        curve.append(curve[0].index_copy(0, moved, losses.detach()))
        stacked.step(gradients)
        observe(step, moved, stacked.own, views)
    if len(moved):
        with torch.no_grad():
            curve.append(curve[0].index_copy(0, moved, losses_of(stacked.values, views, state)[0]))
    return Trained(
        moved, stacked.own, views, torch.stack(curve, dim=1).expand(-1, len(streams) + 1)
    )


class Stacked:
    """The trained parameters of a group of B images, and their optimiser.

    Attributes:
        values: name → ``(B, *shape)``; all images share the source's memory until they have a gradient for the first time.
        own: those of them that no longer do.
    """

    def __init__(self, source: Mapping[str, Tensor], count: int, loop: InnerLoop) -> None:
        self.values: Parameters = {
            name: part.expand(count, *part.shape).requires_grad_() for name, part in source.items()
        }
        self.own: Parameters = {}
        self._loop, self._optimizer = loop, None

    def step(self, gradients: Parameters) -> None:
        """Take a step; some of the parameters may have no gradient, in this step or ever."""
        fresh = {name: part for name, part in gradients.items() if name not in self.own}
        for name, gradient in fresh.items():
            self.own[name] = (
                torch.empty_like(gradient).copy_(self.values[name].detach()).requires_grad_()
            )
        self.values |= self.own
        leaves = [self.own[name] for name in fresh]
        if self._optimizer is None:
            self._optimizer = make_optimizer(leaves, self._loop)
        elif leaves:
            self._optimizer.add_param_group({"params": leaves})
        update(self._optimizer, self.own, gradients, self._loop.clip)


def over_images(function: Callable[..., Any], in_dims: Any = 0) -> Callable[..., Any]:
    """Vectorise a function of one image's parameters and data over images."""
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
    """Compute losses, the gradients to step along, and the next state, cut off from the graph and from the weights' memory.

    Args:
        losses_of: (parameters, views, state) → losses, summed before they are differentiated, and the next state.
        parameters: name → ``(B, *shape)``.
        views: what the method has drawn.
        state: the method's.
        method: for the message where nothing influences its loss.
        sharpness: ρ; 0: the gradients at ``parameters`` themselves.
    """
    losses, after = losses_of(parameters, views, state)
    gradients = gradients_of(losses, parameters, method)
    if sharpness:
        up = climb(parameters, gradients, sharpness)
        above, after = losses_of(up, views, state)
        gradients = gradients_of(above, up, method)
    written = {
        value.untyped_storage().data_ptr() for value in parameters.values()
    }  # to which the optimiser will write
    kept = tree_map(
        lambda part: (
            part.detach().clone() if part.untyped_storage().data_ptr() in written else part.detach()
        ),
        after,
    )
    return losses, gradients, kept


@torch.no_grad()
def climb(parameters: Parameters, gradients: Parameters, radius: float) -> Parameters:
    """Move every image's parameters ``(B, *shape)`` up its own gradient, by ``radius`` in all."""
    up = scale(gradients, radius / norms(gradients.values()).clamp_min(1e-12))
    return {
        name: (value + up[name] if name in up else value.detach()).requires_grad_()
        for name, value in parameters.items()
    }


def gradients_of(losses: Tensor, parameters: Parameters, method: Method) -> Parameters:
    """Differentiate every image's loss by its own parameters: ``(B, *shape)`` of those that influence the loss."""
    found = (None,)
    if losses.requires_grad:
        found = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
    gradients = {
        name: value for name, value in zip(parameters, found, strict=False) if value is not None
    }
    if not gradients:
        raise UserError(
            f"none of the {len(parameters)} trainable parameters influences the loss of {method}; widen trainable"
        )
    return gradients


@torch.no_grad()
def update(
    optimizer: torch.optim.Optimizer,
    parameters: Parameters,
    gradients: Parameters,
    clip: float | None,
) -> None:
    """Take one step with every image's gradient, clipped on its own."""
    if clip is not None:
        gradients = clip_gradients(gradients, clip)
    for name, parameter in parameters.items():
        parameter.grad = laid_out_like(parameter, gradients[name]) if name in gradients else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Give a gradient the memory order of its parameter, which fused optimisers take for granted."""
    same = gradient.stride() == parameter.stride()
    return gradient if same else torch.empty_like(parameter).copy_(gradient)


def make_optimizer(leaves: list[Tensor], loop: InnerLoop) -> torch.optim.Optimizer:
    """Create a fresh elementwise optimiser over stacked leaves; fused, it passes over them once."""
    if loop.optimizer == "adam":
        return torch.optim.Adam(leaves, lr=loop.lr, fused=True)
    return torch.optim.SGD(leaves, lr=loop.lr, momentum=loop.momentum, fused=True)


def select_parameters(
    network: nn.Module, trainable: str | Sequence[str]
) -> dict[str, nn.Parameter]:
    """Choose the parameters that are adapted; see `InnerLoop.trainable`.

    Frozen ones are left out: they are constants of the network, such as a fixed position embedding.

    Raises:
        UserError: nothing matches, or nothing that is not frozen.
    """
    if trainable == "none":
        return {}
    parameters = dict(network.named_parameters())
    if trainable in ("all", "norm"):
        norm = [
            name
            for name in normalisation_parameters(network)
            if name.startswith("encoder.") and name in parameters
        ]
        found = {trainable: list(parameters) if trainable == "all" else norm}
    else:
        wanted = (trainable,) if isinstance(trainable, str) else tuple(trainable)
        found = {
            part: [name for name in parameters if f"{name}.".startswith(f"{part.rstrip('.')}.")]
            for part in wanted
        }
    for part, names in found.items():
        if not names:
            begin = ", ".join(sorted({".".join(name.split(".")[:2]) for name in parameters}))
            raise UserError(
                f"trainable: {part!r} matches no parameter; names begin with, for example, {begin}"
            )
        if not any(parameters[name].requires_grad for name in names):
            raise UserError(
                f"trainable: {part!r} matches frozen parameters alone (requires_grad=False), such as {names[0]}; "
                "call requires_grad_(True) on them: what moves are copies, the network stays as it is"
            )
    chosen = set().union(*found.values())
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name in chosen and parameter.requires_grad
    }


def normalisation_parameters(network: nn.Module) -> list[str]:
    """Name the affine parameters of BatchNorm, LayerNorm, GroupNorm and their relatives."""
    kinds = (_NormBase, nn.LayerNorm, nn.GroupNorm)
    return [
        f"{layer}.{name}"
        for layer, module in network.named_modules()
        if isinstance(module, kinds) or "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False)
    ]
