"""A model of params.yaml: backbone, objective and the two trainings."""

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tttlab.config.finetuning import FinetuneSection, Training
from tttlab.config.mixer_settings import MixerSection, mixer_mistake
from tttlab.config.objective_settings import (
    ObjectiveSection,
    declared_objective,
    of_one_image,
)
from tttlab.config.strict import Strict, fault
from tttlab.config.values import (
    BackboneName,
    is_own_module,
    is_plain_transformer,
    resolve,
    tell_unknown_backbone,
)


class Model(Strict):
    """One network: its backbone, where its weights come from, and how it is trained."""

    backbone: BackboneName
    backbone_options: dict[str, Any]
    stem: Literal["small", "stride2", "original"]
    # Left out of hashes and checkpoints where it is not set: so older ones still hold.
    mixer: MixerSection | None = Field(default=None, exclude_if=lambda mixer: mixer is None)
    weights: str | None
    objective: ObjectiveSection
    pretrain: Training
    finetune: FinetuneSection

    @field_validator("weights")
    @classmethod
    def _weights_exist(cls, weights: str | None, info: ValidationInfo) -> str | None:
        if weights in (None, "timm"):
            return weights
        path = resolve(Path(weights), info)
        if not path.exists():
            raise fault(f"expected null, timm or the path of a checkpoint, found no file at {path}")
        return str(path)

    @property
    def whole(self) -> bool:
        """Whether the network is kept as it is, with its own classifier."""
        return self.finetune.mode == "none"

    @model_validator(mode="after")
    def _network_is_known(self) -> "Model":
        if self.weights == "timm" and self.stem != "original" and not is_own_module(self.backbone):
            raise fault(
                "expected original, for another stem would replace the first layer of timm's "
                f"pretrained {self.backbone}, found {self.stem}",
                "stem",
            )
        if not self.whole:
            if is_own_module(self.backbone):
                raise fault(
                    f"{tell_unknown_backbone(self.backbone)}; "
                    "a network of your own is kept as it is: set finetune: {mode: none}",
                    "backbone",
                )
            return self
        if is_own_module(self.backbone):
            self._own_module_fits()
        elif self.weights is None:
            raise fault(
                "expected the weights of a trained network, for finetune.mode none trains nothing: "
                "the path of a checkpoint, or timm, found null",
                "weights",
            )
        if self.weights in (None, "timm") and not self.finetune.classes:
            raise fault(
                "missing; give the names of its classes in the order of the logits, as a list or "
                "as the path of a text file with one in every line",
                "finetune.classes",
            )
        if self.weights not in (None, "timm") and Path(self.weights).is_dir():
            raise fault(
                "expected a file (.safetensors, or a state dict from torch.save) with the "
                f"classifier, found the folder {self.weights}",
                "weights",
            )
        return self

    def _own_module_fits(self) -> None:
        if self.weights == "timm":
            raise fault(
                f"expected null or a path: timm has no weights of your {self.backbone}, found timm",
                "weights",
            )
        if self.stem != "original":
            raise fault(
                f"expected original: {self.backbone} is your own and stays as it is, "
                f"found {self.stem}",
                "stem",
            )

    @model_validator(mode="after")
    def _objective_fits(self) -> "Model":
        name, mode = self.objective.name, self.finetune.mode
        if self.mixer and (mistake := mixer_mistake(self.mixer, self)):
            raise mistake
        if self.whole:
            return self._nothing_is_trained()
        plain = is_plain_transformer(self.backbone)
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
        if declared.labels and self.finetune.probe:
            raise fault(
                f"{name} gives the label at the encoder's input, and what comes of that passes no "
                "probe; remove it",
                "finetune.probe",
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
        if declared.meta:
            self._check_learned(name)
        if declared.labels and self.pretrain.epochs:
            raise fault(
                f"{name} learns from labels, which pretraining has none of; set 0",
                "pretrain.epochs",
            )
        return self

    def _check_learned(self, name: str) -> None:
        """Raise a fault unless the task is trained by what its step does, and by nothing else."""
        if self.finetune.mode != "meta" or self.pretrain.epochs:
            raise fault(
                f"{name} is learned by what its step does for the classifier, and its own loss "
                "would empty it; set finetune.mode: meta and pretrain.epochs: 0",
                "objective.name",
            )
        if self.finetune.objective_weight:
            raise fault(
                f"{name}'s own loss would empty it; expected 0.0, "
                f"found {self.finetune.objective_weight}",
                "finetune.objective_weight",
            )
        if self.finetune.inner.pairs != 1:
            raise fault(
                f"the step of {name} looks at the image that is classified, so that no views are "
                f"drawn for it; expected 1, found {self.finetune.inner.pairs}",
                "finetune.inner.pairs",
            )

    def _nothing_is_trained(self) -> "Model":
        if self.objective.name != "none":
            raise fault(
                f"{self.objective.name} needs a head, and with finetune.mode none nothing is "
                "trained; set none, or finetune.mode: linear for a head and a new classifier on "
                "this encoder",
                "objective.name",
            )
        if self.pretrain.epochs:
            raise fault(
                "with finetune.mode none the network is kept as it is; set 0", "pretrain.epochs"
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
