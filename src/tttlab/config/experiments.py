"""The sections of params.yaml about what is done with trained models, and on which machine."""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
)

from tttlab.config.loop_settings import Views
from tttlab.config.strict import Count, Natural, NonNegative, Strict
from tttlab.config.values import DeviceName, GrowingCounts, Name, Severities


class Curve(Strict):
    """The part of the test set that is followed along the steps, and by how many runners-up."""

    images: Natural
    severities: Severities
    candidates: Natural


class Online(Strict):
    """How test images arrive under the protocol ``online``."""

    batch_size: Count
    order: Literal["shuffled", "by_class"]
    shifts: Literal["separate", "continual", "gradual", "mixed"]


class Adapt(Strict):
    """The runs: name → method and settings, which ``read_params`` checks."""

    protocol: Literal["episodic", "online"]
    online: Online
    augment: Views
    curve: Curve
    runs: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]


class Tune(Strict):
    """How settings are chosen: on labeled source images, under corruptions kept for it."""

    enabled: StrictBool
    severities: Severities
    images: GrowingCounts
    candidates: Count
    keep: Annotated[StrictFloat, Field(gt=0, le=1)]
    clean_penalty: NonNegative
    gate: StrictBool
    search: dict[str, Any] = Field(default_factory=dict)


class Distance(Strict):
    """How much of every image set its distance to the source is measured on."""

    images: Annotated[StrictInt, Field(ge=20)]
    permutations: Annotated[StrictInt, Field(ge=19)]


class Alignment(Strict):
    """How many test images per shift the gradients of the two losses are compared on."""

    images: Natural


class Machine(Strict):
    """Where the work is done, and how fast.

    Nothing here changes a result but for rounding, and for BatchNorm trained by several processes
    without GPUs.
    """

    device: DeviceName = "auto"
    precision: Annotated[
        Literal["auto", "32", "bf16"], BeforeValidator(lambda value: "32" if value == 32 else value)
    ] = "auto"
    devices: Count | Literal["auto"] = "auto"
    workers: Natural = 2
    images_per_step: Count | Literal["auto"] = "auto"
