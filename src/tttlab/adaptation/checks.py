"""Checks before the first step.

The network, the method and the statistics must fit, and no prediction may depend on other images.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tttlab.adaptation.method import Method, overrides
from tttlab.adaptation.normalisation import normalised_layers
from tttlab.adaptation.predicting import CLASSES, Readout, predict_by_source
from tttlab.adaptation.trainable import bind
from tttlab.config.inner_loop import InnerLoop
from tttlab.errors import UserError
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics, available_statistics


def check(
    network: nn.Module,
    images: Tensor,
    method: Method,
    loop: InnerLoop,
    statistics: Statistics,
    protocol: str = "episodic",
    readout: Readout = CLASSES,
) -> None:
    """Refuse what cannot be adapted, before any work.

    Raises:
        UserError: the protocol, the statistics or the network do not fit.
    """
    if protocol not in method.protocols:
        function = "online.adapt_stream" if protocol == "episodic" else "adapter.adapt"
        defined = " and ".join(method.protocols)
        raise UserError(
            f"{method} is defined for {defined}, found {protocol}; use tttlab.adaptation.{function}"
        )
    net = bind(network, method, loop) if loop.steps else Bound(network, {})
    check_precision(network, images, net, readout)
    method.check(network)
    if loop.average and _predicts_itself(method):
        raise UserError(
            f"average: {loop.average} views cannot replace the prediction that {method} makes "
            "itself; set it to 0"
        )
    if method.normalises and loop.normalisation != "source":
        raise UserError(
            f"normalisation: {loop.normalisation} does not go with {method}, which normalises by "
            "statistics of its own; set it to source"
        )
    if missing := set(method.needs) - available_statistics(statistics):
        raise UserError(
            f"{method} needs source statistics of the kind {', '.join(sorted(missing))}; measure "
            "them with its source_statistics or with tttlab.networks.source_statistics"
        )
    unmeasured = [
        layer
        for layer in normalised_layers(network, loop)
        if f"{layer}.mean_center" not in statistics
    ]
    if unmeasured:
        raise UserError(
            f"normalisation {loop.normalisation!r} needs source statistics of "
            f"{len(unmeasured)} layers that have none, such as {unmeasured[0]}; see "
            "tttlab.networks.source_statistics.layer_statistics"
        )
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and not module.track_running_stats:
            raise UserError(
                f"layer {name} has no running statistics, so that a prediction depends on the "
                "other images of its batch; load the backbone with running statistics or with "
                "GroupNorm"
            )
    if len(images) and readout.classifies:
        check_forward(network, images, method, loop, protocol)


def _predicts_itself(method: Method) -> bool:
    return overrides(method, "predict") or overrides(method, "predict_batch")


def check_precision(
    network: nn.Module, images: Tensor, net: Bound, readout: Readout = CLASSES
) -> None:
    """Refuse images of another dtype than the network's, and half-precision training.

    Raises:
        UserError: the dtypes differ, or those of the trained parameters round small steps away.
    """
    half = {"torch.float16", "torch.bfloat16"}
    coarse = sorted({str(value.dtype) for value in net.trained.values()} & half)
    if coarse:
        raise UserError(
            f"the parameters to be trained are {coarse[0]}, in which small steps are rounded away; "
            "make it float(), and for speed adapt under torch.autocast"
        )
    dtypes = {value.dtype for value in network.parameters() if value.is_floating_point()}
    converted = torch.is_autocast_enabled(images.device.type) and images.is_floating_point()
    if readout.classifies and dtypes and images.dtype not in dtypes and not converted:
        raise UserError(
            f"expected images of {min(map(str, dtypes))}, as the network's parameters are, "
            f"found {images.dtype}; convert one of them"
        )


@torch.no_grad()
def check_forward(
    network: nn.Module, images: Tensor, method: Method, loop: InnerLoop, protocol: str
) -> None:
    """Run the network on one or two images, and refuse it where it does not meet the needs.

    Raises:
        UserError: the method needs features that the network lacks, predictions depend on the other
            images of a batch, or the network cannot be vectorised over images.
    """
    kind = type(network.encoder).__name__
    if method.features and network(images[:1]).features is None:
        raise UserError(
            f"{method} looks at features (N, D), and none are known of this {kind}; name the layer "
            "that gives them: tttlab.networks.classifiers.Classifier(model, features='name')"
        )
    if len(images) == 2:
        together, alone = network(images).logits[:1], network(images[:1]).logits
        largest = torch.maximum(together.abs().max(), alone.abs().max())
        if (together - alone).abs().max() > _rounding(together) * largest:
            raise UserError(
                f"the predictions of this {kind} depend on the other images of a batch; per-image "
                "adaptation needs a backbone without batch-dependent layers"
            )
    if protocol == "online" and not method.whole_batch:
        predict_by_source(bind(network, method, loop), images[:1].unsqueeze(1))


def _rounding(logits: Tensor) -> float:
    """How far rounding alone may move a logit, as a share of the largest.

    A batch of two is summed up in another order than one image is, and on a GPU with other
    products (TF32).
    """
    kind = logits.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else logits.dtype
    return max(1e-3, 16 * torch.finfo(dtype).eps)
