"""Other networks: any module from images to logits, behind the interface of a `Network`.

Functions that take a network accept a timm model or any other module too. A `Classifier` states
what cannot be inferred from the module: the layer that gives the features, and the stages whose
activations methods use.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tttlab.errors import UserError, choices
from tttlab.networks.network import Network, Outputs
from tttlab.networks.taps import record


class Classifier(nn.Module):
    """A module from images to logits; images must be preprocessed as the module expects.

    Where `standardise` has given a mean and deviation, it takes images in [0, 1] like a `Network`.

    Parameters and layers are named as in a `Network`: ``classifier`` is the layer that makes the
    logits, and every other layer is ``encoder.<name in the module>``.

    Attributes:
        encoder: the whole module.
        classifier: the layer that makes the logits; a list where timm names several; None:
            unknown, and all parameters belong to the encoder.
        guessed: the name of the classifier if it was inferred (see `last_linear`), else None.
        features: the layer that gives the features ``(N, D)``, a name for `taps.record`; None:
            unknown.
        stages: names, without ``encoder.``, of the layers that `taps.stage_layers` returns.
        embedding: whether `taps.token_layers` begins with the patch embedding.
        channels_last: whether these layers give ``(N, H, W, C)``.
        mean: ``(1, 3, 1, 1)`` of RGB, subtracted from the images; None: nothing is.
        std: ``(1, 3, 1, 1)``, by which the difference is divided.
        order: ``(K,)``, for every logit its number among the module's; None: as they come.
    """

    def __init__(
        self,
        model: nn.Module,
        classifier: str | None = "auto",
        *,
        features: str | None = None,
        stages: Sequence[str] = (),
        channels_last: bool = False,
    ) -> None:
        """Wrap a module; all layer names are those in the module.

        Args:
            model: ``images (N, C, H, W)`` → ``logits (N, K)``, or an object with these as
                ``logits``.
            classifier: the layer that makes the logits. ``auto``: the one a timm model reports; in
                other modules the last layer, if it is linear. None: unknown.
            features: the layer whose output is the features ``(N, D)``, or with the suffix
                ``.input`` its input; default: the classifier's input.
            stages: layers that give ``(N, C, H, W)`` or ``(N, L, C)``, in order; default: those
                that a timm model lists.
            channels_last: whether the stages give ``(N, H, W, C)``.

        Raises:
            UserError: a named layer does not exist, or a timm model has no classifier.
        """
        super().__init__()
        self.guessed = (
            last_linear(model) if classifier == "auto" and not reports_classifier(model) else None
        )
        classifier_name = self.guessed if classifier == "auto" else classifier
        # Set before the encoder, which contains it: a parameter with two names goes by the first.
        if classifier_name:
            self.classifier = layer(model, classifier_name)
        else:
            self.classifier = classifier_of_timm(model) if classifier == "auto" else None
        self.encoder = model
        self.training = model.training
        for name in stages:
            layer(model, name)
        several = isinstance(self.classifier, nn.ModuleList)
        self.features = None
        if features:
            layer(model, features.removesuffix(".input"))
            self.features = f"encoder.{features}"
        elif isinstance(self.classifier, nn.Module) and not several:
            self.features = "classifier.input"
        timm_stages = getattr(model, "feature_info", ()) if reports_classifier(model) else ()
        self.stages = tuple(stages or [stage["module"] for stage in timm_stages])
        self.embedding = not stages and reports_classifier(model) and hasattr(model, "patch_embed")
        self.channels_last = channels_last or getattr(model, "output_fmt", "NCHW") == "NHWC"
        for name in ("mean", "std", "order"):
            self.register_buffer(name, None, persistent=False)

    def standardise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Have images in [0, 1] standardised before the module sees them, in place."""
        like = next(self.parameters())
        for name, values in (("mean", mean), ("std", std)):
            value = torch.tensor(values, dtype=like.dtype, device=like.device)
            self.register_buffer(name, value.view(1, -1, 1, 1), persistent=False)

    def reorder(self, order: Sequence[int]) -> None:
        """Give the logits in another order, in place; see ``order``."""
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, images: Tensor) -> Outputs:
        """Run the module on ``images (N, C, H, W)``; unknown ``features`` are None.

        Raises:
            UserError: it gives no logits, or the guessed classifier does not make them.
        """
        kind = type(self.encoder).__name__
        layers = [self.features] if self.features else []
        if self.guessed:
            layers.append("classifier")
        if self.mean is not None:
            images = (images - self.mean) / self.std
        with record(self, layers) as activations:
            logits = self.encoder(images)
        logits = getattr(logits, "logits", logits)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"expected logits (N, K) from this {kind}, found {shape} for {len(images)} images; "
                "wrap it in a module that returns them"
            )
        if self.guessed and getattr(activations.get("classifier"), "shape", None) != logits.shape:
            raise UserError(
                f"the last layer of this {kind}, {self.guessed}, does not make its logits; "
                "name the one that does: "
                "tttlab.networks.classifiers.Classifier(model, 'name'), or None for none"
            )
        if self.order is not None:
            logits = logits.index_select(-1, self.order)
        return Outputs(logits, as_features(activations.get(self.features), len(images)))


