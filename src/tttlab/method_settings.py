"""What a test-time method declares, read from its source text: importing the file would cost seconds of torch."""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import annotated_types
from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, create_model

from tttlab.errors import UserError
from tttlab.settings import Strict

METHODS = Path(__file__).parent / "methods"
ALIAS = "ssl"  # as a run's method: the objective that each model was trained with

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


@dataclass(frozen=True)
class Declared:
    """What a method's file says about it.

    Attributes:
        settings: its fields, ready to validate.
        protocols: the protocols that it supports.
        smallest_batch: the fewest images of a stream's batch that it can work on.
        trains: whether it takes steps.
        head: the objective whose head it needs; None: any network will do.
        predicts: whether it has a prediction of its own.
    """

    settings: type[Strict]
    protocols: tuple[str, ...]
    smallest_batch: int
    trains: bool
    head: str | None
    predicts: bool


def method_names(methods: Path = METHODS) -> tuple[str, ...]:
    """List the method files of a folder by name."""
    return tuple(sorted(file.stem for file in methods.glob("*.py") if not file.stem.startswith("_") and file.stem != ALIAS))


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
        raise UserError(f"no module {method!r} with a source file, neither in this folder nor in an installed package; "
                        "expected a dotted path such as my_package.my_method")  # fmt: skip
    return file


@cache
def declared(method: str, methods: Path = METHODS) -> Declared:
    """Read the one public dataclass of a method's file that derives from `tttlab.method.Method`.

    Its annotated fields are the settings, except those that are ``ClassVar``, private, ``init=False``, or of a type
    that is not built from plain ones.

    Raises:
        UserError: there is no such file, it is not valid Python, or it has not exactly one such class.
    """
    file = method_file(method, methods)
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}: not valid Python ({error.msg})") from error
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and _is_method(node)]
    if len(classes) != 1:
        raise UserError(f"{file}: expected one public class with @dataclass and the base Method, found {len(classes)}")
    fields = {name: field for node in classes[0].body for name, field in _field(node)}
    return Declared(
        settings=create_model(f"{method} settings", __base__=Strict, **fields),
        protocols=tuple(_class_attribute(classes[0], "protocols", ("episodic",))),
        smallest_batch=_class_attribute(classes[0], "smallest_batch", 1),
        trains=bool(_class_attribute(classes[0], "trains", True)),
        head=_class_attribute(classes[0], "head", None),
        predicts=any(
            isinstance(node, ast.FunctionDef) and node.name in ("predict", "predict_batch") for node in classes[0].body
        ),
    )


def _is_method(node: ast.ClassDef) -> bool:
    calls = [decorator.func if isinstance(decorator, ast.Call) else decorator for decorator in node.decorator_list]
    named = any(ast.unparse(base).rpartition(".")[2] == "Method" for base in node.bases)
    return named and not node.name.startswith("_") and any(ast.unparse(call).endswith("dataclass") for call in calls)


def _class_attribute(node: ast.ClassDef, name: str, default: Any) -> Any:
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            try:
                return ast.literal_eval(statement.value)
            except ValueError as error:
                raise UserError(f"class {node.name}, line {statement.lineno}: expected {name} as a plain value, found "
                                f"{ast.unparse(statement.value)}; this file is read without being run") from error  # fmt: skip
    return default


def _field(node: ast.stmt) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield (name, (type, default)) if the statement declares a setting."""
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.target.id.startswith("_"):
        return
    try:
        annotation = _plain_type(node.annotation)
    except Exception:  # whatever fails, it is not built from plain types
        return
    default = node.value
    if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("field"):
        options = {keyword.arg: keyword.value for keyword in default.keywords}
        if "init" in options and ast.unparse(options["init"]) == "False":
            return
        default = options.get("default", options.get("default_factory"))
    yield node.target.id, (annotation, ... if default is None else _literal(default))


def _plain_type(node: ast.expr) -> Any:
    """Evaluate an annotation in a namespace that holds plain types only."""
    annotation = eval(compile(ast.Expression(node), "<annotation>", "eval"), {"__builtins__": {}}, _PLAIN_TYPES)
    if isinstance(annotation, str):
        annotation = eval(annotation, {"__builtins__": {}}, _PLAIN_TYPES)
    TypeAdapter(annotation)
    return annotation


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Field(default=None)  # only the method's own code can compute it, and will
