"""The inner loop: what is trained for an image, and the steps, for a group of images that never meet.

The trainable parameters are stacked as leaves ``(B, *shape)``, the loss is vectorised over images with ``torch.func.vmap``, and
since the sum of the losses has independent parts, one backward pass and one elementwise optimiser step serve all images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map

from tttlab.errors import UserError
from tttlab.gradients import clip_gradients, norms, scale
from tttlab.method import Method
from tttlab.networks import Bound
from tttlab.normalisation import Normalisation
from tttlab.per_image import PerImageLayers
from tttlab.source_statistics import Statistics
from tttlab.views import Augmentation

Parameters = dict[str, Tensor]
Observer = Callable[[int, Tensor, Parameters, Any], None]


@dataclass(frozen=True)
class InnerLoop:
    """How an image is adapted, whatever the method.

    Attributes:
        steps: number of updates; 0 leaves the source weights.
        optimizer: ``sgd`` or ``adam``; both act elementwise, so that stacked images do not meet.
        lr: learning rate.
        momentum: of SGD, in [0, 1).
        trainable: ``all``, ``encoder`` (a moving self-supervised head can lower its loss without the encoder), ``norm`` (the
            encoder's affine parameters of normalisation layers), ``none``, or names of modules or parameters.
        normalisation: policy for the networks' normalisation layers, for the loss and for the prediction.
        clip: largest norm of one image's gradient; None: no clipping.
        sharpness: radius ρ of sharpness-aware steps (Foret et al., ICLR 2021, arXiv 2010.01412): they take the gradient at the
            point that lies ρ up the gradient; 0: ordinary steps.
        average: views that the prediction is averaged over, beside the image itself; 0: the image alone.
        augmentation: of these views.
    """

    steps: int = 1
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.0
    trainable: str | tuple[str, ...] = "encoder"
    normalisation: Normalisation = Normalisation()
    clip: float | None = None
    sharpness: float = 0.0
    average: int = 0
    augmentation: Augmentation = Augmentation()


class Trained(NamedTuple):
    """What the inner loop made of a group of B images.

    ``moved (M,)`` numbers of the images that were trained, in order; ``parameters`` name → ``(M, *shape)`` and ``views`` of the
    last step, both of these images alone; ``losses (B, S + 1)`` of all, before every step and after the last. Images that are
    not among ``moved`` had no gradient and never would: they keep the source weights.
    """

    moved: Tensor
    parameters: Parameters
    views: Any
    losses: Tensor


def train(
    network: nn.Module,
    images: Tensor,
    method: Method,
    loop: InnerLoop,
    statistics: Statistics,
    streams: Sequence[Sequence[torch.Generator]],
    observe: Observer = lambda _step, _moved, _parameters, _views: None,
) -> Trained:
    """Train a group of images, each on its own.

    Args:
        network: the source network, in evaluation mode.
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
    chosen = select_parameters(network, loop.trainable)
    # Detached, the frozen parameters gather no gradients, in this graph or in the network.
    frozen = {name: value.detach() for name, value in network.named_parameters() if name not in chosen}

    def loss(parameters: Parameters, views: Any, state: Any) -> tuple[Tensor, Any]:
        return method.loss(Bound(network, frozen | parameters), views, statistics, state)

    state = tree_map(lambda value: value.expand(len(images), *value.shape), method.init_state())
    repeats = type(method).views is Method.views and not tree_leaves(state)  # the loss sees the same in every step
    layers = PerImageLayers(remember=repeats and len(streams) > 1)
    losses_of = over_images(loss, layers)
    # In the first step all images have the source weights, and none is copied.
    parameters = {name: value.detach().expand(len(images), *value.shape).requires_grad_() for name, value in chosen.items()}
    views = method.views(network, images, streams[0])
    observe(0, torch.arange(len(images), device=images.device), {}, views)
    losses, gradients, state = loss_and_gradients(losses_of, parameters, views, state, method, loop.sharpness)
    moved = torch.arange(len(images), device=images.device)
    if repeats:
        # What has no gradient here never will: elementwise optimisers leave it where it is.
        moved = norms(gradients.values()).nonzero().flatten()
        views, gradients = views[moved], {name: value[moved] for name, value in gradients.items()}
        layers.keep(moved)
    curve = [losses.detach()]
    parameters = {
        name: torch.empty_like(gradient).copy_(chosen[name].detach()).requires_grad_() for name, gradient in gradients.items()
    }
    optimizer = make_optimizer(list(parameters.values()), loop)
    update(optimizer, parameters, gradients, loop.clip)
    del gradients  # as large as all images' weights
    observe(1, moved, parameters, views)
    for step, generators in enumerate(streams[1:] if len(moved) else [], start=2):
        if not repeats:
            views = method.views(network, images, generators)
        state = tree_map(Tensor.detach, state)
        losses, gradients, state = loss_and_gradients(losses_of, parameters, views, state, method, loop.sharpness)
        curve.append(curve[0].index_copy(0, moved, losses.detach()))
        update(optimizer, parameters, gradients, loop.clip)
        observe(step, moved, parameters, views)
    if len(moved):
        with torch.no_grad():
            curve.append(curve[0].index_copy(0, moved, losses_of(parameters, views, state)[0]))
    return Trained(moved, parameters, views, torch.stack(curve, dim=1).expand(-1, len(streams) + 1))


def over_images(function: Callable[..., Any], layers: PerImageLayers | None = None, in_dims: Any = 0) -> Callable[..., Any]:
    """Vectorise a function of one image's parameters and data over images."""
    vectorised = vmap(function, in_dims=in_dims, randomness="error")

    def call(*arguments: Any) -> Any:
        with layers or PerImageLayers():
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
    """Compute losses, the gradients to step along, and the next state.

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
    return losses, gradients, after


@torch.no_grad()
def climb(parameters: Parameters, gradients: Parameters, radius: float) -> Parameters:
    """Move every image's parameters ``(B, *shape)`` up its own gradient, by ``radius`` in all."""
    up = scale(gradients, radius / norms(gradients.values()).clamp_min(1e-12))
    return {name: (value + up[name] if name in up else value.clone()).requires_grad_() for name, value in parameters.items()}


def gradients_of(losses: Tensor, parameters: Parameters, method: Method) -> Parameters:
    """Differentiate every image's loss by its own parameters: ``(B, *shape)`` of those that influence the loss."""
    found = (None,)
    if losses.requires_grad:
        found = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
    gradients = {name: value for name, value in zip(parameters, found, strict=False) if value is not None}
    if not gradients:
        raise UserError(f"none of the {len(parameters)} trainable parameters influences the loss of {method}; widen trainable")
    return gradients


@torch.no_grad()
def update(optimizer: torch.optim.Optimizer, parameters: Parameters, gradients: Parameters, clip: float | None) -> None:
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


def select_parameters(network: nn.Module, trainable: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """Choose the parameters that are adapted; see `InnerLoop.trainable`.

    Raises:
        UserError: nothing matches.
    """
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if trainable in ("all", "none"):
        return parameters if trainable == "all" else {}
    if trainable == "norm":
        names = normalisation_parameters(network)
        chosen = {name: parameters[name] for name in names if name in parameters and name.startswith("encoder.")}
    else:
        wanted = (trainable,) if isinstance(trainable, str) else tuple(trainable)
        found = {part: [name for name in parameters if f"{name}.".startswith(f"{part.rstrip('.')}.")] for part in wanted}
        trainable = next((part for part, names in found.items() if not names), trainable)
        complete = all(found.values())
        chosen = {name: parameters[name] for name in parameters if complete and any(name in names for names in found.values())}
    if not chosen:
        raise UserError(
            f"trainable: {trainable!r} matches no parameter; names begin with, for example, "
            f"{', '.join(sorted({'.'.join(name.split('.')[:2]) for name in parameters}))}"
        )
    return chosen


def normalisation_parameters(network: nn.Module) -> list[str]:
    """Name the affine parameters of BatchNorm, LayerNorm, GroupNorm and their relatives."""
    kinds = (_NormBase, nn.LayerNorm, nn.GroupNorm)
    return [
        f"{layer}.{name}"
        for layer, module in network.named_modules()
        if isinstance(module, kinds) or "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False)
    ]
