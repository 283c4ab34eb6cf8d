"""The package's own rules: what may import what, and what every DVC stage depends on."""

import ast
import re
import sys
from graphlib import TopologicalSorter

import pytest

from tools.stage_code import (
    BY_NAME,
    FOLDERS,
    PIPELINES,
    ROOT,
    SOURCES,
    closure,
    expected,
    imported,
    module_name,
    stages,
)
from tttlab.adaptation.method_code import method_code
from tttlab.config.method_settings import method_names
from tttlab.workflow.order import ARC_SHARES, SHARES

METHODS = FOLDERS["tttlab"] / "methods"


@pytest.mark.parametrize(("home", "shares"), [*zip(PIPELINES, (SHARES, ARC_SHARES), strict=True)])
def test_the_order_that_is_told_is_that_of_the_pipeline(home, shares):
    names, made_by = list(shares), {}
    assert sorted(names) == sorted(stages(home))
    assert sum(shares.values()) == 100
    for name, stage in stages(home).items():
        made_by |= {
            next(iter(out)) if isinstance(out, dict) else out: name for out in stage.get("outs", [])
        }
    for name, stage in stages(home).items():
        for dep in stage["deps"]:
            makers = {made for out, made in made_by.items() if f"{out}/".startswith(f"{dep}/")}
            assert all(names.index(maker) < names.index(name) for maker in makers - {name}), dep


@pytest.mark.parametrize(
    ("home", "name"), [(home, name) for home in PIPELINES for name in stages(home)]
)
def test_every_stage_depends_on_the_code_it_runs(home, name):
    """tools/stage_code.py writes this code into dvc.yaml."""
    deps = stages(home)[name].get("do", stages(home)[name])["deps"]
    code = [path for path in deps if path.startswith(("pipeline", "src", "../src"))]
    assert code == expected(name, home), "run: uv run python tools/stage_code.py"


def test_what_is_no_python_is_watched_with_its_room():
    """No import mentions the report's template, so its room must be listed as a whole."""
    rooms = {
        path.parent.relative_to(ROOT).as_posix()
        for path in FOLDERS["tttlab"].rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert rooms == {"src/tttlab/arc_results", "src/tttlab/reporting"}
    assert "src/tttlab/reporting" in stages()["report"]["deps"]
    assert "../src/tttlab/arc_results" in stages(ROOT / "arc")["report"]["deps"]


def test_every_stage_that_loads_a_method_depends_on_its_text():
    loads = {
        name
        for name in stages()
        if FOLDERS["tttlab"] / "adaptation" / "registry.py"
        in closure(FOLDERS["pipeline"] / f"{name}.py")
    }
    watches = {
        name
        for name, stage in stages().items()
        if "outputs/methods" in stage.get("do", stage)["deps"]
    }
    assert loads - {"methods"} == watches == {"tune", "adapt", "align", "register"}
    assert stages()["methods"]["always_changed"]  # a method may lie where DVC does not look


@pytest.mark.parametrize("method", method_names())
def test_the_text_of_a_method_is_all_that_it_imports(method):
    files = {BY_NAME[name] for name in method_code(method)}
    assert {path for path in files if path.stat().st_size} == closure(METHODS / f"{method}.py")


def test_methods_are_tried_before_anything_else():
    """`prepare` depends on a file whose content never changes, so that nothing runs again."""
    first = {
        name
        for name, stage in stages().items()
        if "outputs/methods/usable" in stage.get("do", stage)["deps"]
    }
    before_all = {
        name
        for name, stage in stages().items()
        if not any("outputs/" in path for path in stage.get("do", stage)["deps"])
    }
    assert (first, before_all) == ({"prepare"}, {"methods"})


def test_every_stage_that_computes_depends_on_the_libraries_versions():
    """After `make pins` every stage runs again."""
    assert {
        name
        for name, stage in stages().items()
        if "requirements.txt" not in stage.get("do", stage)["deps"]
    } == {"methods"}


def test_stages_say_what_they_do_and_watch_parameters():
    for name, stage in stages().items():
        body = stage.get("do", stage)
        assert body.get("desc"), name
        params = str(body.get("params", ""))
        assert "machine" not in params, f"{name}: machine settings change no result"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_tracking_and_serving_import_mlflow_and_sources_read_no_surroundings(path):
    tree, name = ast.parse(path.read_text(encoding="utf-8")), module_name(path)
    if not name.startswith(("tttlab.tracking", "tttlab.serving")):
        assert not any(module.split(".")[0] == "mlflow" for module in imported(path))
    if name.startswith("tttlab") and not name.startswith("tttlab.workflow"):
        read = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not read & {"sys.argv", "os.environ", "os.getenv", "Path.cwd", "os.getcwd"}


# A room imports only from itself and from the rooms above it.
ROOMS = (
    "errors",
    "seeding",
    "config",
    "runtime",
    "data",
    "shifts",
    "mixers",
    "networks",
    "objectives",
    "training",
    "adaptation",
    "methods",
    "evaluation",
    "experiments",
    "reporting",
    "arc",
    "arc_results",
    "tracking",
    "serving",
    "workflow",
)


def test_every_module_is_in_a_room():
    assert {name.split(".")[1] for name in BY_NAME if name.startswith("tttlab.")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    below = ROOMS[ROOMS.index(room) + 1 :]
    wrong = {
        (name, target)
        for name, path in BY_NAME.items()
        if name.split(".")[:2] == ["tttlab", room]
        for target in imported(path) & BY_NAME.keys()
        if target.startswith("pipeline") or set(target.split(".")[1:2]) & set(below)
    }
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_no_modules_of_a_room_import_each_other_in_a_circle(room):
    prefix = ["tttlab", room]
    modules = {name: path for name, path in BY_NAME.items() if name.split(".")[:2] == prefix}
    graph = {
        name: {target for target in imported(path) & modules.keys() if not name.startswith(target)}
        for name, path in modules.items()
    }
    order = TopologicalSorter(graph)
    assert len(list(order.static_order())) == len(modules)


def test_package_files_are_empty_but_for_corruptions():
    filled = {
        module_name(path) for path in SOURCES if path.name == "__init__.py" and path.stat().st_size
    }
    assert filled == {"pipeline", "tttlab.shifts.corruptions"}


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if module_name(path).startswith("pipeline")], ids=module_name
)
def test_scripts_are_thin_and_hide_no_standard_module(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80
    assert path.stem not in sys.stdlib_module_names or path.stem == "__init__"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


COMMANDS = [
    path
    for folder in ("benchmarks", "tools")
    for path in sorted((ROOT / folder).glob("*.py"))
    if re.search(r"^def main\(", text := path.read_text("utf-8"), re.MULTILINE)
    and re.search(r"^from tttlab", text, re.MULTILINE)
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_user_error_ends_every_command_with_one_line(path):
    (main,) = (
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    )
    assert "one_line()" in map(ast.unparse, main.decorator_list)


def test_the_formatter_is_on_everywhere():
    folders = ("src", "pipeline", "tests", "benchmarks", "tools")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    words = ("fmt: " + "off", "fmt: " + "skip")
    assert not [path for path in files if any(word in path.read_text("utf-8") for word in words)]


def test_tests_stand_in_the_folder_of_a_room():
    others = {"benchmarks", "helpers"}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")}
    assert folders <= {*ROOMS, *others}
