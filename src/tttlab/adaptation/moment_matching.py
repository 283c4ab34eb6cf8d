"""Moment matching: what a known change did to activations is undone, layer by layer.

The same images are looked at twice, as they are and changed. At a layer, the first have the moments
μ and σ² over all images and positions, the others m and v. Then

    x ↦ (x − m) · σ / √v + μ

undoes for any image there, channel by channel, what the change does to the activations. Because the
images are the same, which of them were drawn hardly matters, and where nothing was changed nothing
is undone. It happens at the layers where an image is re-normalised, see
`tttlab.adaptation.normalisation`, and before that.

The map is that of AdaIN (Huang and Belongie, ICCV 2017, arXiv 1703.06868), which gives the features
of one image the moments of another.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from tttlab.adaptation.normalisation import moved
from tttlab.networks.network import Outputs
from tttlab.networks.taps import (
    Moments,
    batch_moments,
    batch_norm_layers,
    channels_last,
    channels_second,
    image_moments,
    record,
    token_layers,
    variance_floor,
)


def matching_layers(network: nn.Module) -> list[str]:
    """Name the layers where moments are matched, as `taps.record` takes them.

    Raises:
        UserError: the network has no BatchNorm, and no stages are known.
    """
    names = batch_norm_layers(network)
    return [f"{name}.input" for name in names] if names else token_layers(network)


def observe(network: nn.Module, images: Tensor) -> tuple[Outputs, dict[str, Moments]]:
    """Run a network on ``images (n, 3, H, W)``: its outputs, and each image's moments ``(n, C)``.

    The moments are those at the `matching_layers`.
    """

    def keep(layer: str, activation: Tensor) -> Moments:
        return batch_moments(activation, variance_floor(network, layer), len(images))

    with record(network, matching_layers(network), keep) as moments:
        outputs = network(images)
    return outputs, dict(moments)


def together(each: Moments) -> Moments:
    """Give the moments ``(C,)`` of images together, from those ``(n, C)`` of each."""
    mean = each.mean.mean(0)
    between = (each.mean - mean).square().mean(0)
    return Moments(mean, (each.log_variance.exp().mean(0) + between).log())


@contextmanager
def moments_matched(
    network: nn.Module, wanted: Mapping[str, Moments], found: Mapping[str, Moments] | None = None
) -> Iterator[dict[str, Moments]]:
    """Map activations so that ``found`` moments become ``wanted``, in every pass in the context.

    Args:
        network: called inside the context.
        wanted: the moments ``(C,)`` of the unchanged images, at every layer that `matching_layers`
            names.
        found: those of the changed images; None: each pass holds these, and they are measured.

    Yields:
        the moments found, by layer: of the last pass, or those given.
    """
    last, moments = channels_last(network), dict(found or {})

    def match(layer: str, activation: Tensor) -> Tensor:
        activation = channels_second(activation, last)
        if found is None:
            moments[layer] = image_moments(activation, variance_floor(network, layer))
        return moved(activation, moments[layer], wanted[layer])

    def before(layer: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return match(layer, inputs[0])

    def after(layer: str, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        matched = match(layer, output)
        return matched.movedim(1, -1) if last and output.ndim == 4 else matched

    handles = []
    for layer in wanted:
        module = network.get_submodule(layer.removesuffix(".input"))
        if layer.endswith(".input"):
            hook = module.register_forward_pre_hook(partial(before, layer), prepend=True)
        else:
            hook = module.register_forward_hook(partial(after, layer), prepend=True)
        handles.append(hook)
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
