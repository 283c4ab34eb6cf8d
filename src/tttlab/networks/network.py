"""The network every stage shares: a timm encoder, a linear classifier, and the head of a self-supervised objective."""

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

from tttlab.errors import UserError
from tttlab.seeding import stream_seed


class Outputs(NamedTuple):
    """What one forward pass gives for ``N`` images.

    ``logits (N, K)``, ``features (N, D)``; ``projections (N, P)`` with a SimCLR or SimSiam head, and ``predictions (N, P)``
    with the latter; ``reconstruction (N, L, C·p²)``, pixels of all ``L`` patches, with an MAE head and a mask; ``branch``, what
    a head gives that branches off inside the encoder: logits ``(N, 4)`` of rotations, per stage ``(N, L, M, K)`` of clusters.
    """

    logits: Tensor | None
    features: Tensor | None
    projections: Tensor | None = None
    reconstruction: Tensor | None = None
    predictions: Tensor | None = None
    branch: Any = None


class Probe(nn.Module):
    """Transformer blocks on an encoder's tokens and the mean of what they give: a classifier's features, the encoder frozen.

    Gandelsman et al., NeurIPS 2022, arXiv 2209.07522, put such a classifier (12 blocks) on their MAE encoder, so that test-time
    training finds the encoder as pretraining left it.
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
    """Encoder, classifier and self-supervised head behind one call, and, where fine-tuning has put one in, a probe.

    Images come in as RGB in [0, 1]; the encoder's own mean and standard deviation are applied inside, so that views and
    corruptions never need to know them.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, head: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(feature_width(encoder), num_classes)
        self.head = head
        self.probe: Probe | None = None
        config = resolve_data_config({}, model=encoder)
        self.register_buffer(
            "mean", torch.tensor(config["mean"]).view(1, -1, 1, 1), persistent=False
        )
        self.register_buffer("std", torch.tensor(config["std"]).view(1, -1, 1, 1), persistent=False)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the encoder's stages (residual stages, transformer blocks), as timm lists them."""
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
        """Map RGB in [0, 1] ``(N, 3, H, W)`` to what the encoder was made for."""
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
            keep: ``(N, L_keep)`` patch tokens that stay visible (MAE head only); then nothing but the reconstruction
                is computed.
            branch: compute nothing but what the head gives that branches off inside the encoder, which stops there.
            given: ``(N, K)`` class probabilities that come with the images (IT3 head only).
        """
        images = self.normalise(images)
        if keep is not None:
            return Outputs(
                None, None, reconstruction=self.head.reconstruct(self.encoder, images, keep)
            )
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
        return Outputs(
            logits, features, self.head.project(features) if hasattr(self.head, "project") else None
        )


def add_probe(network: Network, depth: int, heads: int, seed: int) -> None:
    """Put a probe of ``depth`` blocks with ``heads`` attention heads, its weights drawn by ``seed``, before the classifier.

    Raises:
        UserError: the encoder gives no tokens, or their width is no multiple of the heads.
    """
    encoder, device = network.encoder, next(network.parameters()).device
    if not isinstance(encoder, VisionTransformer):
        raise UserError(
            f"finetune.probe: expected a plain vision transformer (vit_*, deit_*), found {type(encoder).__name__}; "
            "remove it, or choose such a backbone"
        )
    if encoder.num_features % heads:
        raise UserError(
            f"finetune.probe.heads: expected a divisor of the backbone's width {encoder.num_features}, found {heads}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "probe"))
        network.probe = Probe(encoder, depth, heads).to(device).eval()


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode for a while, and restore every part's mode after.

    Parts that were given to ``torch.compile`` run as they were written: they were compiled for ordinary calls.
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


def places(module: nn.Module) -> dict[str, str]:
    """Find where a module's parameters stand: for every place, once, the name of the parameter that stands there.

    Parameters may be tied, and modules shared. `functional_call`, left to tie weights itself, visits a shared module once for
    each of its names, and on the way back leaves in it what was to be taken out.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        f"{path}.{own}".lstrip("."): names[id(parameter)]
        for path, part in module.named_modules()
        for own, parameter in part.named_parameters(recurse=False, remove_duplicate=False)
    }


class Bound:
    """A network bound to one image's parameters; called like the network itself.

    Attributes:
        module: the source network: its structure (taps, patch size), and what it says of the image itself.
        trained: the parameters that are trained, by name, as they are for this image.
        source: all parameters, by name, as they are in the source network: constants.
    """

    def __init__(self, module: nn.Module, trained: Mapping[str, Tensor]) -> None:
        self.module = module
        self.source = MappingProxyType(
            {name: value.detach() for name, value in module.named_parameters()}
        )
        self.trained = MappingProxyType(dict(trained))
        # Frozen parameters are constants too: attached, they would gather gradients that nobody reads.
        self._values = {**self.source, **trained}
        self._places = places(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Outputs:
        """Run the network with this image's parameters in place of its own."""
        values = {place: self._values[name] for place, name in self._places.items()}
        return functional_call(self.module, values, args, kwargs, tie_weights=False)

    def rebound(self, parameters: Mapping[str, Tensor]) -> "Bound":
        """Bind the same network to other values of some parameters, as of a teacher; the rest stays the image's."""
        other = copy.copy(self)
        other.trained = MappingProxyType(
            {name: parameters.get(name, value) for name, value in self.trained.items()}
        )
        other._values = {**self._values, **parameters}
        return other


def feature_width(encoder: nn.Module) -> int:
    """Find D of the features ``(N, D)`` that a timm model's classifier reads; some widen what the last stage gives."""
    return getattr(encoder, "head_hidden_size", None) or encoder.num_features


def pooled_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """Encode ``images (N, C, H, W)`` to the features ``(N, D)`` that a timm model's classifier reads."""
    return encoder.forward_head(encoder.forward_features(images), pre_logits=True)