def as_network(model: nn.Module) -> Network | Classifier:
    """Return a `Network` or `Classifier` as it is, and any other module as a `Classifier`.

    Wrappers that share the module's parameters (``torch.compile``, ``DataParallel``) are removed.

    Raises:
        UserError: it is no module, or one that cannot be called with other parameters.
    """
    parallel = nn.DataParallel | DistributedDataParallel
    while isinstance(model, parallel) or "_orig_mod" in getattr(model, "_modules", ()):
        model = model.module if hasattr(model, "module") else model._orig_mod
    if isinstance(model, Network | Classifier):
        return model
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            f"expected a torch.nn.Module, found {type(model).__name__}; "
            "of a scripted or traced one give the module in Python that it was made from"
        )
    return Classifier(model)


def linear_classifier(network: nn.Module) -> nn.Linear:
    """Give the layer that turns features ``(N, D)`` into logits ``(N, K)``, in their order.

    Raises:
        UserError: it is not linear, or unknown.
    """
    if isinstance(network.classifier, nn.Linear):
        order = getattr(network, "order", None)
        return network.classifier if order is None else reordered(network.classifier, order)
    kind = "none" if network.classifier is None else type(network.classifier).__name__
    raise UserError(
        "expected a linear layer that makes the logits of this "
        f"{type(network.encoder).__name__}, found {kind}; "
        "name it: tttlab.networks.classifiers.Classifier(model, 'name'), or choose another method"
    )


def reordered(layer: nn.Linear, order: Tensor) -> nn.Linear:
    """Copy a linear layer with its outputs in another order ``(K,)``."""
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.weight.copy_(layer.weight[order])
        if layer.bias is not None:
            copied.bias.copy_(layer.bias[order])
    return copied


def reports_classifier(model: nn.Module) -> bool:
    """Tell whether a module reports the layer that makes its logits, as timm's do."""
    return callable(getattr(model, "get_classifier", None))


def classifier_of_timm(model: nn.Module) -> nn.Module | None:
    """Return the layer that a timm model reports as its classifier; None for other modules.

    Raises:
        UserError: the model was made without a classifier.
    """
    if not reports_classifier(model):
        return None
    classifier = model.get_classifier()
    # Distilled models have two classifiers.
    layers = [classifier] if isinstance(classifier, nn.Module) else list(classifier)
    if any(isinstance(part, nn.Identity) for part in layers):
        raise UserError(
            f"this {type(model).__name__} has no classifier (num_classes=0); make it with one, "
            "or put a trained one behind it: "
            "tttlab.networks.network.Network(model, num_classes)"
        )
    return layers[0] if len(layers) == 1 else nn.ModuleList(layers)


def last_linear(model: nn.Module) -> str | None:
    """Name the last layer with parameters, in order of definition, if it is linear; else None."""
    with_parameters = [
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    last = with_parameters[-1].partition(".parametrizations.")[0] if with_parameters else ""
    return last if last and isinstance(model.get_submodule(last), nn.Linear) else None


def layer(model: nn.Module, name: str) -> nn.Module:
    """Find a layer by its name.

    Raises:
        UserError: there is no layer of this name.
    """
    layers = dict(model.named_modules())
    if name not in layers or not name:
        raise UserError(
            f"expected a layer of this {type(model).__name__}, found {name!r}; "
            f"{choices(name, filter(None, layers))[:300]}"
        )
    return layers[name]


def as_features(activation: Tensor | None, count: int) -> Tensor | None:
    """Reshape ``(N, D)`` or ``(N, D, 1, 1)`` to features ``(N, D)`` of ``count`` images.

    Returns:
        None if there is no activation, or if it has another shape.
    """
    if activation is None or activation.ndim < 2 or len(activation) != count:
        return None
    return activation.flatten(1) if activation.shape[2:].numel() == 1 else None
