"""What a test-time method declares, read from its source text by `tttlab.config.declarations`."""

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, StrictStr, create_model

from tttlab.config.declarations import (
    Mistake,
    assigned_names,
    bound_names,
    read_attributes,
    read_class,
    read_setting,
)
from tttlab.config.method_words import HOOKS, NO_LOSS
from tttlab.config.strict import Count, Strict, fault, show
from tttlab.errors import UserError

METHODS = Path(__file__).parents[1] / "methods"
ALIAS = "ssl"  # as a run's method: the objective that each model was trained with
PROTOCOLS = ("episodic", "online")


def _several(value: Any) -> Any:
    if isinstance(value, str):
        raise fault(f"expected several names, found {show(value)}; write ({value!r},)")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_several)]


class Attributes(Strict):
    """What a method's class says of itself beside its settings: attributes of `Method`."""

    protocols: Annotated[
        tuple[Literal["episodic", "online"], ...], Field(min_length=1), BeforeValidator(_several)
    ] = ("episodic",)
    whole_batch: StrictBool = False
    smallest_batch: Count = 1
    trains: StrictBool = True
    head: StrictStr | None = None
    features: StrictBool = False
    normalises: StrictBool = False
    needs: Names = ()


@dataclass(frozen=True)
class Declared:
    """What a method's file says about it.

    Attributes:
        settings: its fields, ready to validate.
        others: its fields of a type that params.yaml cannot hold.
        protocols: the protocols that it supports.
        smallest_batch: the fewest images of a stream's batch that it can work on.
        trains: whether it takes steps.
        head: the objective whose head it needs; None: any network will do.
        predicts: whether it has a prediction of its own.
        normalises: whether it normalises by statistics of its own.
    """

    settings: type[Strict]
    others: tuple[str, ...]
    protocols: tuple[str, ...]
    smallest_batch: int
    trains: bool
    head: str | None
    predicts: bool
    normalises: bool


def method_names(methods: Path = METHODS) -> tuple[str, ...]:
    """List the method files of a folder by name."""
    return tuple(
        sorted(
            file.stem
            for file in methods.glob("*.py")
            if not file.stem.startswith("_") and file.stem != ALIAS
        )
    )


def find_module_file(module: str) -> Path | None:
    """Find the source file of a module by its dotted path; None: there is none.

    Nothing is imported.
    """
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # an empty name, or a module without a file, such as __main__
        return None
    for part in inner:  # find_spec of a submodule would import the packages above it
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return Path(spec.origin) if spec and str(spec.origin).endswith(".py") else None


def method_file(method: str, methods: Path = METHODS) -> Path:
    """Find a method's file: of this package by its name, of any other by the module's dotted path.

    Raises:
        UserError: there is no such module.
    """
    if "." not in method:
        return methods / f"{method}.py"
    if (file := find_module_file(method)) is None:
        raise UserError(
            f"no module {method!r} with a source file, neither in this folder nor in an installed "
            "package; expected a dotted path such as my_package.my_method"
        )
    return file


@cache
def declared(method: str, methods: Path = METHODS) -> Declared:
    """Read the one public dataclass of a method's file that derives from `Method`.

    Its annotated fields are the settings, except those that are ``ClassVar``, private,
    ``init=False``, or of a type that is not built from plain ones.

    Raises:
        UserError: there is no such file; it is not valid Python; it has not exactly one such class;
            the class has no loss to train with; a setting has no type or no default; an attribute
            makes no sense.
    """
    file = method_file(method, methods)
    return read_class(file, "Method", lambda node: _declared(node, method))


def _declared(node: ast.ClassDef, method: str) -> Declared:
    _refuse_untyped(node)
    attributes = read_attributes(node, Attributes)
    fields = [field for statement in node.body if (field := read_setting(statement))]
    if attributes.trains and len(node.bases) == 1 and "loss" not in bound_names(node):
        raise Mistake(node.lineno, f"class {node.name} {NO_LOSS}")
    return Declared(
        settings=create_model(
            f"{method} settings",
            __base__=Strict,
            **{field.name: (field.type, field.default) for field in fields if field.type},
        ),
        others=tuple(field.name for field in fields if not field.type),
        protocols=attributes.protocols,
        smallest_batch=attributes.smallest_batch,
        trains=attributes.trains,
        head=attributes.head,
        predicts=not bound_names(node).isdisjoint({"predict", "predict_batch"}),
        normalises=attributes.normalises,
    )


def _refuse_untyped(node: ast.ClassDef) -> None:
    """Raise for what looks like a setting and, without a type, is none."""
    known = {*Attributes.model_fields, *HOOKS}
    for statement in node.body:
        if not isinstance(statement, ast.Assign):
            continue
        try:
            value = ast.literal_eval(statement.value)
        except ValueError:
            continue
        for name in assigned_names(statement):
            if name.islower() and not name.startswith("_") and name not in known:
                kind, text = type(value).__name__, ast.unparse(statement.value)
                raise Mistake(
                    statement.lineno,
                    f"{name} has no type, so that it is no setting; write {name}: {kind} = {text}, "
                    "or in capitals if it is a constant",
                )
