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

from tttlab.config.inner_loop import Views
from tttlab.config.settings import Count, Fraction, Natural, NonNegative, Positive, Strict, fault
from tttlab.config.values import DISTINCT, PLAIN_TRANSFORMERS, BackboneName, resolve


class SimCLR(Strict):
    """Contrastive objective."""

    name: Literal["simclr"]
    temperature: Positive
    hidden_dim: Count
    projection_dim: Count


class MAE(Strict):
    """Masked reconstruction."""

    name: Literal["mae"]
    mask_ratio: Fraction
    decoder_dim: Count
    decoder_depth: Count
    decoder_heads: Count

    @model_validator(mode="after")
    def _heads_fit(self) -> "MAE":
        if self.decoder_dim % self.decoder_heads:
            raise fault(
                f"expected a multiple of decoder_heads {self.decoder_heads}, found {self.decoder_dim}",
                "decoder_dim",
            )
        return self


class Rotation(Strict):
    """Classification of the rotation, in a branch of its own behind the shared stages (null: half of the stages)."""

    name: Literal["rotation"]
    shared_stages: Count | None


class SimSiam(Strict):
    """Positives only."""

    name: Literal["simsiam"]
    hidden_dim: Count
    projection_dim: Count
    prediction_dim: Count


class ClusT3(Strict):
    """Clustering of the places of early feature maps."""

    name: Literal["clust3"]
    stages: Annotated[tuple[Count, ...], Field(min_length=1), DISTINCT]
    heads: Count
    clusters: Annotated[StrictInt, Field(ge=2)]


class IT3(Strict):
    """Classification of images that come with their labels, behind a stage (null: half of the stages)."""

    name: Literal["it3"]
    stage: Count | None


class NoObjective(Strict):
    """Supervised training only."""

    name: Literal["none"]


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
    """Supervised training: classifier only, everything, together with the objective, or after a step on it."""

    mode: Literal["linear", "full", "joint", "meta"]
    objective_weight: NonNegative
    inner: InnerStep | None = None
    probe: Probe | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> "Finetune":
        if self.mode != "linear" and self.probe is not None:
            raise fault(
                f"expected nothing: a probe is for mode linear, which freezes the encoder, found mode {self.mode}; remove it",
                "probe",
            )
        if self.mode == "meta" and self.inner is None:
            raise fault(
                "missing; mode meta needs its inner step, for example {lr: 0.1, steps: 1, pairs: 4}",
                "inner",
            )
        if self.mode != "meta" and self.inner is not None:
            raise fault(
                f"expected nothing: only mode meta takes an inner step, found mode {self.mode}; remove it",
                "inner",
            )
        return self


class Model(Strict):
    """One network: its backbone, where its weights come from, and how it is trained."""

    backbone: BackboneName
    backbone_options: dict[str, Any]
    stem: Literal["small", "stride2", "original"]
    weights: str | None
    objective: Annotated[
        SimCLR | MAE | Rotation | SimSiam | ClusT3 | IT3 | NoObjective, Field(discriminator="name")
    ]
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
        architecture = self.backbone.rpartition("/")[2]
        if self.objective.name == "mae" and not architecture.startswith(PLAIN_TRANSFORMERS):
            raise fault(
                "MAE masks patch tokens and needs a plain vision transformer (vit_*, deit_*), "
                f"found {self.backbone!r}; choose one or set objective.name: simclr",
                "backbone",
            )
        if self.objective.name == "none" and self.finetune.mode in ("joint", "meta"):
            raise fault(
                f"{self.finetune.mode} trains with an objective, but objective.name is none; set full or linear",
                "finetune.mode",
            )
        if self.objective.name == "simclr" and self.finetune.mode == "meta":
            raise fault(
                "meta takes a step on one image alone, which simclr contrasts with others; set objective.name: "
                "simsiam, rotation, clust3 or mae",
                "finetune.mode",
            )
        if self.objective.name == "it3" and self.finetune.mode == "meta":
            raise fault(
                "meta takes a step without labels, of which it3 makes its loss; set joint",
                "finetune.mode",
            )
        if self.finetune.probe and not architecture.startswith(PLAIN_TRANSFORMERS):
            raise fault(
                "a probe reads patch tokens and needs a plain vision transformer (vit_*, deit_*), found "
                f"{self.backbone!r}; remove it, or choose such a backbone",
                "finetune.probe",
            )
        if self.objective.name == "none" and self.pretrain.epochs:
            raise fault(
                "there is nothing to pretrain with objective.name: none; set 0", "pretrain.epochs"
            )
        if self.objective.name == "it3" and self.pretrain.epochs:
            raise fault(
                "it3 learns from labels, which pretraining has none of; set 0", "pretrain.epochs"
            )
        return self
