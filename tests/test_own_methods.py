"""A method in a user's own package: found without being imported, told what is wrong with it, and rerun when it changes."""

import importlib
import json
import shutil
import subprocess
import sys
import uuid

import pytest
from ruamel.yaml import YAML
from test_structure import ROOT

import pipeline
from pipeline import methods as stage
from tttlab.errors import UserError
from tttlab.method_settings import declared, find_source
from tttlab.params import read_params
from tttlab.registry import load_method

METHOD = """
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from tttlab.method import Method, entropy

from ..tools import scale


@dataclass(frozen=True)
class Options:
    "Not a method."


@dataclass(frozen=True)
class Sharp(Method):
    protocols = ("episodic", "online")
    temperature: Annotated[float, Gt(0)] = 1.0

    def loss(self, net, views, statistics, state):
        return entropy(scale(net(views).logits, self.temperature)).mean(), state
"""
IMPORTED = "raise AssertionError('imported')\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that must not be imported, ``<name>.methods.sharp``, in the folder that Python looks into first."""
    name = f"own_{uuid.uuid4().hex}"
    folder = tmp_path / name
    (folder / "methods").mkdir(parents=True)  # without __init__.py, a namespace
    (folder / "__init__.py").write_text(IMPORTED)
    (folder / "tools.py").write_text("def scale(logits, temperature):\n    return logits / temperature\n")
    (folder / "methods" / "sharp.py").write_text(METHOD)
    (folder / "methods" / "unrelated.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    declared.cache_clear()
    stage.imported.cache_clear()
    return folder


def read(folder, **run):
    """The project's own settings with one run more, ``own``."""
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    values["adapt"]["runs"]["own"] = run
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(values, file)
    return read_params(folder / "params.yaml")


def test_its_settings_are_checked_without_importing_it(package, tmp_path):
    method = f"{package.name}.methods.sharp"
    found = read(tmp_path, method=method, temperature=2.0, steps=3).run_settings("own", "mae_vit")
    assert (found.method, found.settings, found.adapter.steps) == (method, {"temperature": 2.0}, 3)
    with pytest.raises(UserError, match=r"^adapt\.runs\.own\.temperature: expected a number greater than 0, found -1"):
        read(tmp_path, method=method, temperature=-1.0)
    with pytest.raises(UserError, match=r"^adapt\.runs\.own\.temprature: unknown key; did you mean 'temperature'\?"):
        read(tmp_path, method=method, temprature=1.0)
    assert not [name for name in sys.modules if name.startswith(package.name)]


def test_it_is_loaded_like_any_other(package):
    (package / "__init__.py").write_text("")
    method = load_method(f"{package.name}.methods.sharp", {"temperature": 2.0})
    assert (type(method).__name__, method.temperature) == ("Sharp", 2.0)
    with pytest.raises(UserError, match=r"method own.*\.sharp: .*temperatur'"):
        load_method(f"{package.name}.methods.sharp", {"temperatur": 2.0})


@pytest.mark.parametrize(
    ("module", "text", "expected"),
    [
        ("{}.methods.shrap", None, r"no module 'own_.*\.methods\.shrap' with a source file"),
        ("{}.sharp", None, "no module"),
        ("{}.tools.sharp", None, "no module"),  # tools is no package
        ("{}.methods", None, "no module"),  # a folder without a file of its own
        ("{}x.methods.sharp", None, "no module"),
        (".methods.sharp", None, r"no module '\.methods\.sharp'"),
        ("sys.path", None, "no module"),
        ("{}.methods.sharp", "x = 1\n", r"sharp\.py: expected one public class with @dataclass and the base Method, found 0"),
        ("{}.methods.sharp", METHOD + METHOD, "found 2"),
        ("{}.methods.sharp", "\ndef f(:\n", r"sharp\.py, line 2: not valid Python"),
    ],
)
def test_what_is_wrong_is_told_with_its_place_in_the_file(package, tmp_path, module, text, expected):
    if text is not None:
        (package / "methods" / "sharp.py").write_text(text)
    with pytest.raises(UserError, match=rf"^adapt\.runs\.own\.method: .*{expected}"):
        read(tmp_path, method=module.format(package.name))


def test_a_protocol_that_it_does_not_know_is_told(package, tmp_path):
    (package / "methods" / "sharp.py").write_text(METHOD.replace('("episodic", "online")', '("online",)'))
    with pytest.raises(UserError, match=r"^adapt\.runs\.own\.method: own_.* is defined for online, found adapt\.protocol"):
        read(tmp_path, method=f"{package.name}.methods.sharp")


def test_what_it_lacks_when_it_is_imported_is_told(package):
    (package / "__init__.py").write_text("import no_such_thing\n")
    with pytest.raises(UserError, match=r"its module cannot be imported \(No module named 'no_such_thing'\)"):
        load_method(f"{package.name}.methods.sharp")


def test_modules_are_found_wherever_python_finds_them(package):
    assert find_source(f"{package.name}.methods.sharp") == package / "methods" / "sharp.py"
    assert find_source(package.name) == package / "__init__.py"
    for name in ("pytest", "tttlab.methods.tent", "ruamel.yaml"):
        assert str(find_source(name)) == importlib.import_module(name).__file__
    for name in ("sys", "__main__.x", "math.x", "no_such_thing.x", "a..b"):
        assert find_source(name) is None


def test_its_text_is_hashed_with_all_that_it_imports(package):
    module = f"{package.name}.methods.sharp"
    names = list(stage.sources(module))
    assert names[0] == module
    assert {name for name in names if name.startswith("own_")} == {package.name, f"{package.name}.tools", module}
    assert {"tttlab.method", "tttlab.networks"} <= set(names)  # what these import too


@pytest.mark.parametrize("text", ["def f(:\n", "from ....beyond import x\n"])
def test_a_file_that_it_imports_and_that_cannot_be_imported_is_named(package, text):
    (package / "tools.py").write_text(text)
    with pytest.raises(UserError, match=r"tools\.py: cannot be imported \("):
        stage.sources(f"{package.name}.methods.sharp")


@pytest.mark.parametrize(
    ("edited", "changed"),
    [("methods/sharp.py", ["own"]), ("tools.py", ["own"]), ("__init__.py", ["own"]), ("methods/unrelated.py", [])],
)
def test_an_edit_is_one_runs_alone(package, tmp_path, monkeypatch, capsys, edited, changed):
    monkeypatch.setattr(pipeline, "OUTPUTS", tmp_path / "outputs")
    params = read(tmp_path, method=f"{package.name}.methods.sharp")

    def note():
        stage.imported.cache_clear()
        stage.run(params)
        return {path.stem: path.read_text() for path in (tmp_path / "outputs" / "methods").iterdir()}

    before = note()
    assert set(before) == set(params.adapt.runs)
    assert next(iter(json.loads(before["ssl"])["mae_vit"])) == "tttlab.methods.mae"  # the alias is each model's objective
    assert next(iter(json.loads(before["ssl"])["simclr_convnet"])) == "tttlab.methods.simclr"
    assert note() == before
    assert capsys.readouterr().out.splitlines()[-1] == "the methods of all runs are as they were"
    with (package / edited).open("a") as file:
        file.write("# edited\n")
    after = note()
    assert [run for run in before if after[run] != before[run]] == changed
    told = f"new or changed: {changed[0]}" if changed else "the methods of all runs are as they were"
    assert capsys.readouterr().out.splitlines()[-1] == told
    (tmp_path / "outputs" / "methods" / "gone.json").write_text("{}")  # a run that was taken out
    assert set(note()) == set(before)


def test_dvc_reruns_what_follows_a_changed_method_and_nothing_else(package, tmp_path):
    """The project's stage itself, before a stage per run that stands for all that follow."""
    params = read(tmp_path, method=f"{package.name}.methods.sharp")
    (package / "__init__.py").write_text("")
    own = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]["methods"]
    own |= {"cmd": f"{sys.executable} -m pipeline.methods", "deps": ["pipeline/methods.py"]}
    following = {"cmd": "echo ran ${key}", "deps": ["outputs/methods/${key}.json"]}
    stages = {"methods": own, "tune": {"foreach": "${adapt.runs}", "do": following}}
    with (tmp_path / "dvc.yaml").open("w") as file:
        YAML().dump({"stages": stages}, file)
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src").symlink_to(ROOT / "src")

    def dvc(*words):
        command = [sys.executable, "-m", "dvc", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return {line.removeprefix("ran ") for line in done.stdout.splitlines() if line.startswith("ran ")}

    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\nno_scm = true\nanalytics = false\ncheck_update = false\n")
    assert dvc("repro") == set(params.adapt.runs)
    assert dvc("repro") == set()
    (package / "tools.py").write_text("scale = None\n")
    assert dvc("repro") == {"own"}
