"""Activations of named layers during one forward pass, and their moments per channel."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from tttlab.errors import UserError
from tttlab.runtime.precision import at_least_single

# BatchNorm's usual epsilon. A channel that is constant over an image has log-variance log(1e-5).
VARIANCE_FLOOR = 1e-5


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
    """Name the encoder's stages: those that a timm model lists, or those given to a `Classifier`.

    Raises:
        UserError: no stages are known.
    """
    if not network.stages:
        raise UserError(
            "the outputs of stages are asked for, and none are known of this "
            f"{type(network.encoder).__name__}; "
            "name some: tttlab.networks.classifiers.Classifier(model, stages=['name', …])"
        )
    return [f"encoder.{name}" for name in network.stages]


def token_layers(network: nn.Module) -> list[str]:
    """Name the layers where a network without BatchNorm is re-normalised.

    These are the patch embedding, if there is one, and the stages.

    Raises:
        UserError: no stages are known.
    """
    return [*(["encoder.patch_embed"] if network.embedding else []), *stage_layers(network)]


class Activations(dict[str, Tensor]):
    """Layer name → activation; a layer that the forward pass did not reach raises a `UserError`."""

    def __missing__(self, name: str) -> Tensor:
        raise UserError(
            f"layer {name} took no part in the forward pass, "
            "so that there is no activation to look at; name others"
        )


def copied(_layer: str, activation: Tensor) -> Tensor:
    """Copy an activation: later layers may change it in place, as timm's residual blocks do."""
    return activation.clone()


@contextmanager
def record(
    network: nn.Module, layers: Sequence[str], keep: Callable[[str, Tensor], Any] = copied
) -> Iterator[dict[str, Any]]:
    """Record the outputs of named layers inside the context; works under ``torch.func``.

    Args:
        network: the module that is called inside the context.
        layers: names as in ``named_modules``; with the suffix ``.input``, a layer's input.
        keep: function (layer name, activation) → value to keep. Reductions belong here when nothing
            is differentiated: then the activations of all layers are not in memory together.

    Yields:
        the name as given → the value kept of the latest activation.
    """
    kept = Activations()

    def save(name: str, activation: Tensor) -> None:
        kept[name] = keep(name, activation)

    handles = [tap(network, name, partial(save, name)) for name in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def tap(network: nn.Module, name: str, give: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``give`` with a layer's activation, channels second, on every forward pass.

    Raises:
        UserError: in the forward pass, if the layer's output is not a single tensor.
    """
    last = channels_last(network)

    def give_output(_layer: nn.Module, _inputs: tuple, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise UserError(
                f"layer {name}: expected one activation, found {type(output).__name__}; "
                "name another layer"
            )
        give(channels_second(output, last))

    if name.endswith(".input"):
        layer = network.get_submodule(name.removesuffix(".input"))
        return layer.register_forward_pre_hook(lambda _layer, inputs: give(inputs[0]))
    return network.get_submodule(name).register_forward_hook(give_output)


def channels_last(network: nn.Module) -> bool:
    """Tell whether the encoder's stages give ``(N, H, W, C)``, as timm's Swin transformers do."""
    return getattr(network, "channels_last", False)


def channels_second(activation: Tensor, last: bool) -> Tensor:
    """View ``(N, H, W, C)`` as ``(N, C, H, W)`` if channels come last; else change nothing."""
    return activation.movedim(-1, 1) if last and activation.ndim == 4 else activation


def channel_dims(activation: Tensor) -> tuple[int, tuple[int, ...]]:
    """Return channel and position dimensions of ``(N, C, H, W)``, ``(N, L, C)`` or ``(N, C)``."""
    if activation.ndim == 4:
        return 1, (2, 3)
    if activation.ndim == 3:
        return 2, (1,)
    return 1, ()


def variance_floor(network: nn.Module, layer: str) -> float:
    """Return what is added to the variances at a layer (a name for `record`) before the logarithm.

    At the input of a BatchNorm layer it is that layer's epsilon, so that an image's variance can
    replace the running one in the layer's formula. Elsewhere it only keeps the logarithm finite.
    """
    if layer.endswith(".input"):
        module = network.get_submodule(layer.removesuffix(".input"))
        if isinstance(module, _BatchNorm):
            return module.eps
    return VARIANCE_FLOOR


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
        activation: ``(N, C, H, W)``, ``(N, L, C)`` or ``(N, C)``; or ``(N·L, C)``, where the tokens
            of all images are stacked.
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
    """Take the mean and log(population variance + ``floor``) over some dimensions.

    In single precision at least: autocast gives activations in bf16, too coarse for their moments.
    """
    activation = at_least_single(activation)
    mean = activation.mean(dims, keepdim=True)
    # On a CPU this takes a tenth of the time of torch.var.
    variance = (activation - mean).square().mean(dims)
    return Moments(mean.squeeze(dims), (variance + floor).log())
