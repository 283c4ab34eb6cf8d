"""What a class in a source file declares, read from its text.

Importing the file would cost seconds, for it imports torch.
"""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Optional, TypeVar, Union

import annotated_types
from pydantic import (
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)

from tttlab.config.strict import Strict, list_mistakes
from tttlab.config.values import DISTINCT
from tttlab.errors import UserError

T = TypeVar("T")

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
    "DISTINCT": DISTINCT,
    **{name: getattr(annotated_types, name) for name in _MARKERS},
}


class Mistake(Exception):
    """The line of the file, and what is wrong there."""


class Setting(NamedTuple):
    """A field that can be given to the class; ``type`` None: params.yaml cannot hold it."""

    name: str
    type: Any
    default: Any


def read_class(file: Path, base: str, read: Callable[[ast.ClassDef], T]) -> T:
    """Read what the one public dataclass of a file that derives from ``base`` declares.

    Args:
        file: the source file.
        base: the name of a class.
        read: reads the class's definition; a `Mistake` says what is wrong with it.

    Raises:
        UserError: the file is not valid Python, has not exactly one such class, or a mistake.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}: not valid Python ({error.msg})") from error
    classes = _dataclasses_of(tree, base)
    if len(classes) != 1:
        raise UserError(
            f"{file}: expected one public class with @dataclass and the base {base}, "
            f"found {len(classes)}"
        )
    try:
        return read(classes[0])
    except Mistake as mistake:
        line, text = mistake.args
        raise UserError(f"{file}, line {line}: {text}") from mistake


def _dataclasses_of(tree: ast.Module, base: str) -> list[ast.ClassDef]:
    """List the public dataclasses of a file that derive from a class of this name."""
    return [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any(ast.unparse(parent).rpartition(".")[2] == base for parent in node.bases)
        and any(_is_dataclass(decorator) for decorator in node.decorator_list)
    ]


def _is_dataclass(decorator: ast.expr) -> bool:
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(function).endswith("dataclass")


def bound_names(node: ast.ClassDef) -> set[str]:
    """Name what the body of a class defines or assigns."""
    functions = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    return functions | {name for part in node.body for name in assigned_names(part)}


def assigned_names(statement: ast.stmt) -> list[str]:
    """Name what a statement assigns."""
    one = [getattr(statement, "target", None)]
    targets = statement.targets if isinstance(statement, ast.Assign) else one
    return [target.id for target in targets if isinstance(target, ast.Name)]


def read_attributes(node: ast.ClassDef, allowed: type[Strict]) -> Any:
    """Read what a class says of itself beside its settings.

    Args:
        node: the class.
        allowed: the attributes, with the types and defaults of their values.

    Raises:
        Mistake: a value is of another type, or must be computed.
    """
    values, lines = {}, {}
    for statement in node.body:
        for name in {*assigned_names(statement)} & {*allowed.model_fields}:
            lines[name] = statement.lineno
            try:
                value = ast.literal_eval(statement.value)
            except ValueError as error:
                raise Mistake(
                    statement.lineno,
                    f"expected {name} as a plain value, found {ast.unparse(statement.value)}; "
                    "this file is read without being run",
                ) from error
            values[name] = list(value) if isinstance(value, tuple) else value
    try:
        return allowed.model_validate(values)
    except ValidationError as error:
        path, text = list_mistakes(error, values)[0]
        name = re.match(r"\w+", path)[0]
        raise Mistake(lines[name], f"{name}: {text}") from error


def read_setting(node: ast.stmt) -> Setting | None:
    """Read a statement of a class's body if it declares a setting.

    That is an annotated field, unless it is ``ClassVar``, private, or ``init=False``.

    Raises:
        Mistake: the setting has no default.
    """
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
        return None
    name, kind, default = node.target.id, ast.unparse(node.annotation).strip("'\""), node.value
    if name.startswith("_") or re.match(r"(\w+\.)?ClassVar\b", kind):
        return None
    if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("field"):
        options = {keyword.arg: keyword.value for keyword in default.keywords}
        if "init" in options and ast.unparse(options["init"]) == "False":
            return None
        default = options.get("default", options.get("default_factory"))
    if default is None:
        raise Mistake(node.lineno, f"setting {name} has no default; write {name}: {kind} = <value>")
    try:
        return Setting(name, _plain_type(node.annotation), _literal(default))
    except Exception:  # whatever fails, it is not built from plain types
        return Setting(name, None, None)


def _plain_type(node: ast.expr) -> Any:
    """Evaluate an annotation in a namespace that holds plain types only."""
    code = compile(ast.Expression(node), "<annotation>", "eval")
    annotation = eval(code, {"__builtins__": {}}, _PLAIN_TYPES)
    if isinstance(annotation, str):
        annotation = eval(annotation, {"__builtins__": {}}, _PLAIN_TYPES)
    TypeAdapter(annotation)
    return annotation


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Field(default=None)  # only the class's own code can compute it, and will
