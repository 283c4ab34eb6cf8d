"""The sections of params.yaml about images: sources, source statistics and shifts."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    StrictInt,
    model_validator,
)

from tttlab.config.strict import Count, Fraction, Natural, Strict, fault
from tttlab.config.values import (
    CIFAR_SIDE,
    DISTINCT,
    SMALLEST_SIDE,
    STRENGTHS,
    CorruptionName,
    Name,
    Part,
    Severities,
    ShiftName,
    SourceName,
    is_held_out,
    resolve,
    tell_held_out,
)


class ImageSpec(Strict):
    """Where one image set comes from, and which part of it is taken."""

    source: SourceName
    root: Annotated[Path | None, AfterValidator(resolve)] = None
    split: str | None = None
    part: Part = (0.0, 1.0)
    limit: Count | None = None

    @model_validator(mode="after")
    def _reachable(self) -> "ImageSpec":
        kind = self.source.partition("/")[0]
        if kind in ("folder", "tar"):
            self._check_root(kind)
        elif kind == "sklearn":
            given = next((key for key in ("root", "split") if getattr(self, key) is not None), None)
            if given:
                raise fault(
                    f"expected null: {self.source} is built in, "
                    f"found {str(getattr(self, given))!r}",
                    given,
                )
        elif self.split is None:
            raise fault(
                f"missing; {self.source} comes in splits, name one (for example train or test)",
                "split",
            )
        elif re.match("torch/.*(cifar|mnist)", self.source) and self.split not in ("train", "test"):
            raise fault(
                f"unknown split {self.split!r} of {self.source}; allowed: test, train", "split"
            )
        return self

    def _check_root(self, kind: str) -> None:
        what = "an image folder" if kind == "folder" else "a tar file or a folder of them"
        if self.root is None:
            raise fault(f"missing; source {kind} needs the path of {what}", "root")
        if not self.root.exists() or (kind == "folder" and not self.root.is_dir()):
            raise fault(f"expected {what}, found nothing of the kind at {self.root}", "root")
        if self.split is not None and not (self.root / self.split).exists():
            raise fault(
                f"expected the name of something inside {self.root}, found {self.split!r}", "split"
            )

    def overlaps(self, other: "ImageSpec") -> bool:
        """Tell whether both specs can take the same image of the same source."""
        same = all(getattr(self, key) == getattr(other, key) for key in ("source", "root", "split"))
        return same and self.part[0] < other.part[1] and other.part[0] < self.part[1]


class LabeledSpec(ImageSpec):
    """An image spec whose images are split further into training and validation."""

    validation: Fraction


class TargetSpec(ImageSpec):
    """An image spec whose images may have no labels."""

    labels: Literal["auto", "none"] = "auto"


class Data(Strict):
    """The three image sets."""

    image_size: Annotated[StrictInt, Field(ge=SMALLEST_SIDE)] | Literal["auto"]
    duplicates: Literal["error", "allow", "skip"] = "error"
    unreadable: Literal["error", "skip"] = "error"
    pack_below: Natural = 1024
    depth: Annotated[StrictInt, Field(ge=8, le=31)] | None = None
    unlabeled: ImageSpec
    labeled: LabeledSpec
    test: TargetSpec

    @model_validator(mode="after")
    def _disjoint(self) -> "Data":
        for one, other in (("unlabeled", "labeled"), ("unlabeled", "test"), ("labeled", "test")):
            allowed = self.duplicates == "allow" and other == "labeled"
            parts = [list(getattr(self, key).part) for key in (one, other)]
            if getattr(self, one).overlaps(getattr(self, other)) and not allowed:
                way_out = " or set data.duplicates: allow" if other == "labeled" else ""
                raise fault(
                    f"overlaps data.{other}.part on the same source: {parts[0]} and {parts[1]}; "
                    f"make the parts disjoint{way_out}",
                    f"{one}.part",
                )
        return self


class SourceStats(Strict):
    """How much source data the source statistics see."""

    images: Annotated[StrictInt, Field(ge=2)] | None
    bank_size: Count


class ShiftSet(Strict):
    """Shifted images as others distribute them."""

    format: Literal["cifar10_c", "cifar100_c", "cifar10_1", "corruption_folders", "domain_folders"]
    root: Annotated[Path, AfterValidator(resolve)]
    only: Annotated[tuple[ShiftName, ...], Field(min_length=1), DISTINCT] | None = None
    severities: Severities | None = None
    labels: Literal["auto", "none"] = "auto"

    @model_validator(mode="after")
    def _makes_sense(self) -> "ShiftSet":
        if not self.root.is_dir():
            raise fault(
                f"expected the folder of a data set in the format {self.format}, "
                f"found none at {self.root}",
                "root",
            )
        for key, names in (("only", self.only or ()), ("root", (self.root.name,))):
            if held_out := next(filter(is_held_out, names), None):
                raise fault(tell_held_out(held_out), key)
        if self.severities and self.format in ("cifar10_1", "domain_folders"):
            raise fault(
                f"expected null: {self.format} has no severities, found {list(self.severities)}",
                "severities",
            )
        if self.labels == "none" and self.format.startswith("cifar"):
            raise fault(f"expected auto: {self.format} comes with labels, found 'none'", "labels")
        return self


class Shifts(Strict):
    """The shifts of the test set: synthetic corruptions, and distributed sets."""

    clean: Literal["test", "validation"] = "test"
    corruptions: Annotated[
        tuple[CorruptionName, ...],
        DISTINCT,
    ]
    severities: Severities
    # Left out of hashes and checkpoints where it is not set, like Model.mixer.
    strength: Literal[STRENGTHS] = Field(default="own", exclude_if=lambda which: which == "own")
    images: Count | None
    sets: dict[Name, ShiftSet]

    @model_validator(mode="after")
    def _something_to_test(self) -> "Shifts":
        if held_out := next(filter(is_held_out, self.sets), None):
            raise fault(tell_held_out(held_out), f"sets.{held_out}")
        if not self.corruptions and not self.sets and self.clean == "test":
            raise fault(
                "expected at least one corruption or an entry of sets, found neither; "
                "if the test images are "
                "themselves shifted, set shifts.clean: validation",
                "corruptions",
            )
        return self

    def size_mistake(self, side: int) -> str | None:
        """Say why the strengths do not fit images of this side, in pixels; None: they do."""
        if self.strength == "own" or side == CIFAR_SIDE:
            return None
        return (
            f"expected own, for {self.strength} is defined for images of {CIFAR_SIDE} pixels, "
            f"found {self.strength!r} and images of {side}; "
            f"set data.image_size: {CIFAR_SIDE}, or leave strength out"
        )
