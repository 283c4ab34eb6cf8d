"""params.yaml as typed, frozen values: the only reader of that file.

The whole file is checked before anything heavy is imported, so a wrong key stops the first stage
within a second. timm's backbone names and the settings of methods and objectives are therefore read
from source text, never by importing them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from tttlab.config.experiments import Adapt, Alignment, Distance, Machine, Tune
from tttlab.config.images import Data, Shifts, SourceStats
from tttlab.config.method_settings import METHODS
from tttlab.config.models import Model
from tttlab.config.run_settings import RunSettings
from tttlab.config.runs import RunError, models_of, resolve_run, run_mistakes
from tttlab.config.strict import Natural, Strict, fault, list_mistakes, show
from tttlab.config.values import DISTINCT, Name
from tttlab.errors import UserError, choices


class Params(Strict):
    """The whole file."""

    seed: Natural
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1), DISTINCT]
    data: Data
    models: Annotated[dict[Name, Model], Field(min_length=1)]
    source_stats: SourceStats
    shifts: Shifts
    tune: Tune
    adapt: Adapt
    distance: Distance
    alignment: Alignment
    machine: Machine = Machine()

    @model_validator(mode="after")
    def _strengths_fit(self) -> "Params":
        side = self.data.image_size
        if side != "auto" and (mistake := self.shifts.size_mistake(side)):
            raise fault(mistake, "shifts.strength")
        return self

    def run_settings(self, run: str, model: str, methods: Path = METHODS) -> RunSettings:
        """Resolve the alias and the ``per_model`` overrides of ``run`` for ``model``.

        Args:
            run: a key of ``adapt.runs``.
            model: a key of ``models``.
            methods: the folder of method files.

        Raises:
            UserError: there is no such run or model, or the settings do not fit.
        """
        for what, name, known in (("model", model, self.models), ("run", run, self.adapt.runs)):
            if name not in known:
                raise UserError(f"unknown {what} {name!r} in params.yaml; {choices(name, known)}")
        try:
            return resolve_run(
                self.adapt.runs,
                self.objectives,
                run,
                model,
                self.adapt.protocol,
                methods,
                self.tune.search,
            )
        except RunError as error:
            raise UserError(error.args[0]) from error

    def models_of(self, run: str) -> tuple[str, ...]:
        """List the models that a run of ``adapt.runs`` is for."""
        return models_of(self.adapt.runs[run], self.models)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """List every (model, run) that is computed, model after model."""
        return [
            (model, run)
            for model in self.models
            for run in self.adapt.runs
            if model in self.models_of(run)
        ]

    @property
    def objectives(self) -> dict[str, str]:
        """Model name → name of its objective."""
        return {name: model.objective.name for name, model in self.models.items()}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file of settings.

    Raises:
        UserError: it cannot be read, or does not hold keys with values.
    """
    from ruamel.yaml import YAML  # YAML 1.2 as DVC reads it: 1e-3 is a number, on and off are words
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: expected the file of settings, found none that can be read"
        ) from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(
            f"{path}, line {line}: not valid YAML ({error.problem or error.context})"
        ) from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys with values, found {show(values)}")
    return values


def read_params(path: Path, base: Path | None = None, methods: Path = METHODS) -> Params:
    """Read and check the whole file of settings.

    Args:
        path: the YAML file.
        base: folder that relative paths inside the file start from (default: as they are).
        methods: the folder of method files.

    Raises:
        UserError: the first mistake (its path, what was found, what is allowed), and how many more
            there are.
    """
    values = read_yaml(path)
    try:
        params = Params.model_validate(values, context={"base": base or Path()})
    except ValidationError as error:
        raise refuse(list_mistakes(error, values)) from error
    adapt = params.adapt
    of_runs = run_mistakes(
        adapt.runs,
        params.objectives,
        adapt.protocol,
        adapt.online.batch_size,
        methods,
        params.tune.search,
    )
    if mistakes := list(dict.fromkeys(of_runs)):
        raise refuse([("", mistake) for mistake in mistakes])
    return params


def refuse(mistakes: Sequence[tuple[str, str]]) -> UserError:
    """Tell the first mistake (its path, what is wrong), and how many more there are."""
    key, text = mistakes[0]
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return UserError(f"{key}: {text}{more}" if key else f"{text}{more}")
