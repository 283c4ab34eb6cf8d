"""Whose statistics normalise a test image: the source domain's, its own, or a mixture of both.

BatchNorm's running statistics belong to the source domain. For a test image and a channel with mean
m and variance v over the positions of its views, and source mean μ and variance σ²:

``source``  μ, σ².
``image``   m, v.
``mixed``   (1 − p)·μ + p·m and (1 − p)·σ² + p·v, with the same p for all channels (Schneider et
            al., NeurIPS 2020, arXiv 2006.16971, with p = n / (N + n)).
``shrink``  μ and log σ², each moved by its deviation from the typical *source image*, times James
            and Stein's positive-part factor max(0, 1 − t / z²). Here z² is the mean over channels
            of the squared deviation in units of natural variation. So a deviation that is usual
            between source images counts as noise and is ignored. A moment that never varies
            between source images has no such unit and stays.

A network without BatchNorm is normalised at the outputs of its patch embedding and its stages,
where the moments of the typical source image stand for μ and σ².

Along a stream a batch takes the image's place, and the moments of as many source images that of the
typical one: between the images of a batch there is variance, too. Within n images it is on the mean
(1 − 1/n) of that between all images.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils.hooks import RemovableHandle

from tttlab.config.inner_loop import Normalisation
from tttlab.networks.natural_units import natural_distance, varies
from tttlab.networks.source_statistics import Statistics
from tttlab.networks.taps import (
    VARIANCE_FLOOR,
    Moments,
    batch_norm_layers,
    channel_dims,
    channels_last,
    channels_second,
    image_moments,
    token_layers,
)


def normalised_layers(network: nn.Module, policy: Normalisation) -> list[str]:
    """Name the layers whose natural variation a policy reads."""
    if batch_norms := batch_norm_layers(network):
        return [f"{name}.input" for name in batch_norms] if policy.normalisation == "shrink" else []
    return token_layers(network) if policy.normalisation != "source" else []


def target_moments(
    policy: Normalisation, image: Moments, source: Moments, center: Moments, scale: Moments
) -> Moments:
    """Compute the moments to normalise with.

    Args:
        policy: any but ``source``.
        image: the test image's moments ``(C,)``.
        source: the moments that the source network normalises with.
        center: mean of the moments over source images.
        scale: standard deviation of the moments over source images.
    """
    if policy.normalisation == "image":
        return image
    if policy.normalisation == "mixed":
        return mixture(source, image, policy.prior)
    if policy.normalisation != "shrink":
        raise NotImplementedError(policy.normalisation)
    moments = []
    for measured, reference, typical, variation in zip(image, source, center, scale, strict=True):
        deviation = torch.where(varies(variation), measured - typical, 0)
        moments.append(reference + shrinkage(policy, deviation, variation) * deviation)
    return Moments(*moments)


def mixture(source: Moments, image: Moments, share: float) -> Moments:
    """Mix means and variances; ``share`` is the image's, as is the precision."""
    source = Moments(*(moment.to(image.mean) for moment in source))
    variance = torch.lerp(source.log_variance.exp(), image.log_variance.exp(), share)
    return Moments(torch.lerp(source.mean, image.mean, share), variance.log())


def shrinkage(policy: Normalisation, deviation: Tensor, scale: Tensor) -> Tensor:
    """Compute James and Stein's positive-part factor, in [0, 1].

    Args:
        policy: ``shrink`` with its threshold.
        deviation: ``(C,)``.
        scale: natural variation ``(C,)``.
    """
    distance = natural_distance(deviation, scale)
    return (1 - policy.threshold / distance.clamp_min(1e-12)).clamp_min(0)


