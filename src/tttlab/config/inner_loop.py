"""How an image is adapted, whatever the method: one declaration for params.yaml and for the code.

Nothing here imports torch, so that params.yaml can be checked within a second, and nothing imports
pydantic, so that the adapter works without it; `tttlab.config.loop_settings` checks.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]


@dataclass(frozen=True)
class Augmentation:
    """How far a random view may differ from its image.

    Attributes:
        min_scale: smallest share of the image's area that a crop keeps, in (0, 1].
        flip: mirror half of the views.
        jitter: brightness and contrast factors are drawn from [1 − 0.8·jitter, 1 + 0.8·jitter];
            in training saturation too, and hue from ±0.2·jitter, both of four views in five.
    """

    min_scale: Annotated[float, Gt(0), Le(1)] = 0.7
    flip: bool = False
    jitter: Annotated[float, Ge(0), Le(1)] = 0.2


@dataclass(frozen=True)
class Normalisation:
    """Whose statistics normalise a test image; see `tttlab.adaptation.normalisation`.

    Attributes:
        normalisation: the policy.
        prior: p of ``mixed``, the image's share, in [0, 1].
        threshold: t of ``shrink``; larger leaves more images alone.
    """

    normalisation: Literal["source", "image", "mixed", "shrink"] = "source"
    prior: Annotated[float, Ge(0), Le(1)] = 0.1
    threshold: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class InnerLoop(Normalisation):
    """How an image is adapted, whatever the method.

    Attributes:
        steps: number of updates; 0 leaves the source weights.
        optimizer: ``sgd`` or ``adam``; both act elementwise, so that stacked images do not meet.
        lr: learning rate.
        momentum: of SGD, in [0, 1).
        trainable: ``all``, ``encoder`` (not the classifier, and not a self-supervised head, which
            could lower its loss alone), ``norm`` (the encoder's affine parameters of normalisation
            layers), ``lora`` (an update of low rank for each of the encoder's linear layers, see
            `tttlab.networks.low_rank`), ``none``, or names of modules or parameters.
        rank: of the updates of ``lora``.
        normalisation: policy for the network's normalisation layers, for the loss and for the
            prediction; ``prior`` and ``threshold`` belong to it.
        clip: largest norm of one image's gradient; None: no clipping.
        sharpness: radius ρ of sharpness-aware steps (Foret et al., ICLR 2021, arXiv 2010.01412):
            they take the gradient at the point that lies ρ up the gradient; 0: ordinary steps.
        average: views that the prediction is averaged over, beside the image itself; 0: the image
            alone.
        augmentation: of these views.
    """

    steps: Natural = 1
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: Positive = 1e-3
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    trainable: str | tuple[str, ...] = "encoder"
    rank: Annotated[int, Ge(1)] = 4
    clip: Positive | None = None
    sharpness: NonNegative = 0.0
    average: Natural = 0
    augmentation: Augmentation = Augmentation()

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        return self.lr

    @property
    def settings(self) -> dict[str, Any]:
        """Give what a run of params.yaml may set, by name; views are a setting of all runs."""
        names = [field.name for field in fields(self) if field.name != "augmentation"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Annealed(InnerLoop):
    """An inner loop whose learning rate rises to ``lr`` in a line, then falls along a cosine.

    No step has a rate of 0: the rate reaches it after the last one.

    Attributes:
        warmup: steps until the rate is ``lr``.
    """

    warmup: Natural = 0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        gone = (step - 1 - self.warmup) / (self.steps - self.warmup)
        return self.lr * (1 + math.cos(math.pi * gone)) / 2
