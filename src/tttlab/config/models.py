"""A model of params.yaml: backbone, objective and the two trainings."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tttlab.config.loop_settings import Views
from tttlab.config.objective_settings import (
    ObjectiveSection,
    declared_objective,
    of_one_image,
)
from tttlab.config.strict import Count, Natural, NonNegative, Positive, Strict, fault
from tttlab.config.values import PLAIN_TRANSFORMERS, BackboneName, resolve


class Training(Strict):
    """Length and optimiser of one training."""

    epochs: Natural
    batch_size: Annotated[StrictInt, Field(ge=2)]
    optimizer: Literal["sgd", "adamw"]
    lr: Positive
    weight_decay: NonNegative
    warmup_epochs: Natural
    augment: Views

    @model_validator(mode="after")
    def _warmup_fits(self) -> "Training":
        if self.warmup_epochs > self.epochs:
            raise fault(
                f"expected at most epochs ({self.epochs}), found {self.warmup_epochs}",
                "warmup_epochs",
            )
        return self


class InnerStep(Strict):
    """The step on the objective that meta-learned fine-tuning differentiates through."""

    lr: Positive
    steps: Count
    pairs: Count


class Probe(Strict):
    """Transformer blocks between a frozen encoder and the classifier."""

    depth: Count
    heads: Count


class Finetune(Training):
    """Supervised training: of the classifier, of all, with the objective, or after a step on it."""

    mode: Literal["linear", "full", "joint", "meta"]
    objective_weight: NonNegative
    inner: InnerStep | None = None
    probe: Probe | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> "Finetune":
        if self.mode != "linear" and self.probe is not None:
            raise fault(
                "expected nothing: a probe is for mode linear, which freezes the encoder, "
                f"found mode {self.mode}; remove it",
                "probe",
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


class Model(Strict):
    """One network: its backbone, where its weights come from, and how it is trained."""

    backbone: BackboneName
    backbone_options: dict[str, Any]
    stem: Literal["small", "stride2", "original"]
    weights: str | None
    objective: ObjectiveSection
    pretrain: Training
    finetune: Finetune

    @field_validator("weights")
    @classmethod
    def _weights_exist(cls, weights: str | None, info: ValidationInfo) -> str | None:
        if weights in (None, "timm"):
            return weights
        path = resolve(Path(weights), info)
        if not path.exists():
            raise fault(f"expected null, timm or the path of a checkpoint, found no file at {path}")
        return str(path)

    @model_validator(mode="after")
    def _objective_fits(self) -> "Model":
        name, mode = self.objective.name, self.finetune.mode
        plain = self.backbone.rpartition("/")[2].startswith(PLAIN_TRANSFORMERS)
        if self.finetune.probe and not plain:
            raise fault(
                "a probe reads patch tokens and needs a plain vision transformer (vit_*, deit_*), "
                f"found {self.backbone!r}; remove it, or choose such a backbone",
                "finetune.probe",
            )
        if name == "none":
            return self._no_objective_fits()
        declared = declared_objective(name)
        if declared.patches and not plain:
            raise fault(
                f"{name} works on patch tokens and needs a plain vision transformer "
                f"(vit_*, deit_*), found {self.backbone!r}; choose one "
                "or set objective.name: simclr",
                "backbone",
            )
        if mode == "meta" and not declared.alone:
            raise fault(
                f"meta takes a step on one image alone, which {name} contrasts with others; "
                f"set objective.name: {of_one_image()}",
                "finetune.mode",
            )
        if mode == "meta" and declared.labels:
            raise fault(
                f"meta takes a step without labels, of which {name} makes its loss; set joint",
                "finetune.mode",
            )
        if declared.labels and self.pretrain.epochs:
            raise fault(
                f"{name} learns from labels, which pretraining has none of; set 0",
                "pretrain.epochs",
            )
        return self

    def _no_objective_fits(self) -> "Model":
        if self.finetune.mode in ("joint", "meta"):
            raise fault(
                f"{self.finetune.mode} trains with an objective, but objective.name is none; "
                "set full or linear",
                "finetune.mode",
            )
        if self.pretrain.epochs:
            raise fault(
                "there is nothing to pretrain with objective.name: none; set 0", "pretrain.epochs"
            )
        return self
