"""Other people's networks: any module from images to logits, behind the call of a `Network`.

Whatever takes a network takes a timm model and any other module too. What cannot be found out about a module is told by a
`Classifier`: which layer gives the features, which ones a method that looks at activations is to look at.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tttlab.errors import UserError, choices
from tttlab.networks.network import Network, Outputs
from tttlab.networks.taps import record


class Classifier(nn.Module):
    """A module from images to logits; images come as it wants them.

    Parameters and layers have the names that they have in a `Network`: ``classifier`` for what makes the logits, ``encoder.<its
    own name>`` for everything beside.

    Attributes:
        encoder: the module, whole.
        classifier: the layer that makes the logits; a list where timm names several; None: not known, and then every
            parameter is the encoder's.
        features: the layer where the features ``(N, D)`` are found, a name for `taps.record`; None: not known.
        stages: names of the layers, without ``encoder.``, that `taps.stage_layers` gives.
        embedding: whether `taps.token_layers` begins with the patch embedding.
        channels_last: whether these layers give ``(N, H, W, C)``.
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
        """Wrap a module; all names are those of its own layers.

        Args:
            model: ``images (N, C, H, W)`` → ``logits (N, K)``, or an object that has these as ``logits``.
            classifier: the layer that makes the logits; ``auto``: what a timm model says, of other modules the last layer if
                that is linear; None: do not look for one.
            features: the layer whose output are the features ``(N, D)``; with ``.input`` behind it, its input. By default what
                the classifier reads.
            stages: layers that give ``(N, C, H, W)`` or ``(N, L, C)``, in order; by default those that a timm model lists.
            channels_last: they give ``(N, H, W, C)``.

        Raises:
            UserError: there is no layer of such a name, or a timm model was made without a classifier.
        """
        super().__init__()
        self.guessed = last_linear(model) if classifier == "auto" and not of_timm(model) else None
        named = self.guessed if classifier == "auto" else classifier
        # Before the encoder, which it is a part of: what has two names goes by the first.
        self.classifier = (
            layer(model, named)
            if named
            else classifier_of_timm(model)
            if classifier == "auto"
            else None
        )
        self.encoder = model
        self.training = model.training
        for name in (*stages, *([features.removesuffix(".input")] if features else [])):
            layer(model, name)
        single = isinstance(self.classifier, nn.Module) and not isinstance(
            self.classifier, nn.ModuleList
        )
        self.features = (
            f"encoder.{features}" if features else "classifier.input" if single else None
        )
        listed = (
            [stage["module"] for stage in getattr(model, "feature_info", ())]
            if of_timm(model)
            else []
        )
        self.stages = tuple(stages or listed)
        self.embedding = not stages and of_timm(model) and hasattr(model, "patch_embed")
        self.channels_last = channels_last or getattr(model, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> Outputs:
        """Run the module on ``images (N, C, H, W)``; ``features`` are None where they are not known.

        Raises:
            UserError: it gives no logits, or they are not those of the layer that was taken for the last.
        """
        kind, looked_at = (
            type(self.encoder).__name__,
            (self.features, "classifier" if self.guessed else None),
        )
        with record(self, [layer for layer in looked_at if layer]) as found:
            logits = self.encoder(images)
        logits = getattr(logits, "logits", logits)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"expected logits (N, K) from this {kind}, found {shape} for {len(images)} images; wrap it in a "
                "module that returns them"
            )
        if self.guessed and getattr(found.get("classifier"), "shape", None) != logits.shape:
            raise UserError(
                f"the last layer of this {kind}, {self.guessed}, does not make its logits; name the one that does: "
                "tttlab.networks.classifiers.Classifier(model, 'name'), or None for none"
            )
        return Outputs(logits, as_features(found.get(self.features), len(images)))


def as_network(model: nn.Module) -> Network | Classifier:
    """Return a `Network` or `Classifier` as it is, and any other module as a `Classifier`.

    Wrappers that share the module's parameters, as of ``torch.compile`` and ``DataParallel``, are taken off.

    Raises:
        UserError: it is no module, or one that cannot be called with other parameters.
    """
    while isinstance(model, nn.DataParallel | DistributedDataParallel) or "_orig_mod" in getattr(
        model, "_modules", ()
    ):
        model = model.module if hasattr(model, "module") else model._orig_mod
    if isinstance(model, Network | Classifier):
        return model
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            f"expected a torch.nn.Module, found {type(model).__name__}; of a scripted or traced one give the "
            "module in Python that it was made from"
        )
    return Classifier(model)


def linear_classifier(network: nn.Module) -> nn.Linear:
    """Find the layer that turns features ``(N, D)`` into logits ``(N, K)``.

    Raises:
        UserError: there is none that is linear.
    """
    if isinstance(network.classifier, nn.Linear):
        return network.classifier
    found = "none" if network.classifier is None else type(network.classifier).__name__
    raise UserError(
        f"expected a linear layer that makes the logits of this {type(network.encoder).__name__}, found {found}; "
        "name it: tttlab.networks.classifiers.Classifier(model, 'name'), or choose another method"
    )


def of_timm(model: nn.Module) -> bool:
    """Tell whether a module says itself what makes its logits, as timm's do."""
    return callable(getattr(model, "get_classifier", None))


def classifier_of_timm(model: nn.Module) -> nn.Module | None:
    """Find what a timm model says makes its logits; None of modules that say nothing.

    Raises:
        UserError: the model was made without.
    """
    if not of_timm(model):
        return None
    found = model.get_classifier()
    parts = [found] if isinstance(found, nn.Module) else list(found)  # distilled models have two
    if any(isinstance(part, nn.Identity) for part in parts):
        raise UserError(
            f"this {type(model).__name__} has no classifier (num_classes=0); make it with one, or put a trained "
            "one behind it: tttlab.networks.network.Network(model, num_classes)"
        )
    return parts[0] if len(parts) == 1 else nn.ModuleList(parts)


def last_linear(model: nn.Module) -> str | None:
    """Name the last layer with parameters, in order of definition, if it is linear."""
    with_parameters = [
        name
        for name, part in model.named_modules()
        if any(True for _ in part.parameters(recurse=False))
    ]
    last = with_parameters[-1].partition(".parametrizations.")[0] if with_parameters else ""
    return last if last and isinstance(model.get_submodule(last), nn.Linear) else None


def layer(model: nn.Module, name: str) -> nn.Module:
    """Find a layer by its name.

    Raises:
        UserError: there is none.
    """
    layers = dict(model.named_modules())
    if name not in layers or not name:
        raise UserError(
            f"expected a layer of this {type(model).__name__}, found {name!r}; {choices(name, filter(None, layers))[:300]}"
        )
    return layers[name]


def as_features(activation: Tensor | None, count: int) -> Tensor | None:
    """Read ``(N, D)`` or ``(N, D, 1, 1)`` as ``count`` images' features ``(N, D)``; None: they are none."""
    if (
        activation is None
        or activation.ndim < 2
        or len(activation) != count
        or activation.shape[2:].numel() != 1
    ):
        return None
    return activation.flatten(1)
