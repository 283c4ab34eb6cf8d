"""Encoders from timm, with a stem for small images."""

from collections.abc import Mapping
from typing import Any

import timm
from timm.models import PretrainedCfg
from torch import nn

from tttlab.config.values import FOREIGN_BACKBONES
from tttlab.errors import UserError, choices


def build_encoder(
    backbone: str,
    image_size: int,
    *,
    stem: str = "small",
    options: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    num_classes: int | None = 0,
) -> nn.Module:
    """Create a timm backbone, by default without classifier, with a stem for the image size.

    Args:
        backbone: a timm model name.
        image_size: side of the square images, pixels.
        stem: ``small``, ``stride2`` or ``original``. In convolutional networks ``small`` removes
            the max-pool and makes the first convolution 3×3 with stride 1; ``stride2`` does the
            same with stride 2. In patch-based networks both set patches of 4 pixels, unless
            ``options`` has another ``patch_size``.
        options: further arguments of ``timm.create_model``.
        pretrained: start from timm's weights, which timm downloads on first use.
        num_classes: of its own classifier; 0: it has none; None: as many as its weights have.

    Raises:
        UserError: timm does not know the backbone, refuses the options, or cannot fetch weights.
    """
    options = dict(options or {})
    has_source = backbone.startswith(FOREIGN_BACKBONES)
    if not has_source and not timm.is_model(backbone.split(".")[0]):
        raise UserError(
            f"models: backbone {backbone!r} is unknown to timm {timm.__version__}; "
            f"{choices(backbone, timm.list_models())[:300]}"
        )
    if pretrained and stem != "original":
        raise UserError(
            f"models: stem {stem!r} would replace the first layer of {backbone!r}, "
            "whose weights are pretrained; set stem: original"
        )
    config = pretrained_config(backbone)
    made_of_patches = bool(config and config.fixed_input_size)
    if made_of_patches:
        options.setdefault("img_size", image_size)
        if stem != "original":
            options.setdefault("patch_size", 4)
        if image_size % options.get("patch_size", 1):
            raise UserError(
                "data.image_size: expected a multiple of the patches' "
                f"{options['patch_size']} pixels, "
                f"found {image_size}; change it or backbone_options.patch_size"
            )
    if "channels" in options or "layers" in options:
        # If residual branches started at zero, BatchNorm parameters would at first get no gradient.
        options.setdefault("zero_init_last", False)
    encoder = create(backbone, pretrained=pretrained, num_classes=num_classes, **options)
    if stem != "original" and not made_of_patches:
        shrink_stem(encoder, stride=1 if stem == "small" else 2)
    return encoder


def create(backbone: str, **options: Any) -> nn.Module:
    """Create a timm model, and tell in a line why that fails.

    Raises:
        UserError: timm refuses the options, or cannot fetch the weights.
    """
    try:
        return timm.create_model(backbone, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"models: timm cannot build backbone {backbone!r} with {options}: {error}"
        ) from error
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"weights: expected timm's weights of {backbone!r}, found neither a copy "
            f"nor a network to fetch them through ({reason}); "
            "connect once, or give the path of a file"
        ) from error


def pretrained_config(backbone: str) -> PretrainedCfg | None:
    """Look up timm's configuration of a model's weights; None for weights that it does not list.

    Raises:
        UserError: timm lists the model, but not with this tag.
    """
    try:
        return timm.get_pretrained_cfg(backbone)
    except RuntimeError as error:
        name = backbone.partition(".")[0]
        pretrained_names = timm.list_pretrained(f"{name}.*")
        tags = [tagged for tagged in pretrained_names if tagged.partition(".")[0] == name]
        raise UserError(
            f"models: timm {timm.__version__} has no weights {backbone!r}; "
            f"{choices(backbone, tags) if tags else f'it has none for {name}'}"
        ) from error


def native_size(backbone: str) -> int:
    """Find the side, in pixels, of the square images that a timm model's weights were trained on.

    Raises:
        UserError: timm does not know the backbone, or its images are not square.
    """
    config = pretrained_config(backbone) if timm.is_model(backbone.split(".")[0]) else None
    if config is None or not config.input_size:
        raise UserError(
            f"data.image_size: auto knows the models that timm lists, found {backbone!r}; "
            "set a number of pixels"
        )
    height, width = config.input_size[-2:]
    if height != width:
        raise UserError(
            f"data.image_size: auto knows square inputs, found {height}×{width} of {backbone!r}; "
            "set a number"
        )
    return height


def shrink_stem(encoder: nn.Module, stride: int) -> None:
    """Give a ResNet-like encoder a stem for small images: total stride 1 or 2, no max-pool.

    Raises:
        UserError: the encoder has no ``conv1``/``maxpool`` pair to change.
    """
    if not (hasattr(encoder, "conv1") and hasattr(encoder, "maxpool")):
        raise UserError(
            "models: stem 'small' knows ResNet-like and patch networks, "
            f"found {type(encoder).__name__}; set stem: original"
        )
    first = encoder.conv1[0] if isinstance(encoder.conv1, nn.Sequential) else encoder.conv1
    small = nn.Conv2d(
        first.in_channels, first.out_channels, 3, stride, padding=1, bias=first.bias is not None
    )
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(encoder.conv1, nn.Sequential):
        encoder.conv1[0] = small
    else:
        encoder.conv1 = small
    encoder.maxpool = nn.Identity()
