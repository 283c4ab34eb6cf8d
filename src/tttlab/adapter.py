"""Test-time training of many images at once, each on its own.

Every image starts from the source weights, takes its own optimiser steps on its own loss, and is classified by its own
weights. The images are worked on together only to fill the processor: their trainable parameters are stacked as leaves
``(B, *shape)``, the loss is vectorised over images with ``torch.func.vmap``, and since the sum of the losses has independent
parts, one backward pass and one elementwise optimiser step serve them all. Frozen parameters stay shared.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._pytree import tree_map

from tttlab.errors import UserError
from tttlab.method import Method
from tttlab.networks import Bound, as_network, evaluating
from tttlab.normalisation import Normalisation, normalised
from tttlab.seeding import torch_generator
from tttlab.source_statistics import Statistics, kinds

EXPLOSION = 10.0  # a loss that grew by this factor (and by this much) has diverged, not improved


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
    """

    steps: int = 1
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.0
    trainable: str | tuple[str, ...] = "encoder"
    normalisation: Normalisation = Normalisation()
    clip: float | None = None


class Adaptation(NamedTuple):
    """Results for ``N`` images, on the CPU.

    ``logits`` and ``source_logits (N, K)`` with and without adaptation; ``losses (N, steps + 1)`` before every step and after
    the last one on the last step's views, or without training one column that is not a number; ``fell_back (N,)`` where the
    adapted prediction was given up for the source's; ``milliseconds (N,)`` spent on adapting and predicting, an image's share
    of its group's time.
    """

    logits: Tensor
    source_logits: Tensor
    losses: Tensor
    fell_back: Tensor
    milliseconds: Tensor


def adapt(
    network: nn.Module,
    images: Tensor,
    method: Method,
    loop: InnerLoop = InnerLoop(),
    *,
    statistics: Statistics | None = None,
    image_ids: Sequence[str | int] | None = None,
    seed: int = 0,
    images_per_step: int | Literal["auto"] = "auto",
    on_images: Callable[[int], None] | None = None,
) -> Adaptation:
    """Adapt the network to every image on its own and predict with and without.

    Args:
        network: a `Network`, or any timm classifier; it is left exactly as it was.
        images: ``(N, 3, H, W)`` on any device: in [0, 1] for a `Network`, normalised for a timm classifier.
        method: what to minimise.
        loop: how.
        statistics: source statistics, as the method and the normalisation policy need them.
        image_ids: names of the images, which key their random streams; by default their positions.
        seed: of all random streams.
        images_per_step: images worked on at once (``auto``: 32); changes time and memory, never a result.
        on_images: called with the number of images done, after each group.

    Returns:
        logits, losses and cost per image.

    Raises:
        UserError: the network or the statistics do not fit the method, or predictions depend on the other images in a batch.
    """
    network = as_network(network)
    statistics = {name: value.to(images.device) for name, value in (statistics or {}).items()}
    size = 32 if images_per_step == "auto" else images_per_step
    names = [str(name) for name in (range(len(images)) if image_ids is None else image_ids)]
    parts = []
    with evaluating(network):
        check(network, images[:2], method, loop, statistics)
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            parts.append(adapt_together(network, images[part], method, loop, statistics, names[part], seed))
            if on_images:
                on_images(len(names[part]))
    return Adaptation(*(torch.cat(values) for values in zip(*parts, strict=True)))


def adapt_together(
    network: nn.Module,
    images: Tensor,
    method: Method,
    loop: InnerLoop,
    statistics: Statistics,
    names: list[str],
    seed: int,
) -> Adaptation:
    """Adapt one group of ``B`` images; every result depends on its own image alone."""
    source_logits = predict(network, {}, images, None, Method(), statistics)
    wait_for(images.device)
    began = time.perf_counter()
    parameters = stacked_parameters(network, loop.trainable, len(images)) if method.trains and loop.steps else {}
    streams = [[torch_generator(seed, "views", name, step) for name in names] for step in range(max(loop.steps, 1))]
    with normalised(network, loop.normalisation, statistics):
        if parameters:
            views, losses = train(network, parameters, images, method, loop, statistics, streams)
        else:
            views, losses = method.views(network, images, streams[0]), images.new_zeros(len(images), 1)
        logits = predict(network, parameters, images, views, method, statistics)
    unusable = diverged(losses) | ~logits.isfinite().all(-1)
    if not parameters:
        losses = losses.fill_(float("nan"))  # nothing was measured
    logits = torch.where(unusable[:, None], source_logits, logits)
    wait_for(images.device)
    cost = torch.full((len(images),), (time.perf_counter() - began) * 1e3 / len(images))
    return Adaptation(logits.cpu(), source_logits.cpu(), losses.cpu(), unusable.cpu(), cost)


