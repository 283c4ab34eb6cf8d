"""Write the code that every DVC stage runs into dvc.yaml and arc/dvc.yaml.

``uv run python tools/stage_code.py``
"""

import ast
import os
import re
from functools import cache
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
PIPELINES = (ROOT, ROOT / "arc")  # folders with a dvc.yaml, and the stages' scripts in pipeline/
FOLDERS = {"tttlab": ROOT / "src" / "tttlab", "pipeline": ROOT / "pipeline"}
SOURCES = sorted(path for folder in FOLDERS.values() for path in folder.rglob("*.py"))


def module_name(path: Path) -> str:
    """Name the module of a file."""
    root = next(name for name, folder in FOLDERS.items() if path.is_relative_to(folder))
    parts = (root, *path.relative_to(FOLDERS[root]).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


BY_NAME = {module_name(path): path for path in SOURCES}


@cache
def imported(path: Path) -> frozenset[str]:
    """List the modules that a file imports anywhere, and the packages above them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(
        ".".join(name.split(".")[:depth])
        for name in names
        for depth in range(1, name.count(".") + 2)
    )


def closure(*start: Path) -> set[Path]:
    """List these files and the project's files that they import, directly or indirectly."""
    visited, waiting = set(), list(start)
    while waiting:
        path = waiting.pop()
        if path not in visited:
            visited.add(path)
            waiting += [BY_NAME[name] for name in imported(path) if name in BY_NAME]
    return {path for path in visited if path.stat().st_size}  # without empty __init__.py


def stages(home: Path = ROOT) -> dict[str, dict]:
    """Read the stages of a pipeline's dvc.yaml."""
    return YAML(typ="safe").load((home / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def needed(name: str, home: Path = ROOT) -> set[str]:
    """List the files that a stage's process runs: its script, and the imports of that.

    A checkpoint imports its objective by name, so that all objectives are added where checkpoints
    are. Methods are not: the stage ``methods`` watches them.
    """
    scripts = home / "pipeline"
    files = closure(scripts / f"{name.split('@')[0]}.py", scripts / "__init__.py")
    if FOLDERS["tttlab"] / "networks" / "checkpoints.py" in files:
        files |= closure(*(FOLDERS["tttlab"] / "objectives").glob("*.py"))
    return {path.relative_to(ROOT).as_posix() for path in files}


def expected(name: str, home: Path = ROOT) -> list[str]:
    """List a stage's dependencies on code: files, or a room where it runs at least half of them."""
    files, listed = needed(name, home), set()
    for file in files:
        room = ROOT / Path(file).parent
        modules = [path for path in room.rglob("*.py") if path.stat().st_size]
        share = sum(path.relative_to(ROOT).as_posix() in files for path in modules) / len(modules)
        is_room = room.is_relative_to(FOLDERS["tttlab"]) and room != FOLDERS["tttlab"]
        whole = is_room and share >= 0.5
        listed.add(room.relative_to(ROOT).as_posix() if whole else file)
    folders = tuple(f"{path}/" for path in listed)
    kept = sorted(path for path in listed if not path.startswith(folders))
    return [Path(os.path.relpath(ROOT / path, home)).as_posix() for path in kept]


def write(home: Path) -> None:
    """Write the code that every stage runs behind its other deps; nothing else changes."""
    path, stage, lines = home / "dvc.yaml", "", []
    code = re.compile(r" +- ((\.\./)?src/tttlab|pipeline)/.*")
    indent = None  # of the list of deps, inside such a list
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if heading := re.fullmatch(r"  (\w+):", line):
            stage = heading[1]
        if indent is not None and not line.startswith(f"{indent}  - "):
            lines += [f"{indent}  - {file}" for file in expected(stage, home)]
            indent = None
        if start := re.fullmatch(r"( +)deps:", line):
            indent = start[1]
        if not code.fullmatch(line):
            lines.append(line)
    path.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    for pipeline in PIPELINES:
        write(pipeline)
