"""What a self-supervised objective declares, read by `tttlab.config.declarations`."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import Field, StrictBool, StrictStr, create_model, model_validator

from tttlab.config.declarations import Mistake, dataclasses_of, read_attributes, read_setting
from tttlab.config.strict import Strict, fault
from tttlab.errors import UserError

OBJECTIVES = Path(__file__).parents[1] / "objectives"


class Attributes(Strict):
    """What an objective's class says of itself, as `tttlab.networks.objective.Objective` has it."""

    labels: StrictBool = False
    alone: StrictBool = True
    patches: StrictBool = False
    multiples: tuple[tuple[StrictStr, StrictStr], ...] = ()


@dataclass(frozen=True)
class Declared:
    """What an objective's file says about it.

    Attributes:
        section: its section of params.yaml, ready to validate: ``name`` and every setting.
        labels: whether it is about the classes.
        alone: whether one image alone can lower it.
        patches: whether it needs a network of patch tokens, a plain vision transformer.
    """

    section: type[Strict]
    labels: bool
    alone: bool
    patches: bool


def objective_names() -> tuple[str, ...]:
    """List the objectives' files by name."""
    files = OBJECTIVES.glob("*.py")
    return tuple(sorted(file.stem for file in files if not file.stem.startswith("_")))


@cache
def declared_objective(name: str) -> Declared:
    """Read the one public dataclass of an objective's file that derives from `Objective`.

    Its annotated fields are the settings; all of them stand in params.yaml.

    Raises:
        UserError: the file has not exactly one such class, or what it declares makes no sense.
    """
    file = OBJECTIVES / f"{name}.py"
    classes = dataclasses_of(ast.parse(file.read_text(encoding="utf-8")), "Objective")
    if len(classes) != 1:
        raise UserError(
            f"{file}: expected one public class with @dataclass and the base Objective, "
            f"found {len(classes)}"
        )
    try:
        attributes = read_attributes(classes[0], Attributes)
        settings = [setting for part in classes[0].body if (setting := read_setting(part))]
        if untyped := [setting.name for setting in settings if setting.type is None]:
            line = classes[0].lineno
            raise Mistake(line, f"setting {untyped[0]} is of a type that params.yaml cannot hold")
    except Mistake as mistake:
        line, text = mistake.args
        raise UserError(f"{file}, line {line}: {text}") from mistake
    section = create_model(
        classes[0].name,
        __base__=Strict,
        __doc__=ast.get_docstring(classes[0]),
        __validators__={"check_multiples": _check_multiples(attributes.multiples)},
        name=(Literal[name], ...),
        **{setting.name: (setting.type, ...) for setting in settings},
    )
    return Declared(section, attributes.labels, attributes.alone, attributes.patches)


def _check_multiples(pairs: tuple[tuple[str, str], ...]) -> Any:
    """Check that the first setting of every pair is a multiple of the second."""

    def check(section: Strict) -> Strict:
        for name, divisor in pairs:
            value, step = getattr(section, name), getattr(section, divisor)
            if value % step:
                raise fault(f"expected a multiple of {divisor} {step}, found {value}", name)
        return section

    return model_validator(mode="after")(check)


class NoObjective(Strict):
    """Supervised training only."""

    name: Literal["none"]


_SECTIONS = (*(declared_objective(name).section for name in objective_names()), NoObjective)
ObjectiveSection = Annotated[Union[_SECTIONS], Field(discriminator="name")]  # noqa: UP007