def train(
    network: nn.Module,
    parameters: dict[str, Tensor],
    images: Tensor,
    method: Method,
    loop: InnerLoop,
    statistics: Statistics,
    streams: list[list[torch.Generator]],
) -> tuple[Any, Tensor]:
    """Run the inner loop; ``parameters`` are updated in place. Returns the last views and the losses ``(B, steps + 1)``."""
    # Detached, the frozen parameters gather no gradients, in this graph or in the network.
    frozen = {name: value.detach() for name, value in network.named_parameters() if name not in parameters}

    def loss(parameters: dict[str, Tensor], views: Any, state: Any) -> tuple[Tensor, Any]:
        return method.loss(Bound(network, frozen | parameters), views, statistics, state)

    losses_of = vmap(loss, randomness="error")
    optimizer = make_optimizer(list(parameters.values()), loop)
    state = tree_map(lambda value: value.expand(len(images), *value.shape), method.init_state())
    curve = []
    for generators in streams:
        views = method.views(network, images, generators)
        losses, state = losses_of(parameters, views, state)
        if not losses.requires_grad:
            raise UserError(
                f"none of the {len(parameters)} trainable parameters influences the loss of {method}; widen trainable"
            )
        curve.append(losses.detach())
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        clip_gradients(parameters, loop.clip)
        optimizer.step()
        state = tree_map(Tensor.detach, state)
    with torch.no_grad():
        curve.append(losses_of(parameters, views, state)[0])
    return views, torch.stack(curve, dim=1)


@torch.no_grad()
def predict(
    network: nn.Module,
    parameters: dict[str, Tensor],
    images: Tensor,
    views: Any,
    method: Method,
    statistics: Statistics,
) -> Tensor:
    """Classify every image with its own parameters (empty: with the network's): logits ``(B, K)``."""

    def one(parameters: dict[str, Tensor], image: Tensor, views: Any) -> Tensor:
        return method.predict(Bound(network, parameters), image, views, statistics)

    return vmap(one, in_dims=(0, 0, None if views is None else 0), randomness="error")(parameters, images, views)


def stacked_parameters(network: nn.Module, trainable: str | Sequence[str], count: int) -> dict[str, Tensor]:
    """Copy every trainable parameter ``count`` times: name → leaf ``(count, *shape)``."""
    return {
        name: parameter.detach().expand(count, *parameter.shape).clone().requires_grad_()
        for name, parameter in select_parameters(network, trainable).items()
    }


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


def make_optimizer(leaves: list[Tensor], loop: InnerLoop) -> torch.optim.Optimizer:
    """Create a fresh elementwise optimiser over stacked leaves."""
    if loop.optimizer == "adam":
        return torch.optim.Adam(leaves, lr=loop.lr)
    return torch.optim.SGD(leaves, lr=loop.lr, momentum=loop.momentum)


@torch.no_grad()
def clip_gradients(parameters: dict[str, Tensor], largest: float | None) -> None:
    """Bound every image's gradient norm, and drop gradients that are not finite; the images do not meet."""
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = torch.ones_like(norms) if largest is None else (largest / norms.clamp_min(1e-12)).clamp_max(1)
    finite = norms.isfinite()
    for gradient in gradients:
        shape = (-1, *[1] * (gradient.ndim - 1))
        gradient.mul_(factors.view(shape))
        gradient.masked_fill_(~finite.view(shape), 0.0)


def diverged(losses: Tensor) -> Tensor:
    """Find images ``(B,)`` whose loss curve ``(B, S + 1)`` is not finite or has exploded."""
    growth = losses[:, -1] - losses[:, 0]
    return ~losses.isfinite().all(1) | (growth > EXPLOSION * losses[:, 0].abs().clamp_min(1))


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given, so that the clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check(network: nn.Module, images: Tensor, method: Method, loop: InnerLoop, statistics: Statistics) -> None:
    """Refuse what cannot be adapted, before any work.

    Raises:
        UserError: the protocol, the statistics or the network do not fit.
    """
    method.check(network)
    if missing := set(method.needs) - kinds(statistics):
        raise UserError(f"{method} needs source statistics of the kind {', '.join(sorted(missing))}; measure them with "
                        "its source_statistics or with tttlab.source_statistics")  # fmt: skip
    unknown = [layer for layer in loop.normalisation.layers(network) if f"{layer}.mean_center" not in statistics]
    if unknown:
        raise UserError(f"normalisation {loop.normalisation.policy!r} needs source statistics of {len(unknown)} layers that "
                        f"have none, such as {unknown[0]}; see tttlab.source_statistics.layer_statistics")  # fmt: skip
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and not module.track_running_stats:
            raise UserError(
                f"layer {name} has no running statistics, so that a prediction depends on the other images of its "
                "batch; load the backbone with running statistics or with GroupNorm"
            )
    with torch.no_grad():
        if len(images) == 2 and not torch.allclose(
            network(images).logits[:1], network(images[:1]).logits, atol=1e-3, rtol=1e-3
        ):
            raise UserError(
                f"the predictions of {type(network.encoder).__name__} depend on the other images of a batch; "
                "per-image adaptation needs a backbone without batch-dependent layers"
            )
