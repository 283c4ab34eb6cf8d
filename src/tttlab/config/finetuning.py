"""The trainings of a model in params.yaml: lengths, rates, and what fine-tuning trains."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    StrictFloat,
    StrictInt,
    ValidationInfo,
    model_validator,
)

from tttlab.config.loop_settings import Views
from tttlab.config.strict import Count, Natural, NonNegative, Positive, Strict, fault
from tttlab.config.values import ClassNames

MODES = ("linear", "full", "joint", "meta", "none")  # `Whole` is the section of none


class Schedule(Strict):
    """Length and learning rate of one training."""

    epochs: Natural
    batch_size: Annotated[StrictInt, Field(ge=2)]
    lr: Positive
    weight_decay: NonNegative
    warmup_epochs: Natural

    @model_validator(mode="after")
    def _warmup_fits(self) -> "Schedule":
        if self.warmup_epochs > self.epochs:
            raise fault(
                f"expected at most epochs ({self.epochs}), found {self.warmup_epochs}",
                "warmup_epochs",
            )
        return self


class Training(Schedule):
    """One training on images."""

    optimizer: Literal["sgd", "adamw"]
    augment: Views


class InnerStep(Strict):
    """The step on the objective that meta-learned fine-tuning differentiates through."""

    lr: Positive
    steps: Count
    pairs: Count
    # Left out of hashes and checkpoints where it is not set, like Model.mixer.
    trainable: Literal["all", "norm"] = Field(
        default="all", exclude_if=lambda moved: moved == "all"
    )
    after: Natural = Field(default=0, exclude_if=lambda epochs: epochs == 0)


class Probe(Strict):
    """Transformer blocks between a frozen encoder and the classifier."""

    depth: Count
    heads: Count


class Finetune(Training):
    """Supervised training: of the classifier, of all, with the objective, or after a step on it."""

    mode: Literal[MODES]
    objective_weight: NonNegative
    inner: InnerStep | None = None
    probe: Probe | None = None
    # Left out of hashes and checkpoints where it is not set, like Model.mixer.
    perturb: Annotated[StrictFloat, Field(ge=0, le=1)] = Field(
        default=0.0, exclude_if=lambda share: share == 0
    )
    augmix: Annotated[StrictFloat, Field(ge=0, le=1)] = Field(
        default=0.0, exclude_if=lambda share: share == 0
    )

    @model_validator(mode="after")
    def _step_has_epochs(self) -> "Finetune":
        if self.inner and self.inner.after >= self.epochs:
            raise fault(
                f"expected fewer than epochs ({self.epochs}), of which the rest are with the step, "
                f"found {self.inner.after}",
                "inner.after",
            )
        return self

    @model_validator(mode="after")
    def _an_image_is_changed_once(self) -> "Finetune":
        if self.perturb + self.augmix > 1 + 1e-9:
            raise fault(
                f"expected at most {1 - self.perturb:g}, for a share of {self.perturb:g} is "
                f"perturbed and no image is both, found {self.augmix:g}",
                "augmix",
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> "Finetune":
        if self.mode != "linear" and self.probe is not None:
            raise fault(
                "expected nothing: a probe is for mode linear, which freezes the encoder, "
                f"found mode {self.mode}; remove it",
                "probe",
            )
        if self.mode == "joint" and not self.objective_weight:
            raise fault(
                "expected more than 0 with mode joint, whose head would learn nothing, found 0.0; "
                "set mode: full, which fits the head afterwards",
                "objective_weight",
            )
        if self.mode == "meta" and self.inner is None:
            raise fault(
                "missing; mode meta needs its inner step, "
                "for example {lr: 0.1, steps: 1, pairs: 4}",
                "inner",
            )
        if self.mode != "meta" and self.inner is not None:
            raise fault(
                "expected nothing: only mode meta takes an inner step, "
                f"found mode {self.mode}; remove it",
                "inner",
            )
        return self


Channels = tuple[StrictFloat, StrictFloat, StrictFloat]
Deviations = tuple[Positive, Positive, Positive]


class Whole(Strict):
    """A network that is kept as it is, with its own classifier: nothing is trained.

    Attributes:
        classes: names of its classes in the order of its logits; null: those that the checkpoint
            tells of.
        mean: of R, G and B, subtracted from images in [0, 1]; null: timm's, where it knows any.
        std: of R, G and B, by which the difference is divided.
    """

    mode: Literal["none"]
    classes: ClassNames | None = None
    mean: Channels | None = None
    std: Deviations | None = None
    probe: ClassVar[None] = None

    @model_validator(mode="after")
    def _both_or_none(self) -> "Whole":
        for key, other in (("mean", "std"), ("std", "mean")):
            if getattr(self, key) is None and getattr(self, other) is not None:
                raise fault(f"missing; {other} is given, and they belong together", key)
        return self


def _by_mode(values: Any, info: ValidationInfo) -> Any:
    """Check the section by its mode: a training, or none."""
    if not isinstance(values, dict) or values.get("mode") != "none":
        return Finetune.model_validate(values, context=info.context)
    trained = [key for key in values if key in Finetune.model_fields and key != "mode"]
    if trained:
        raise fault(
            "expected nothing: with mode none the network is kept as it is and not trained; "
            "remove it",
            trained[0],
            len(trained) - 1,
        )
    return Whole.model_validate(values, context=info.context)


FinetuneSection = Annotated[SerializeAsAny[Strict], BeforeValidator(_by_mode)]
