"""Write the code that every DVC stage runs into dvc.yaml: ``uv run python tools/stage_code.py``."""

import ast
import re
from functools import cache
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
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


def stages() -> dict[str, dict]:
    """Read the stages of dvc.yaml."""
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def needed(name: str) -> set[str]:
    """List the files that a stage's process runs: its script, and the imports of that.

    A checkpoint imports its objective by name, so that all objectives are added where checkpoints
    are. Methods are not: the stage ``methods`` watches them.
    """
    start = [FOLDERS["pipeline"] / f"{name.split('@')[0]}.py", FOLDERS["pipeline"] / "__init__.py"]
    files = closure(*start)
    if FOLDERS["tttlab"] / "networks" / "checkpoints.py" in files:
        files |= closure(*(FOLDERS["tttlab"] / "objectives").glob("*.py"))
    return {path.relative_to(ROOT).as_posix() for path in files}


def expected(name: str) -> list[str]:
    """List a stage's dependencies on code: files, or a room where it runs at least half of them."""
    files, listed = needed(name), set()
    for file in files:
        room = ROOT / Path(file).parent
        modules = [path for path in room.rglob("*.py") if path.stat().st_size]
        share = sum(path.relative_to(ROOT).as_posix() in files for path in modules) / len(modules)
        is_room = room.is_relative_to(FOLDERS["tttlab"]) and room != FOLDERS["tttlab"]
        whole = is_room and share >= 0.5
        listed.add(room.relative_to(ROOT).as_posix() if whole else file)
    folders = tuple(f"{path}/" for path in listed)
    return sorted(path for path in listed if not path.startswith(folders))


def main() -> None:
    """Write the code that every stage runs behind its other deps; nothing else changes."""
    path, stage, lines = ROOT / "dvc.yaml", "", []
    code = re.compile(r" +- (src/tttlab|pipeline)/.*")
    indent = None  # of the list of deps, inside such a list
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if heading := re.fullmatch(r"  (\w+):", line):
            stage = heading[1]
        if indent is not None and not line.startswith(f"{indent}  - "):
            lines += [f"{indent}  - {file}" for file in expected(stage)]
            indent = None
        if start := re.fullmatch(r"( +)deps:", line):
            indent = start[1]
        if not code.fullmatch(line):
            lines.append(line)
    path.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
