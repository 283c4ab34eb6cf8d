"""What a test-time method declares, read from its source text: importing the file would cost seconds of torch."""

import ast
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Optional, Union

import annotated_types
from pydantic import (
    BeforeValidator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    create_model,
)

from tttlab.config.settings import Count, Strict, fault, show, tell
from tttlab.errors import UserError

METHODS = Path(__file__).parents[1] / "methods"
ALIAS = "ssl"  # as a run's method: the objective that each model was trained with
PROTOCOLS = ("episodic", "online")
NO_LOSS = (
    "has no loss to train with; write loss(self, net, views, statistics, state), or trains = False for a method that "
    "only predicts"
)
HOOKS = (
    "check",
    "source_statistics",
    "views",
    "init_state",
    "loss",
    "after_step",
    "predict",
    "predict_batch",
)

_MARKERS = ("Gt", "Ge", "Lt", "Le", "Interval", "MultipleOf", "Len")
_PLAIN_TYPES = {
    "int": StrictInt,  # strict: "3" is no number and true is no 1
    "float": StrictFloat,
    "bool": StrictBool,
    "str": StrictStr,
    "tuple": tuple,
    "list": list,
    "dict": dict,
    "Annotated": Annotated,
    "Literal": Literal,
    "Optional": Optional,
    "Union": Union,
    **{name: getattr(annotated_types, name) for name in _MARKERS},
}


def _several(value: Any) -> Any:
    if isinstance(value, str):
        raise fault(f"expected several names, found {show(value)}; write ({value!r},)")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_several)]


