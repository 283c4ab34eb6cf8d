"""Which of the project's code every DVC stage runs, and that written into dvc.yaml: ``uv run python tools/stage_code.py``."""

import ast
import re
from functools import cache
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"tttlab": ROOT / "src" / "tttlab", "pipeline": ROOT / "pipeline"}
SOURCES = sorted(path for folder in FOLDERS.values() for path in folder.rglob("*.py"))


def module_name(path: Path) -> str:
    """Name the module that a file is."""
    root = next(name for name, folder in FOLDERS.items() if path.is_relative_to(folder))
    parts = (root, *path.relative_to(FOLDERS[root]).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


BY_NAME = {module_name(path): path for path in SOURCES}


@cache
def imported(path: Path) -> frozenset[str]:
    """List every module that a file imports anywhere in it, with the packages above them."""
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
    """List the project's files that these files import, directly or not, themselves included."""
    found, waiting = set(), list(start)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [BY_NAME[name] for name in imported(path) if name in BY_NAME]
    return {path for path in found if path.stat().st_size}  # an empty __init__.py changes nothing


def stages() -> dict[str, dict]:
    """Read the stages of dvc.yaml."""
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def needed(name: str) -> set[str]:
    """List the files that a stage's process runs: its script and what that imports. Methods are the stage `methods`' business.

    Checkpoints import objectives by their names.
    """
    start = [FOLDERS["pipeline"] / f"{name.split('@')[0]}.py", FOLDERS["pipeline"] / "__init__.py"]
    found = closure(*start)
    if FOLDERS["tttlab"] / "networks" / "checkpoints.py" in found:
        found |= closure(*(FOLDERS["tttlab"] / "objectives").glob("*.py"))
    return {path.relative_to(ROOT).as_posix() for path in found}


def expected(name: str) -> list[str]:
    """List what a stage must name of the code it runs: a folder where it runs at least half of its files, else these files."""
    files, listed = needed(name), set()
    for file in files:
        room = ROOT / Path(file).parent
        parts = [path for path in room.rglob("*.py") if path.stat().st_size]
        share = sum(path.relative_to(ROOT).as_posix() in files for path in parts) / len(parts)
        whole = (
            room.is_relative_to(FOLDERS["tttlab"]) and room != FOLDERS["tttlab"] and share >= 0.5
        )
        listed.add(room.relative_to(ROOT).as_posix() if whole else file)
    return sorted(
        path for path in listed if not any(path.startswith(f"{other}/") for other in listed)
    )


def main() -> None:
    """Replace the code among the deps of every stage; the rest of dvc.yaml stays as it is."""
    path, stage, written = ROOT / "dvc.yaml", "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if named := re.fullmatch(r"  (\w+):", line):
            stage = named[1]
        code = re.fullmatch(r"( +- )(src/tttlab|pipeline)/.*", line)
        if not code:
            written.append(line)
        elif not re.fullmatch(
            r" +- (src/tttlab|pipeline)/.*", written[-1]
        ):  # the first of them stands for all
            written += [code[1] + dependency for dependency in expected(stage)]
    path.write_text("\n".join(written) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
