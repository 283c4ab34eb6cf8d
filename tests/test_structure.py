"""The package's own rules: what may import what, and what every DVC stage depends on."""

import ast
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tttlab.adaptation.method_code import method_code
from tttlab.config.method_settings import method_names

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"tttlab": ROOT / "src" / "tttlab", "pipeline": ROOT / "pipeline"}
SOURCES = sorted(path for folder in FOLDERS.values() for path in folder.rglob("*.py"))
METHODS = FOLDERS["tttlab"] / "methods"


def module_name(path: Path) -> str:
    root = next(name for name, folder in FOLDERS.items() if path.is_relative_to(folder))
    parts = (root, *path.relative_to(FOLDERS[root]).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


BY_NAME = {module_name(path): path for path in SOURCES}


@cache
def imported(path: Path) -> frozenset[str]:
    """Every module that a file imports anywhere in it, with the packages above them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2))


def closure(*start: Path) -> set[Path]:
    """The project's files that these files import, directly or not, themselves included."""
    found, waiting = set(), list(start)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [BY_NAME[name] for name in imported(path) if name in BY_NAME]
    return {path for path in found if path.stat().st_size}  # an empty __init__.py changes nothing


def stages() -> dict[str, dict]:
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def needed(name: str) -> set[str]:
    """Files that a stage's process runs: its script and what that imports; methods are the business of the stage `methods`.

    Checkpoints import objectives by their names.
    """
    start = [FOLDERS["pipeline"] / f"{name.split('@')[0]}.py", FOLDERS["pipeline"] / "__init__.py"]
    found = closure(*start)
    if FOLDERS["tttlab"] / "networks" / "checkpoints.py" in found:
        found |= closure(*(FOLDERS["tttlab"] / "objectives").glob("*.py"))
    return {path.relative_to(ROOT).as_posix() for path in found}


def expected(name: str) -> list[str]:
    """What a stage must list of the code it runs: a folder where it runs at least half of its files, else these files."""
    files, listed = needed(name), set()
    for file in files:
        room = ROOT / Path(file).parent
        parts = [path for path in room.rglob("*.py") if path.stat().st_size]
        share = sum(path.relative_to(ROOT).as_posix() in files for path in parts) / len(parts)
        whole = room.is_relative_to(FOLDERS["tttlab"]) and room != FOLDERS["tttlab"] and share >= 0.5
        listed.add(room.relative_to(ROOT).as_posix() if whole else file)
    return sorted(path for path in listed if not any(path.startswith(f"{other}/") for other in listed))


@pytest.mark.parametrize("name", stages())
def test_every_stage_depends_on_the_code_it_runs(name):
    deps = stages()[name].get("do", stages()[name])["deps"]
    assert [path for path in deps if path.startswith(("pipeline", "src"))] == expected(name)


def test_every_stage_that_loads_a_method_depends_on_its_text():
    loads = {
        name
        for name in stages()
        if FOLDERS["tttlab"] / "adaptation" / "registry.py" in closure(FOLDERS["pipeline"] / f"{name}.py")
    }
    watches = {name for name, stage in stages().items() if "outputs/methods/${key}.json" in stage.get("do", stage)["deps"]}
    assert loads - {"methods"} == watches == {"tune", "adapt", "align"}
    assert stages()["methods"]["always_changed"]  # a method may lie where DVC does not look


@pytest.mark.parametrize("method", method_names())
def test_the_text_of_a_method_is_all_that_it_imports(method):
    found = {BY_NAME[name] for name in method_code(method)}
    assert {path for path in found if path.stat().st_size} == closure(METHODS / f"{method}.py")


def test_methods_are_tried_before_anything_else():
    """What `prepare` waits for is always the same, so that nothing reruns for it."""
    first = {name for name, stage in stages().items() if "outputs/methods/usable" in stage.get("do", stage)["deps"]}
    before_all = {
        name for name, stage in stages().items() if not any("outputs/" in path for path in stage.get("do", stage)["deps"])
    }
    assert (first, before_all) == ({"prepare"}, {"methods"})


def test_every_stage_that_computes_depends_on_the_libraries_versions():
    """After `make pins` nothing is up to date."""
    assert {name for name, stage in stages().items() if "requirements.txt" not in stage.get("do", stage)["deps"]} == {"methods"}


def test_stages_say_what_they_do_and_watch_parameters():
    for name, stage in stages().items():
        body = stage.get("do", stage)
        assert body.get("desc"), name
        assert "machine" not in str(body.get("params", "")), f"{name}: machine settings change no result"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_tracking_imports_mlflow_and_sources_read_no_surroundings(path):
    tree, name = ast.parse(path.read_text(encoding="utf-8")), module_name(path)
    if name != "tttlab.tracking":
        assert not any(module.split(".")[0] == "mlflow" for module in imported(path))
    if name.startswith("tttlab") and not name.startswith("tttlab.workflow"):
        read = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not read & {"sys.argv", "os.environ", "os.getenv", "Path.cwd", "os.getcwd"}


# Every room imports from those above it alone.
ROOMS = (
    "errors", "seeding", "config", "runtime", "data", "shifts", "networks", "objectives", "training", "adaptation", "methods",
    "evaluation", "experiments", "reporting", "tracking", "workflow",
)  # fmt: skip


def test_every_module_is_in_a_room():
    assert {name.split(".")[1] for name in BY_NAME if name.startswith("tttlab.")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    below = ROOMS[ROOMS.index(room) + 1 :]
    wrong = {
        (name, other)
        for name, path in BY_NAME.items()
        if name.split(".")[:2] == ["tttlab", room]
        for other in imported(path) & BY_NAME.keys()
        if other.startswith("pipeline") or set(other.split(".")[1:2]) & set(below)
    }
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_no_modules_of_a_room_import_each_other_in_a_circle(room):
    own = {name: path for name, path in BY_NAME.items() if name.split(".")[:2] == ["tttlab", room]}
    graph = {name: {other for other in imported(path) & own.keys() if not name.startswith(other)} for name, path in own.items()}
    order = TopologicalSorter(graph)
    assert len(list(order.static_order())) == len(own)


def test_package_files_are_empty_but_for_corruptions():
    full = {module_name(path) for path in SOURCES if path.name == "__init__.py" and path.stat().st_size}
    assert full == {"pipeline", "tttlab.shifts.corruptions"}


@pytest.mark.parametrize("path", [path for path in SOURCES if module_name(path).startswith("pipeline")], ids=module_name)
def test_scripts_are_thin_and_hide_no_standard_module(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80
    assert path.stem not in sys.stdlib_module_names or path.stem == "__init__"