class Attributes(Strict):
    """What a method's class says of itself beside its settings, as `tttlab.adaptation.method.Method` has it."""

    protocols: Annotated[
        tuple[Literal["episodic", "online"], ...], Field(min_length=1), BeforeValidator(_several)
    ] = ("episodic",)
    whole_batch: StrictBool = False
    smallest_batch: Count = 1
    trains: StrictBool = True
    head: StrictStr | None = None
    features: StrictBool = False
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
    """

    settings: type[Strict]
    others: tuple[str, ...]
    protocols: tuple[str, ...]
    smallest_batch: int
    trains: bool
    head: str | None
    predicts: bool


def method_names(methods: Path = METHODS) -> tuple[str, ...]:
    """List the method files of a folder by name."""
    return tuple(
        sorted(
            file.stem
            for file in methods.glob("*.py")
            if not file.stem.startswith("_") and file.stem != ALIAS
        )
    )


def find_source(module: str) -> Path | None:
    """Find the source file of a module by its dotted path, importing nothing; None: there is none."""
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
    if (file := find_source(method)) is None:
        raise UserError(
            f"no module {method!r} with a source file, neither in this folder nor in an installed package; "
            "expected a dotted path such as my_package.my_method"
        )
    return file


@cache
def declared(method: str, methods: Path = METHODS) -> Declared:
    """Read the one public dataclass of a method's file that derives from `tttlab.adaptation.method.Method`.

    Its annotated fields are the settings, except those that are ``ClassVar``, private, ``init=False``, or of a type
    that is not built from plain ones.

    Raises:
        UserError: there is no such file, it is not valid Python, it has not exactly one such class, the class has no loss to
            train with, a setting has no type or no default, or something else that it says of itself makes no sense.
    """
    file = method_file(method, methods)
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}: not valid Python ({error.msg})") from error
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and _is_method(node)]
    if len(classes) != 1:
        raise UserError(
            f"{file}: expected one public class with @dataclass and the base Method, found {len(classes)}"
        )
    try:
        return _declared(classes[0], method)
    except _Mistake as mistake:
        line, text = mistake.args
        raise UserError(f"{file}, line {line}: {text}") from mistake


class _Mistake(Exception):
    """The line of the file, and what is wrong there."""


def _declared(node: ast.ClassDef, method: str) -> Declared:
    attributes, fields = _attributes(node), [_field(statement) for statement in node.body]
    if attributes.trains and len(node.bases) == 1 and "loss" not in _bound(node):
        raise _Mistake(node.lineno, f"class {node.name} {NO_LOSS}")
    return Declared(
        settings=create_model(
            f"{method} settings",
            __base__=Strict,
            **{field.name: (field.type, field.default) for field in fields if field and field.type},
        ),
        others=tuple(field.name for field in fields if field and not field.type),
        protocols=attributes.protocols,
        smallest_batch=attributes.smallest_batch,
        trains=attributes.trains,
        head=attributes.head,
        predicts=not _bound(node).isdisjoint({"predict", "predict_batch"}),
    )


def _is_method(node: ast.ClassDef) -> bool:
    calls = [
        decorator.func if isinstance(decorator, ast.Call) else decorator
        for decorator in node.decorator_list
    ]
    named = any(ast.unparse(base).rpartition(".")[2] == "Method" for base in node.bases)
    return (
        named
        and not node.name.startswith("_")
        and any(ast.unparse(call).endswith("dataclass") for call in calls)
    )


def _bound(node: ast.ClassDef) -> set[str]:
    """Name what the body of a class defines or assigns."""
    functions = {own.name for own in node.body if isinstance(own, ast.FunctionDef)}
    return functions | {name for own in node.body for name in _assigned(own)}


def _assigned(statement: ast.stmt) -> list[str]:
    targets = (
        statement.targets
        if isinstance(statement, ast.Assign)
        else [getattr(statement, "target", None)]
    )
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _attributes(node: ast.ClassDef) -> Attributes:
    """Read what the class says of itself."""
    values, lines = {}, {}
    for statement in node.body:
        for name in {*_assigned(statement)} & {*Attributes.model_fields}:
            lines[name] = statement.lineno
            try:
                found = ast.literal_eval(statement.value)
            except ValueError as error:
                raise _Mistake(
                    statement.lineno,
                    f"expected {name} as a plain value, found {ast.unparse(statement.value)}; "
                    "this file is read without being run",
                ) from error
            values[name] = list(found) if isinstance(found, tuple) else found
    try:
        return Attributes.model_validate(values)
    except ValidationError as error:
        place, text = tell(error, values)[0]
        name = re.match(r"\w+", place)[0]
        raise _Mistake(lines[name], f"{name}: {text}") from error


class _Field(NamedTuple):
    """A field that can be given to the class; ``type`` None: params.yaml cannot hold it."""

    name: str
    type: Any
    default: Any


def _field(node: ast.stmt) -> _Field | None:
    """Read the statement if it declares a field of the class."""
    if isinstance(node, ast.Assign):
        _refuse_untyped(node)
    if (
        not isinstance(node, ast.AnnAssign)
        or not isinstance(node.target, ast.Name)
        or node.target.id.startswith("_")
    ):
        return None
    name, kind, default = node.target.id, ast.unparse(node.annotation).strip("'\""), node.value
    if re.match(r"(\w+\.)?ClassVar\b", kind):
        return None
    if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("field"):
        options = {keyword.arg: keyword.value for keyword in default.keywords}
        if "init" in options and ast.unparse(options["init"]) == "False":
            return None
        default = options.get("default", options.get("default_factory"))
    if default is None:
        raise _Mistake(
            node.lineno, f"setting {name} has no default; write {name}: {kind} = <value>"
        )
    try:
        return _Field(name, _plain_type(node.annotation), _literal(default))
    except Exception:  # whatever fails, it is not built from plain types
        return _Field(name, None, None)


def _refuse_untyped(node: ast.Assign) -> None:
    """Raise for what looks like a setting and, without a type, is none."""
    try:
        value = ast.literal_eval(node.value)
    except ValueError:
        return
    for name in _assigned(node):
        if (
            name.islower()
            and not name.startswith("_")
            and name not in {*Attributes.model_fields, *HOOKS}
        ):
            raise _Mistake(
                node.lineno,
                f"{name} has no type, so that it is no setting; write {name}: {type(value).__name__} = "
                f"{ast.unparse(node.value)}, or in capitals if it is a constant",
            )


def _plain_type(node: ast.expr) -> Any:
    """Evaluate an annotation in a namespace that holds plain types only."""
    annotation = eval(
        compile(ast.Expression(node), "<annotation>", "eval"), {"__builtins__": {}}, _PLAIN_TYPES
    )
    if isinstance(annotation, str):
        annotation = eval(annotation, {"__builtins__": {}}, _PLAIN_TYPES)
    TypeAdapter(annotation)
    return annotation


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Field(default=None)  # only the method's own code can compute it, and will