@contextmanager
def normalised(
    network: nn.Module, policy: Normalisation, statistics: Statistics, *, batch_size: int = 1
) -> Iterator[None]:
    """Apply a policy to every forward pass inside the context; no module or buffer is changed.

    Each forward pass must hold the views of *one* image, as under ``vmap`` over images; or, where
    it is not under ``vmap``, those of ``batch_size`` images. The input of a BatchNorm layer is
    changed so that the layer's own formula, with its running statistics, yields the wanted
    normalisation.
    """
    handles = add_hooks(network, policy, statistics, batch_size)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_hooks(
    network: nn.Module, policy: Normalisation, statistics: Statistics, batch_size: int
) -> list[RemovableHandle]:
    """Add the hooks that apply a policy: to the BatchNorm layers or, without any, to the stages."""
    if policy.normalisation == "source":
        return []
    if names := batch_norm_layers(network):
        pre_hooks = {name: batch_norm_hook(policy, statistics, name, batch_size) for name in names}
        return [
            network.get_submodule(name).register_forward_pre_hook(hook)
            for name, hook in pre_hooks.items()
        ]
    last = channels_last(network)
    hooks = {
        name: stage_hook(policy, statistics, name, batch_size, last)
        for name in token_layers(network)
    }
    return [network.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]


def outside_vmap() -> bool:
    """Tell whether what is computed now is under no ``vmap`` over images."""
    return peek_interpreter_stack() is None


def running_moments(layer: nn.Module) -> Moments:
    """Give the moments ``(C,)`` that a BatchNorm layer itself normalises with."""
    return Moments(layer.running_mean, (layer.running_var + layer.eps).log())


def batch_norm_hook(policy: Normalisation, statistics: Statistics, name: str, batch_size: int):
    """Make the pre-hook that changes a BatchNorm layer's input."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        source = running_moments(layer)
        variation = natural_variation(statistics, name + ".input", source, batch_size)
        return transport(inputs[0], policy, source, *variation, layer.eps)

    return hook


def stage_hook(
    policy: Normalisation, statistics: Statistics, name: str, batch_size: int, last: bool = False
):
    """Make the hook that moves a stage's output towards the typical source image, or batch.

    ``last``: channels come last.
    """

    def hook(_layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        center, scale = natural_variation(statistics, name, None, batch_size)
        moved = transport(channels_second(output, last), policy, center, center, scale)
        return moved.movedim(1, -1) if last and output.ndim == 4 else moved

    return hook


def natural_variation(
    statistics: Statistics, name: str, default: Moments | None, batch_size: int
) -> tuple[Moments, Moments]:
    """Read a layer's centre and scale; the default is for policies that do not use them.

    The centre is that of single images or, outside ``vmap``, of ``batch_size`` images together. The
    scale is always that of single images, beside which a batch deviates little without a shift.
    """
    if f"{name}.mean_center" not in statistics and default is not None:
        return default, default
    center, scale = (
        Moments(*(statistics[f"{name}.{moment}_{kind}"] for moment in Moments._fields))
        for kind in ("center", "scale")
    )
    if batch_size > 1 and outside_vmap():
        variance = statistics[f"{name}.total_variance"] - scale.mean.square() / batch_size
        center = Moments(center.mean, variance.log())
    return center, scale


def transport(
    activation: Tensor,
    policy: Normalisation,
    source: Moments,
    center: Moments,
    scale: Moments,
    floor: float = VARIANCE_FLOOR,
) -> Tensor:
    """Map an activation so that normalising it with ``source`` applies the policy's moments.

    The ``floor`` added to the activation's variances must be the one in the other moments; see
    `tttlab.networks.taps.variance_floor`.
    """
    target = target_moments(policy, image_moments(activation, floor), source, center, scale)
    return moved(activation, target, source)


def moved(activation: Tensor, target: Moments, source: Moments) -> Tensor:
    """Map an activation so that normalising it with ``source`` normalises it with ``target``."""
    channel, _ = channel_dims(activation)
    shape = [-1 if dim == channel else 1 for dim in range(activation.ndim)]
    gain = ((source.log_variance - target.log_variance) / 2).exp()
    mapped = (activation - target.mean.view(shape)) * gain.view(shape) + source.mean.view(shape)
    return mapped.to(activation)
