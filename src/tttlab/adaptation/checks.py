"""What must hold before any step: the network, the method and the statistics fit, and no image depends on another."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tttlab.adaptation.inner_loop import InnerLoop, bind
from tttlab.adaptation.method import Method
from tttlab.adaptation.normalisation import normalised_layers
from tttlab.adaptation.predicting import predict_by_source
from tttlab.errors import UserError
from tttlab.networks.network import Bound
from tttlab.networks.source_statistics import Statistics, kinds


def check(
    network: nn.Module,
    images: Tensor,
    method: Method,
    loop: InnerLoop,
    statistics: Statistics,
    protocol: str = "episodic",
) -> None:
    """Refuse what cannot be adapted, before any work.

    Raises:
        UserError: the protocol, the statistics or the network do not fit.
    """
    if protocol not in method.protocols:
        other = "online.adapt_stream" if protocol == "episodic" else "adapter.adapt"
        defined = " and ".join(method.protocols)
        raise UserError(
            f"{method} is defined for {defined}, found {protocol}; use tttlab.adaptation.{other}"
        )
    check_precision(
        network, images, bind(network, method, loop) if loop.steps else Bound(network, {})
    )
    method.check(network)
    own = type(method)
    if loop.average and (
        own.predict is not Method.predict or own.predict_batch is not Method.predict_batch
    ):
        raise UserError(
            f"average: {loop.average} views cannot replace the prediction that {method} makes itself; set it to 0"
        )
    if missing := set(method.needs) - kinds(statistics):
        raise UserError(
            f"{method} needs source statistics of the kind {', '.join(sorted(missing))}; measure them with "
            "its source_statistics or with tttlab.networks.source_statistics"
        )
    unknown = [
        layer
        for layer in normalised_layers(network, loop)
        if f"{layer}.mean_center" not in statistics
    ]
    if unknown:
        raise UserError(
            f"normalisation {loop.normalisation!r} needs source statistics of {len(unknown)} layers that "
            f"have none, such as {unknown[0]}; see tttlab.networks.source_statistics.layer_statistics"
        )
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and not module.track_running_stats:
            raise UserError(
                f"layer {name} has no running statistics, so that a prediction depends on the other images of its "
                "batch; load the backbone with running statistics or with GroupNorm"
            )
    if len(images):
        check_forward(network, images, method, loop, protocol)


def check_precision(network: nn.Module, images: Tensor, net: Bound) -> None:
    """Refuse images of another dtype than the network's, and training in one so coarse that small steps are rounded away."""
    coarse = sorted(
        {str(value.dtype) for value in net.trained.values()} & {"torch.float16", "torch.bfloat16"}
    )
    if coarse:
        raise UserError(
            f"the parameters to be trained are {coarse[0]}, in which small steps are rounded away; make it "
            "float(), and for speed adapt under torch.autocast"
        )
    known = {value.dtype for value in network.parameters() if value.is_floating_point()}
    converted = torch.is_autocast_enabled(images.device.type) and images.is_floating_point()
    if known and images.dtype not in known and not converted:
        raise UserError(
            f"expected images of {min(map(str, known))}, as the network's parameters are, found {images.dtype}; "
            "convert one of them"
        )


@torch.no_grad()
def check_forward(
    network: nn.Module, images: Tensor, method: Method, loop: InnerLoop, protocol: str
) -> None:
    """Refuse networks that do not do with one or two images what the method and the adapter ask of them."""
    kind = type(network.encoder).__name__
    if method.features and network(images[:1]).features is None:
        raise UserError(
            f"{method} looks at features (N, D), and none are known of this {kind}; name the layer that gives "
            "them: tttlab.networks.classifiers.Classifier(model, features='name')"
        )
    if len(images) == 2 and not torch.allclose(
        network(images).logits[:1], network(images[:1]).logits, atol=1e-3, rtol=1e-3
    ):
        raise UserError(
            f"the predictions of this {kind} depend on the other images of a batch; per-image adaptation needs a "
            "backbone without batch-dependent layers"
        )
    if protocol == "online" and not method.whole_batch:
        predict_by_source(bind(network, method, loop), images[:1])
