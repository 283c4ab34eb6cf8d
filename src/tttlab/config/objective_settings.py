"""What a self-supervised objective declares, read by `tttlab.config.declarations`."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    SerializeAsAny,
    StrictBool,
    StrictStr,
    create_model,
    model_validator,
)

from tttlab.config.declarations import Mistake, read_attributes, read_class, read_setting
from tttlab.config.strict import Strict, fault, show
from tttlab.errors import choices

OBJECTIVES = Path(__file__).parents[1] / "objectives"


class Attributes(Strict):
    """What the checks of params.yaml need to know of an objective's class."""

    labels: StrictBool = False
    alone: StrictBool = True
    patches: StrictBool = False
    meta: StrictBool = False
    multiples: tuple[tuple[StrictStr, StrictStr], ...] = ()


@dataclass(frozen=True)
class Declared:
    """What an objective's file says about it.

    Attributes:
        section: its section of params.yaml, ready to validate: ``name`` and every setting.
        labels: whether it is about the classes.
        alone: whether one image alone can lower it.
        patches: whether it needs a network of patch tokens, a plain vision transformer.
        meta: whether only meta-learned fine-tuning can train it.
    """

    section: type[Strict]
    labels: bool
    alone: bool
    patches: bool
    meta: bool


def objective_names() -> tuple[str, ...]:
    """List the objectives' files by name."""
    files = OBJECTIVES.glob("*.py")
    return tuple(sorted(file.stem for file in files if not file.stem.startswith("_")))


def of_one_image() -> str:
    """List, in words, the objectives that one image without a label can lower."""
    every = {name: declared_objective(name) for name in objective_names()}
    *names, last = (name for name, own in every.items() if own.alone and not own.labels)
    return f"{', '.join(names)} or {last}"


@cache
def declared_objective(name: str) -> Declared:
    """Read the one public dataclass of an objective's file that derives from `Objective`.

    Its annotated fields are the settings; all of them stand in params.yaml.

    Raises:
        UserError: the file is not valid Python, has not exactly one such class, or what it declares
            makes no sense.
    """
    return read_class(OBJECTIVES / f"{name}.py", "Objective", lambda node: _declared(node, name))


def _declared(node: ast.ClassDef, name: str) -> Declared:
    attributes = read_attributes(node, Attributes)
    settings = [setting for part in node.body if (setting := read_setting(part))]
    if untyped := [setting.name for setting in settings if setting.type is None]:
        message = f"setting {untyped[0]} is of a type that params.yaml cannot hold"
        raise Mistake(node.lineno, message)
    section = create_model(
        node.name,
        __base__=Strict,
        __doc__=ast.get_docstring(node),
        __validators__={"check_multiples": _check_multiples(attributes.multiples)},
        name=(Literal[name], ...),
        **{setting.name: (setting.type, ...) for setting in settings},
    )
    return Declared(section, **attributes.model_dump(exclude={"multiples"}))


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


def _by_name(values: Any) -> Any:
    """Check the section of an objective by what the file of its name declares."""
    if not isinstance(values, dict):
        return values
    if "name" not in values:
        raise fault("missing; give it a value", "name")
    name, names = values["name"], (*objective_names(), "none")
    if name not in names:
        raise fault(f"found {show(name)}; {choices(str(name), names)}", "name")
    section = NoObjective if name == "none" else declared_objective(name).section
    return section.model_validate(values)


ObjectiveSection = Annotated[SerializeAsAny[Strict], BeforeValidator(_by_name)]
