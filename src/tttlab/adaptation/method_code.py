"""What a method executes, by hash: its module and all that this imports, without docstrings, comments and layout."""

import ast
import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

from tttlab.config.method_settings import find_module_file
from tttlab.errors import UserError

Code = dict[str, str]  # module → SHA-256, hexadecimal; the method's own comes first


class Module(NamedTuple):
    """The hash of what a file executes, and the modules that it may import, with the packages above it and above these."""

    code: str
    imported: frozenset[str]


def method_code(method: str) -> Code:
    """Hash what a method executes: its module, and what that imports from its own package and from tttlab, directly or not.

    Args:
        method: a file of ``tttlab/methods``, or the dotted path of a module elsewhere.

    Raises:
        UserError: a file among these is not valid Python.
    """
    start = method if "." in method else f"tttlab.methods.{method}"
    packages = {start.partition(".")[0], "tttlab"}
    found, seen, waiting = {}, set(), [start]
    while waiting:
        name = waiting.pop()
        if name in seen or name.partition(".")[0] not in packages:
            continue
        seen.add(name)
        if (
            file := find_module_file(name)
        ) is not None:  # else a class, a function, or a package without a file
            found[name], imported = read_module(name, file)
            waiting += imported
    return {start: found.pop(start), **dict(sorted(found.items()))}


@cache
def read_module(name: str, file: Path) -> Module:
    """Read the source text of a module."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    text = file.read_bytes()
    try:
        tree = ast.parse(text)
        names = {name, *_imported(tree, package)}
    except (SyntaxError, ImportError) as error:
        raise UserError(f"{file}: cannot be imported ({error})") from error
    if b"__doc__" not in text:  # else what is said may be executed
        _remove_docstrings(tree)
    code = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()
    return Module(
        code,
        frozenset(
            ".".join(one.split(".")[:depth])
            for one in names
            for depth in range(1, one.count(".") + 2)
        ),
    )


def _imported(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def _remove_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                del node.body[0]


def tell_changes(
    before: Mapping[str, Mapping[str, Code]], after: Mapping[str, Mapping[str, Code]]
) -> list[str]:
    """Say which runs are new, which have another method, and whose method executes other code than before.

    Args:
        before: run → model → what was executed.
        after: run → model → what is executed.
    """
    new, other, changed = [], [], []
    for run, codes in after.items():
        old, methods = before.get(run), _methods(codes)
        if old is None:
            new.append(f"{run!r} ({methods})")
        elif _methods(old) != methods:
            other.append(f"{run!r} ({methods} instead of {_methods(old)})")
        elif modules := _changed_modules(old, codes):
            changed.append(f"{run!r} ({', '.join(sorted(modules))})")
    told = {
        "new runs": new,
        "runs with another method": other,
        "runs whose method's code has changed": changed,
    }
    return [f"{what}: {', '.join(runs)}" for what, runs in told.items() if runs] or [
        "no method's code has changed"
    ]


def _methods(codes: Mapping[str, Code]) -> str:
    """Name the methods of a run's models, each once."""
    return ", ".join(
        dict.fromkeys(next(iter(code)).removeprefix("tttlab.methods.") for code in codes.values())
    )


def _changed_modules(old: Mapping[str, Code], new: Mapping[str, Code]) -> set[str]:
    pairs = (
        {*old.get(model, {}).items()} ^ {*new.get(model, {}).items()}
        for model in old.keys() & new.keys()
    )
    return {module for pair in pairs for module, _ in pair}
