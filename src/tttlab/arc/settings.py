"""arc/params.yaml as typed, frozen values."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, ValidationError, model_validator

from tttlab.arc.auxiliary import SYMMETRIES
from tttlab.config.experiments import Machine
from tttlab.config.finetuning import Schedule
from tttlab.config.params import read_yaml, refuse
from tttlab.config.strict import (
    Count,
    Fraction,
    Natural,
    Positive,
    Strict,
    fault,
    list_mistakes,
    show,
)
from tttlab.config.values import DISTINCT, Name


class Tasks(Strict):
    """Which tasks are taken.

    Attributes:
        training: the version of ARC-AGI whose training tasks the network is trained on.
        evaluation: the version whose evaluation tasks are solved.
        largest: cells along a side that the grids of a task may have, at most.
        count: evaluation tasks, drawn at random; null: all that fit.
    """

    training: Literal["arc1", "arc2"]
    evaluation: Literal["arc1", "arc2"]
    largest: Annotated[StrictInt, Field(ge=1, le=30)]
    count: Count | None

    @model_validator(mode="after")
    def _no_task_twice(self) -> "Tasks":
        if self.training == "arc2" and self.evaluation == "arc1":
            raise fault(
                "the training tasks of arc2 contain evaluation tasks of arc1; "
                "set training to arc1, or evaluation to arc2",
                "training",
            )
        return self


class Invented(Strict):
    """Tasks by rules of our own, of which there are as many pairs as one likes.

    Attributes:
        tasks: how many, the rules in turn; 0: none.
        pairs: demonstrations of each.
    """

    tasks: Natural
    pairs: Count


class Auxiliary(Strict):
    """Auxiliary tasks: the task itself, and each symmetry in so many colour maps.

    Attributes:
        symmetries: how grids are turned and mirrored.
        unturned: whether colours are mapped without turning, too.
        offline: colour maps of a training task; 0: the task as it is, alone.
        test_time: the same of an evaluation task.
    """

    symmetries: Annotated[tuple[Literal[SYMMETRIES[1:]], ...], DISTINCT]
    unturned: StrictBool
    offline: Natural
    test_time: Natural

    @property
    def kinds(self) -> tuple[str, ...]:
        """List the symmetries that are recoloured, ``none`` among them if it is."""
        return ("none",) * self.unturned + self.symmetries


class Network(Strict):
    """Canvas and transformer; see `tttlab.arc.canvas` and `tttlab.arc.network`."""

    canvas: Count
    patch: Count
    largest_scale: Count
    width: Count
    depth: Count
    heads: Count
    mlp: Count
    dropout: Annotated[StrictFloat, Field(ge=0, lt=1)]
    norm: Literal["pre", "post"]

    @model_validator(mode="after")
    def _parts_fit(self) -> "Network":
        if self.canvas % self.patch:
            message = f"expected a divisor of canvas ({self.canvas}), found {self.patch}"
            raise fault(message, "patch")
        if self.width % (4 * self.heads):
            message = f"expected a multiple of 4 · heads ({4 * self.heads}), found {self.width}"
            raise fault(f"{message}: half of a head turns by row, half by column", "width")
        return self


class Training(Schedule):
    """Offline training, of the network and of a token for each auxiliary task.

    Attributes:
        clip: largest norm of the gradient.
    """

    clip: Positive


class Run(Strict):
    """One way to adapt; what a run leaves out is that of ``adapt.defaults``.

    Attributes:
        steps: updates; 0: none.
        pairs: demonstrations in a step.
        lr: learning rate at its highest.
        warmup: steps over which it rises.
        clip: largest norm of a task's gradient.
        trainable: ``all``, ``tokens``, or prefixes of parameters' names.
        together: one network for all tasks, in place of one for each.
        offline: start from the network that was trained offline, not from a new one.
        placements: how often each question is drawn under each auxiliary task.
    """

    steps: Natural
    pairs: Count
    lr: Positive
    warmup: Natural
    clip: Positive
    trainable: Literal["all", "tokens"] | tuple[str, ...]
    together: StrictBool
    offline: StrictBool
    placements: Count

    @model_validator(mode="after")
    def _together_trains_all(self) -> "Run":
        if self.together and self.trainable != "all":
            raise fault(
                "expected all, for one network for all tasks is trained as a whole, "
                f"found {show(self.trainable)}",
                "trainable",
            )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> "Run":
        if self.steps and self.warmup >= self.steps:
            message = f"expected fewer than steps ({self.steps}), found {self.warmup}"
            raise fault(message, "warmup")
        return self


class Adapt(Strict):
    """How the network is adapted to a task.

    Attributes:
        record: shares of a run's steps after which it predicts, too.
        defaults: of all runs.
        runs: name → what it changes.
    """

    record: tuple[Fraction, ...]
    defaults: Run
    runs: dict[Name, dict[str, Any]]

    @model_validator(mode="after")
    def _runs_are_complete(self) -> "Adapt":
        for name in ("none", "all"):
            if name not in self.runs:
                raise fault(f"expected a run {name!r}, with which the others are compared", "runs")
        for name in self.runs:
            self.run(name)
        if self.run("none").steps:
            raise fault("expected 0: the run without test-time training", "runs.none.steps")
        return self

    def run(self, name: str) -> Run:
        """Give a run's settings, complete.

        Raises:
            PydanticCustomError: they are wrong.
        """
        values = self.defaults.model_dump() | self.runs[name]
        try:
            return Run.model_validate(values)
        except ValidationError as error:
            key, message = list_mistakes(error, values)[0]
            raise fault(message, f"runs.{name}.{key}") from error

    def steps(self, name: str) -> list[int]:
        """List the numbers of steps after which a run predicts: none, some, and all."""
        steps = self.run(name).steps
        return sorted({0, steps, *(round(share * steps) for share in self.record)})


class Settings(Strict):
    """The whole file."""

    seed: Natural
    tasks: Tasks
    invented: Invented
    auxiliary: Auxiliary
    network: Network
    train: Training
    adapt: Adapt
    alignment: Natural
    machine: Machine = Machine()

    @model_validator(mode="after")
    def _canvas_is_large_enough(self) -> "Settings":
        if self.network.canvas <= self.tasks.largest:
            raise fault(
                f"expected more than tasks.largest ({self.tasks.largest}), for the border, "
                f"found {self.network.canvas}",
                "network.canvas",
            )
        return self


def read_settings(path: Path, base: Path | None = None) -> Settings:
    """Read and check the whole file.

    Raises:
        UserError: the first mistake, and how many more there are.
    """
    values = read_yaml(path)
    try:
        return Settings.model_validate(values, context={"base": base or Path()})
    except ValidationError as error:
        raise refuse(list_mistakes(error, values)) from error
