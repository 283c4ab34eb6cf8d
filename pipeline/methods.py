"""Note the source text of every run's method, so that DVC reruns a run whose method was edited, wherever that lies."""

import ast
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pipeline
from tttlab.errors import UserError
from tttlab.method_settings import find_source
from tttlab.params import Params


def run(params: Params) -> None:
    """Write outputs/methods/<run>.json, for every model hashes of what its method runs, and say where one has changed."""
    folder = pipeline.OUTPUTS / "methods"
    folder.mkdir(parents=True, exist_ok=True)
    before = {path: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    changed = []
    for name in params.adapt.runs:
        found = {model: sources(module_name(params.run_settings(name, model).method)) for model in params.models_of(name)}
        text, path = json.dumps(found, indent=2) + "\n", folder / f"{name}.json"
        if before.pop(path, None) != text:
            changed.append(name)
            path.write_text(text, encoding="utf-8")
    for path in before:  # of runs that are no more
        path.unlink()
    print(f"new or changed: {', '.join(changed)}" if changed else "the methods of all runs are as they were")


def module_name(method: str) -> str:
    """Give the dotted path of a method's module."""
    return method if "." in method else f"tttlab.methods.{method}"


def sources(start: str) -> dict[str, str]:
    """Hash the source text of a module, first, and of what it imports from its own package and from tttlab, directly or not.

    Returns:
        module → SHA-256 of its file, hexadecimal.
    """
    packages = {start.partition(".")[0], "tttlab"}
    found, seen, waiting = {}, set(), [start]
    while waiting:
        name = waiting.pop()
        if name in seen or name.partition(".")[0] not in packages:
            continue
        seen.add(name)
        if (file := find_source(name)) is not None:  # else a class, a function, or a package without a file
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
            waiting += imported(name, file)
    return {start: found.pop(start), **dict(sorted(found.items()))}


@cache
def imported(module: str, file: Path) -> frozenset[str]:
    """List what a module may import, anywhere in its text, with the packages above it and above these."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    try:
        names = {module, *_imported(ast.parse(file.read_bytes()), package)}
    except (SyntaxError, ImportError) as error:
        raise UserError(f"{file}: cannot be imported ({error})") from error
    return frozenset(".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2))


def _imported(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


if __name__ == "__main__":
    pipeline.main(run, __doc__)
