"""Activations of named layers during one forward pass, and their moments per channel."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from tttlab.errors import UserError

VARIANCE_FLOOR = 1e-5  # BatchNorm's usual epsilon: a channel that is constant over an image has log-variance log(1e-5)


class Moments(NamedTuple):
    """Mean and log-variance of every channel of one image's activation, each ``(..., C)``."""

    mean: Tensor
    log_variance: Tensor


def batch_norm_layers(network: nn.Module) -> list[str]:
    """Name the encoder's BatchNorm layers, in order of definition."""
    return [
        name
        for name, module in network.named_modules()
        if name.startswith("encoder") and isinstance(module, _BatchNorm)
    ]


def stage_layers(network: nn.Module) -> list[str]:
    """Name the encoder's stages: those that a timm model lists (residual stages, transformer blocks), or that its user named.

    Raises:
        UserError: none are known.
    """
    if not network.stages:
        raise UserError(
            f"the outputs of stages are asked for, and none are known of this {type(network.encoder).__name__}; "
            "name some: tttlab.networks.classifiers.Classifier(model, stages=['name', …])"
        )
    return [f"encoder.{name}" for name in network.stages]


def token_layers(network: nn.Module) -> list[str]:
    """Name where a network without BatchNorm can be re-normalised: the patch embedding, if there is one, and the stages.

    Raises:
        UserError: no stages are known.
    """
    return [*(["encoder.patch_embed"] if network.embedding else []), *stage_layers(network)]


class Activations(dict[str, Tensor]):
    """Of layers, by name; asked for one that the forward pass did not reach, it says so."""

    def __missing__(self, name: str) -> Tensor:
        raise UserError(
            f"layer {name} took no part in the forward pass, so that there is no activation to look at; name others"
        )


def copied(_layer: str, activation: Tensor) -> Tensor:
    """Keep a copy, for the layers behind may work in place, as timm's residual blocks do on the output of their BatchNorm."""
    return activation.clone()


@contextmanager
def record(
    network: nn.Module, layers: Sequence[str], keep: Callable[[str, Tensor], Any] = copied
) -> Iterator[dict[str, Any]]:
    """Collect the outputs of named layers while the context is open; works under ``torch.func`` transforms.

    Args:
        network: the module that is called inside the context.
        layers: names as in ``named_modules``; with ``.input`` behind it, a layer's input.
        keep: called with a layer's name and its activation as it comes: what to keep of it. Where nothing is differentiated,
            what is smaller than the activations of all layers together should be made here.

    Yields:
        the name as given → what was kept of the latest activation.
    """
    kept = Activations()
    handles = [
        tap(network, name, lambda own, name=name: kept.__setitem__(name, keep(name, own)))
        for name in layers
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def tap(network: nn.Module, name: str, give: Callable[[Tensor], None]) -> RemovableHandle:
    """Give one layer's activation away on every forward pass, with the channels second in an image.

    Raises:
        UserError: in the forward pass, if the layer gives something else than one activation.
    """
    last = channels_last(network)

    def note(activation: Any) -> None:
        if not isinstance(activation, Tensor):
            raise UserError(
                f"layer {name}: expected one activation, found {type(activation).__name__}; name another layer"
            )
        give(channels_second(activation, last))

    if name.endswith(".input"):
        layer = network.get_submodule(name.removesuffix(".input"))
        return layer.register_forward_pre_hook(lambda _layer, inputs: give(inputs[0]))
    return network.get_submodule(name).register_forward_hook(
        lambda _layer, _inputs, output: note(output)
    )


def channels_last(network: nn.Module) -> bool:
    """Tell whether the encoder's stages give ``(N, H, W, C)``, as timm's Swin transformers do."""
    return getattr(network, "channels_last", False)


def channels_second(activation: Tensor, last: bool) -> Tensor:
    """View ``(N, H, W, C)`` as ``(N, C, H, W)`` where channels come last; other activations are left as they are."""
    return activation.movedim(-1, 1) if last and activation.ndim == 4 else activation


def channel_dims(activation: Tensor) -> tuple[int, tuple[int, ...]]:
    """Find the channel dimension and the positions of ``(N, C, H, W)``, ``(N, L, C)`` or ``(N, C)``."""
    if activation.ndim == 4:
        return 1, (2, 3)
    if activation.ndim == 3:
        return 2, (1,)
    return 1, ()


def variance_floor(network: nn.Module, layer: str) -> float:
    """Find what is added to the variances at a layer, a name for `record`, before their logarithm is taken.

    At the input of a BatchNorm layer it is that layer's own epsilon, so that an image's variance takes the place of the running
    one in the layer's formula; everywhere else it only keeps the logarithm finite.
    """
    module = (
        network.get_submodule(layer.removesuffix(".input")) if layer.endswith(".input") else None
    )
    return module.eps if isinstance(module, _BatchNorm) else VARIANCE_FLOOR


def image_moments(activation: Tensor, floor: float = VARIANCE_FLOOR) -> Moments:
    """Take one image's channel moments over its views and positions.

    Args:
        activation: ``(V, C, H, W)`` or ``(V, L, C)``, all views of one image.
        floor: added to the variance; see `variance_floor`.

    Returns:
        moments of shape ``(C,)``; the variance is the population variance.
    """
    _, positions = channel_dims(activation)
    return moments_over(activation, (0, *positions), floor)


def batch_moments(
    activation: Tensor, floor: float = VARIANCE_FLOOR, count: int | None = None
) -> Moments:
    """Take the channel moments of each of ``N`` single images.

    Args:
        activation: ``(N, C, H, W)``, ``(N, L, C)`` or ``(N, C)``; ``(N·L, C)`` where tokens stand below each other.
        floor: added to the variances; see `variance_floor`.
        count: N; None: the activation's first dimension.

    Returns:
        moments of shape ``(N, C)``.
    """
    if activation.ndim == 2:
        activation = activation.unflatten(0, (count or len(activation), -1))
    _, positions = channel_dims(activation)
    return moments_over(activation, positions, floor)


def moments_over(activation: Tensor, dims: tuple[int, ...], floor: float) -> Moments:
    """Take mean and logarithm of the population variance, plus the ``floor``, over some dimensions."""
    mean = activation.mean(dims, keepdim=True)
    variance = (activation - mean).square().mean(dims)  # on a CPU a tenth of the time of torch.var
    return Moments(mean.squeeze(dims), (variance + floor).log())
