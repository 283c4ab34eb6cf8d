"""The network of all stages: a timm encoder, a linear classifier, and a self-supervised head."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from timm.data import resolve_data_config
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from tttlab.errors import UserError
from tttlab.seeding import global_stream, stream_seed


class Outputs(NamedTuple):
    """Results of one forward pass on ``N`` images; None where the pass does not compute them.

    Attributes:
        logits: ``(N, K)``.
        features: ``(N, D)``.
        projections: ``(N, P)``, of a SimCLR or SimSiam head.
        reconstruction: ``(N, L, C·p²)``, pixels of all ``L`` patches, of an MAE head given a mask.
        predictions: ``(N, P)``, of a SimSiam head.
        branch: output of a head that branches off inside the encoder: rotation logits ``(N, 4)``,
            cluster logits ``(N, L, M, K)`` per stage, or a learned task's reconstructions and
            targets, each ``(N, P, H', W')``.
    """

    logits: Tensor | None
    features: Tensor | None
    projections: Tensor | None = None
    reconstruction: Tensor | None = None
    predictions: Tensor | None = None
    branch: Any = None


class Probe(nn.Module):
    """Transformer blocks on a frozen encoder's tokens; the mean of their outputs is the features.

    Reference:
        Gandelsman et al., NeurIPS 2022, arXiv 2209.07522, put such a classifier (12 blocks) on
        their MAE encoder, so that test-time training starts from the encoder as pretrained.
    """

    def __init__(self, encoder: nn.Module, depth: int, heads: int) -> None:
        super().__init__()
        width = encoder.num_features
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn ``tokens (N, L, D)`` into features ``(N, D)``."""
        return self.norm(self.blocks(tokens)).mean(1)


class Network(nn.Module):
    """Encoder, classifier, self-supervised head and optional probe behind one call.

    Images are RGB in [0, 1]. The network applies the encoder's mean and standard deviation itself,
    so that views and corruptions need not know them.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, head: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(feature_width(encoder), num_classes)
        self.head = head
        self.probe: Probe | None = None
        config = resolve_data_config({}, model=encoder)
        for name in ("mean", "std"):
            value = torch.tensor(config[name]).view(1, -1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the encoder's stages (residual stages, transformer blocks), in timm's order."""
        return tuple(stage["module"] for stage in self.encoder.feature_info)

    @property
    def embedding(self) -> bool:
        """Whether the encoder has a patch embedding."""
        return hasattr(self.encoder, "patch_embed")

    @property
    def channels_last(self) -> bool:
        """Whether the stages give ``(N, H, W, C)``, as timm's Swin transformers do."""
        return getattr(self.encoder, "output_fmt", "NCHW") == "NHWC"

    def normalise(self, images: Tensor) -> Tensor:
        """Standardise RGB in [0, 1] ``(N, 3, H, W)`` with the encoder's mean and deviation."""
        return (images - self.mean) / self.std

    def forward(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        branch: bool = False,
        given: Tensor | None = None,
    ) -> Outputs:
        """Run the network.

        Args:
            images: ``(N, 3, H, W)``, RGB in [0, 1].
            keep: ``(N, L_keep)`` patch tokens that stay visible (MAE head only); only the
                reconstruction is computed.
            branch: compute only the output of a head that branches off inside the encoder; the
                encoder stops there.
            given: ``(N, K)`` class probabilities that come with the images (IT3 head only).
        """
        images = self.normalise(images)
        if keep is not None:
            reconstruction = self.head.reconstruct(self.encoder, images, keep)
            return Outputs(None, None, reconstruction=reconstruction)
        if branch:
            return Outputs(None, None, branch=self.head.branch_off(self.encoder, images))
        if given is not None:
            features = self.head.features_given(self.encoder, images, given)
        elif self.probe:
            features = self.probe(self.encoder.forward_features(images))
        else:
            features = pooled_features(self.encoder, images)
        logits = self.classifier(features)
        if hasattr(self.head, "project_and_predict"):
            projections, predictions = self.head.project_and_predict(features)
            return Outputs(logits, features, projections, predictions=predictions)
        projections = self.head.project(features) if hasattr(self.head, "project") else None
        return Outputs(logits, features, projections)


def add_probe(network: Network, depth: int, heads: int, seed: int) -> None:
    """Put a probe before the classifier, in place.

    Args:
        network: with a plain vision transformer as encoder.
        depth: transformer blocks.
        heads: attention heads of a block.
        seed: of the probe's weights.

    Raises:
        UserError: the encoder gives no tokens, or their width is no multiple of ``heads``.
    """
    encoder, device = network.encoder, next(network.parameters()).device
    if not isinstance(encoder, VisionTransformer):
        raise UserError(
            "finetune.probe: expected a plain vision transformer (vit_*, deit_*), "
            f"found {type(encoder).__name__}; remove it, or choose such a backbone"
        )
    if encoder.num_features % heads:
        raise UserError(
            "finetune.probe.heads: expected a divisor of the backbone's width "
            f"{encoder.num_features}, found {heads}"
        )
    with global_stream(stream_seed(seed, "probe")):
        network.probe = Probe(encoder, depth, heads).to(device).eval()


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode inside the context, then restore every module's mode.

    Parts compiled by ``torch.compile`` run eagerly: they were compiled for ordinary calls.
    """
    modes = [(module, module.training) for module in network.modules()]
    compiled = any(
        "_orig_mod" in module._modules or module._compiled_call_impl for module, _ in modes
    )
    network.eval()
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def parameter_paths(module: nn.Module) -> dict[str, str]:
    """Map every attribute path that holds a parameter, once, to the parameter's name.

    Parameters may be tied and modules shared. When `functional_call` ties weights itself, it visits
    a shared module once per name, and afterwards leaves replaced parameters in it.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        f"{path}.{attribute}".lstrip("."): names[id(parameter)]
        for path, part in module.named_modules()
        for attribute, parameter in part.named_parameters(recurse=False, remove_duplicate=False)
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


class Bound:
    """A network bound to one image's parameters; called like the network itself.

    Attributes:
        module: the source network, for its structure (taps, patch size) and its own predictions.
        trained: this image's values of the trained parameters, by name.
        source: the source network's values of all parameters, by name; constants.
    """

    def __init__(self, module: nn.Module, trained: Mapping[str, Tensor]) -> None:
        self.module = module
        self.source = MappingProxyType(
            {name: value.detach() for name, value in module.named_parameters()}
        )
        self.trained = MappingProxyType(dict(trained))
        # Frozen parameters are detached: otherwise autograd computes gradients that nobody reads.
        self._values = {**self.source, **trained}
        self._names_by_path = parameter_paths(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Outputs:
        """Run the network with this image's parameters."""
        values = {path: self._values[name] for path, name in self._names_by_path.items()}
        return functional_call(self.module, values, args, kwargs, tie_weights=False)

    def rebound(self, parameters: Mapping[str, Tensor]) -> "Bound":
        """Return a copy with other values of some parameters, such as a teacher's."""
        bound = copy.copy(self)
        bound.trained = MappingProxyType(
            {name: parameters.get(name, value) for name, value in self.trained.items()}
        )
        bound._values = {**self._values, **parameters}
        return bound


def feature_width(encoder: nn.Module) -> int:
    """Return D of a timm model's features ``(N, D)``; some models widen the last stage's output."""
    return getattr(encoder, "head_hidden_size", None) or encoder.num_features


def pooled_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """Encode ``images (N, C, H, W)`` to the features ``(N, D)`` that timm's classifier reads."""
    return encoder.forward_head(encoder.forward_features(images), pre_logits=True)
