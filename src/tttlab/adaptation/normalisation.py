"""Whose statistics normalise a test image: the source domain's, its own, or a mixture of both.

BatchNorm's running statistics belong to the source domain. For one test image and one channel with mean m and variance v
over the positions of its views, and source mean μ and variance σ²:

``source``  use μ, σ².
``image``   use m, v.
``mixed``   use (1 − p)·μ + p·m and (1 − p)·σ² + p·v, the same p for all (Schneider et al., NeurIPS 2020, arXiv 2006.16971,
            with p = n / (N + n)).
``shrink``  use the image's deviation from the typical *source image*, shrunk by James and Stein's positive-part factor
            a = max(0, 1 − t / z²), where z² is the squared deviation in units of natural variation, averaged over channels:
            what is no larger than the usual difference between source images is taken for noise and left alone.

Networks without BatchNorm are treated at the outputs of the patch embedding and of their stages, about the typical source
image's moments.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tttlab.config.inner_loop import Normalisation
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
    if norm := batch_norm_layers(network):
        return [f"{name}.input" for name in norm] if policy.normalisation == "shrink" else []
    return token_layers(network) if policy.normalisation != "source" else []


def target_moments(
    policy: Normalisation, image: Moments, source: Moments, center: Moments, scale: Moments
) -> Moments:
    """Choose the moments to normalise with.

    Args:
        policy: any but ``source``.
        image: the test image's moments ``(C,)``.
        source: what the source network normalises with.
        center: mean over source images of their moments.
        scale: standard deviation over source images of their moments.
    """
    if policy.normalisation == "image":
        return image
    if policy.normalisation == "mixed":
        variances = source.log_variance.exp(), image.log_variance.exp()
        variance = torch.lerp(*variances, policy.prior)
        return Moments(torch.lerp(source.mean, image.mean, policy.prior), variance.log())
    return Moments(
        *(
            moment + shrinkage(policy, seen - typical, variation) * (seen - typical)
            for seen, moment, typical, variation in zip(image, source, center, scale, strict=True)
        )
    )


def shrinkage(policy: Normalisation, deviation: Tensor, scale: Tensor) -> Tensor:
    """Give James–Stein's positive-part factor in [0, 1].

    Args:
        policy: ``shrink`` with its threshold.
        deviation: ``(C,)``.
        scale: natural variation ``(C,)``.
    """
    distance = (deviation / scale.clamp_min(1e-6)).square().mean()
    return (1 - policy.threshold / distance.clamp_min(1e-12)).clamp_min(0)


@contextmanager
def normalised(network: nn.Module, policy: Normalisation, statistics: Statistics) -> Iterator[None]:
    """Apply a policy to every forward pass inside the context; the network's own buffers stay untouched.

    Each forward pass must hold the views of *one* image (as under ``vmap`` over images). BatchNorm layers are treated by
    changing their input such that the layer's own formula, with running statistics, yields the wanted normalisation.
    """
    handles = []
    if policy.normalisation != "source":
        norm = {name: network.get_submodule(name) for name in batch_norm_layers(network)}
        stages = {
            name: network.get_submodule(name) for name in ([] if norm else token_layers(network))
        }
        handles += [
            layer.register_forward_pre_hook(batch_norm_hook(policy, statistics, name))
            for name, layer in norm.items()
        ]
        last = channels_last(network)
        handles += [
            layer.register_forward_hook(stage_hook(policy, statistics, name, last))
            for name, layer in stages.items()
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batch_norm_hook(policy: Normalisation, statistics: Statistics, name: str):
    """Make the pre-hook that re-normalises a BatchNorm layer's input."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        source = Moments(layer.running_mean, (layer.running_var + layer.eps).log())
        variation = natural_variation(statistics, name + ".input", source)
        return transport(inputs[0], policy, source, *variation, layer.eps)

    return hook


def stage_hook(policy: Normalisation, statistics: Statistics, name: str, last: bool = False):
    """Make the hook that moves a stage's output towards the typical source image; ``last``: channels come last."""

    def hook(_layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        center, scale = natural_variation(statistics, name, None)
        moved = transport(channels_second(output, last), policy, center, center, scale)
        return moved.movedim(1, -1) if last and output.ndim == 4 else moved

    return hook


def natural_variation(
    statistics: Statistics, name: str, default: Moments | None
) -> tuple[Moments, Moments]:
    """Read a layer's centre and scale; the default serves policies that do not look at them."""
    if f"{name}.mean_center" not in statistics and default is not None:
        return default, default
    return (
        Moments(statistics[f"{name}.mean_center"], statistics[f"{name}.log_variance_center"]),
        Moments(statistics[f"{name}.mean_scale"], statistics[f"{name}.log_variance_scale"]),
    )


def transport(
    activation: Tensor,
    policy: Normalisation,
    source: Moments,
    center: Moments,
    scale: Moments,
    floor: float = VARIANCE_FLOOR,
) -> Tensor:
    """Map an activation so that normalising it with ``source`` equals normalising the original with the chosen moments.

    The ``floor`` of its own variances must be that of the others; see `tttlab.networks.taps.variance_floor`.
    """
    channel, _ = channel_dims(activation)
    shape = [-1 if dim == channel else 1 for dim in range(activation.ndim)]
    target = target_moments(policy, image_moments(activation, floor), source, center, scale)
    gain = ((source.log_variance - target.log_variance) / 2).exp()
    return (activation - target.mean.view(shape)) * gain.view(shape) + source.mean.view(shape)
