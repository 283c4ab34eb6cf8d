"""Activations of named layers during one forward pass, and their moments per channel."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

VARIANCE_FLOOR = 1e-5  # as BatchNorm's epsilon: a channel that is constant over an image has log-variance log(1e-5)


class Moments(NamedTuple):
    """Mean and log-variance of every channel of one image's activation, each ``(..., C)``."""

    mean: Tensor
    log_variance: Tensor


def batch_norm_layers(network: nn.Module) -> list[str]:
    """Name the encoder's BatchNorm layers, in order of definition."""
    return [name for name, module in network.named_modules() if name.startswith("encoder") and isinstance(module, _BatchNorm)]


def stage_layers(network: nn.Module) -> list[str]:
    """Name the encoder's stages (residual stages, transformer blocks) as timm's ``feature_info`` lists them."""
    return ["encoder." + stage["module"] for stage in network.encoder.feature_info]


def token_layers(network: nn.Module) -> list[str]:
    """Name where a network without BatchNorm can be re-normalised: the patch embedding, if there is one, and the stages."""
    embedding = ["encoder.patch_embed"] if hasattr(network.encoder, "patch_embed") else []
    return embedding + stage_layers(network)


@contextmanager
def record(network: nn.Module, layers: Sequence[str], keep: Callable[[Tensor], Any] = Tensor.clone) -> Iterator[dict[str, Any]]:
    """Collect the outputs of named layers while the context is open; works under ``torch.func`` transforms.

    Args:
        network: the module that is called inside the context.
        layers: names as in ``named_modules``; with ``.input`` behind it, a layer's input.
        keep: called with every activation as it comes: what to keep of it. By default a copy, for the layers behind it may work
            in place, as timm's residual blocks do on the output of their BatchNorm. Where nothing is differentiated, what is
            smaller than the activations of all layers together should be made here.

    Yields:
        the name as given → what was kept of the latest activation.
    """
    kept: dict[str, Any] = {}
    handles = [tap(network, name, lambda activation, name=name: kept.__setitem__(name, keep(activation))) for name in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def tap(network: nn.Module, name: str, give: Callable[[Tensor], None]) -> RemovableHandle:
    """Give one layer's activation away on every forward pass, with the channels second in an image."""
    if name.endswith(".input"):
        layer = network.get_submodule(name.removesuffix(".input"))
        return layer.register_forward_pre_hook(lambda _layer, inputs: give(inputs[0]))
    last = channels_last(network)
    return network.get_submodule(name).register_forward_hook(
        lambda _layer, _inputs, output: give(channels_second(output, last))
    )


def channels_last(network: nn.Module) -> bool:
    """Tell whether the encoder's stages give ``(N, H, W, C)``, as timm's Swin transformers do."""
    return getattr(network.encoder, "output_fmt", "NCHW") == "NHWC"


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


def image_moments(activation: Tensor) -> Moments:
    """Take one image's channel moments over its views and positions.

    Args:
        activation: ``(V, C, H, W)`` or ``(V, L, C)``, all views of one image.

    Returns:
        moments of shape ``(C,)``; the variance is the population variance.
    """
    _, positions = channel_dims(activation)
    dims = (0, *positions)
    variance = activation.var(dims, correction=0)
    return Moments(activation.mean(dims), (variance + VARIANCE_FLOOR).log())


def batch_moments(activation: Tensor) -> Moments:
    """Take the channel moments of each of ``N`` single images: ``(N, C, H, W)`` or ``(N, L, C)`` → two ``(N, C)``."""
    _, positions = channel_dims(activation)
    variance = activation.var(positions, correction=0)
    return Moments(activation.mean(positions), (variance + VARIANCE_FLOOR).log())
