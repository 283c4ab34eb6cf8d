"""Hashes of the code that a method executes: its module, and the modules that this imports.

Docstrings, comments and layout do not count.
"""

import ast
import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

from tttlab.config.method_settings import find_module_file
from tttlab.errors import UserError

Code = dict[str, str]  # module → SHA-256, hexadecimal; the method's own module comes first


class Module(NamedTuple):
    """A module's source text.

    Attributes:
        code: hash of what it executes.
        imported: modules that it may import, and the packages above these and above itself.
    """

    code: str
    imported: frozenset[str]


def method_code(method: str) -> Code:
    """Hash what a method executes.

    That is its module and, of what this imports directly or indirectly, the modules of its own
    top-level package and of tttlab.

    Args:
        method: name of a file of ``tttlab/methods``, or the dotted path of a module elsewhere.

    Raises:
        UserError: one of these files is not valid Python.
    """
    return module_code(method if "." in method else f"tttlab.methods.{method}")


def module_code(start: str) -> Code:
    """Hash what a module executes, in the same way; empty for a module without Python source.

    Args:
        start: the module's dotted path; it may lie anywhere.

    Raises:
        UserError: one of these files is not valid Python.
    """
    packages = {start.partition(".")[0], "tttlab"}
    hashes, seen, waiting = {}, set(), [start]
    while waiting:
        name = waiting.pop()
        if name in seen or name.partition(".")[0] not in packages:
            continue
        seen.add(name)
        file = find_module_file(name)
        if file is not None:  # else a class, a function, or a package without a file
            hashes[name], imported = read_module(name, file)
            waiting += imported
    first = {start: hashes.pop(start)} if start in hashes else {}
    return {**first, **dict(sorted(hashes.items()))}


@cache
def read_module(name: str, file: Path) -> Module:
    """Read the source text of a module.

    Raises:
        UserError: it is not valid Python.
    """
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    text = file.read_bytes()
    try:
        tree = ast.parse(text)
        names = {name, *_imported(tree, package)}
    except (SyntaxError, ImportError) as error:
        raise UserError(f"{file}: cannot be imported ({error})") from error
    if b"__doc__" not in text:  # else the code may use its docstrings
        _remove_docstrings(tree)
    code = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()
    with_packages = frozenset(
        ".".join(imported.split(".")[:depth])
        for imported in names
        for depth in range(1, imported.count(".") + 2)
    )
    return Module(code, with_packages)


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
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                del node.body[0]


def describe_changes(
    before: Mapping[str, Mapping[str, Code]], after: Mapping[str, Mapping[str, Code]]
) -> list[str]:
    """Say which runs are new, have another method, or have a method whose code has changed.

    Args:
        before: run → model → what was executed.
        after: run → model → what is executed.
    """
    new, replaced, changed = [], [], []
    for run, codes in after.items():
        old_codes, methods = before.get(run), _methods(codes)
        if old_codes is None:
            new.append(f"{run!r} ({methods})")
        elif _methods(old_codes) != methods:
            replaced.append(f"{run!r} ({methods} instead of {_methods(old_codes)})")
        elif modules := _changed_modules(old_codes, codes):
            changed.append(f"{run!r} ({', '.join(sorted(modules))})")
    runs_by_heading = {
        "new runs": new,
        "runs with another method": replaced,
        "runs whose method's code has changed": changed,
    }
    lines = [f"{heading}: {', '.join(runs)}" for heading, runs in runs_by_heading.items() if runs]
    return lines or ["no method's code has changed"]


def _methods(codes: Mapping[str, Code]) -> str:
    """Name the methods of a run's models, each once."""
    modules = [next(iter(code)) for code in codes.values()]
    names = [module.removeprefix("tttlab.methods.") for module in modules]
    return ", ".join(dict.fromkeys(names))


def _changed_modules(old: Mapping[str, Code], new: Mapping[str, Code]) -> set[str]:
    """Name the modules that a model has in only one of two executions, or with another hash."""
    changed = set()
    for model in old.keys() & new.keys():
        changed |= {module for module, _ in old[model].items() ^ new[model].items()}
    return changed
