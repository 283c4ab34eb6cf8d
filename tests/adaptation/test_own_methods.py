"""A method in a user's own package: found without an import, checked, and rerun on changes."""

import importlib
import json
import shutil
import subprocess
import sys
import uuid

import pytest
from ruamel.yaml import YAML

from pipeline import methods as stage
from tools.stage_code import ROOT
from tttlab.adaptation.method_code import describe_changes, method_code, read_module
from tttlab.adaptation.registry import load_method
from tttlab.config.method_settings import declared, find_module_file
from tttlab.config.params import read_params
from tttlab.errors import UserError
from tttlab.workflow import places, untrained

METHOD = """
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from tttlab.adaptation.method import Method, entropy

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
    """A package with the method ``<name>.methods.sharp``, which raises an error if it is imported.

    Its folder is the first in Python's path.
    """
    name = f"own_{uuid.uuid4().hex}"
    folder = tmp_path / name
    (folder / "methods").mkdir(parents=True)  # without __init__.py, a namespace
    (folder / "__init__.py").write_text(IMPORTED)
    (folder / "tools.py").write_text(
        "def scale(logits, temperature):\n    return logits / temperature\n"
    )
    (folder / "methods" / "sharp.py").write_text(METHOD)
    (folder / "methods" / "unrelated.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    declared.cache_clear()
    read_module.cache_clear()
    return folder


def read(folder, alone=False, **run):
    """Read the project's settings with an additional run ``own``.

    With ``alone`` there are no other runs but the control, and one model.
    """
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    if alone:
        values["adapt"]["runs"] = {"none": {"method": "none"}}
        values["models"] = {"mae_vit": values["models"]["mae_vit"]}
    values["adapt"]["runs"]["own"] = run
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(values, file)
    return read_params(folder / "params.yaml")


def test_its_settings_are_checked_without_importing_it(package, tmp_path):
    method = f"{package.name}.methods.sharp"
    run = read(tmp_path, method=method, temperature=2.0, steps=3).run_settings("own", "mae_vit")
    assert (run.method, run.settings, run.loop.steps) == (method, {"temperature": 2.0}, 3)
    message = r"^adapt\.runs\.own\.temperature: expected a number greater than 0, found -1"
    with pytest.raises(UserError, match=message):
        read(tmp_path, method=method, temperature=-1.0)
    message = r"^adapt\.runs\.own\.temprature: unknown key; did you mean 'temperature'\?"
    with pytest.raises(UserError, match=message):
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
        (
            "{}.methods.sharp",
            "x = 1\n",
            r"sharp\.py: expected one public class with @dataclass and the base Method, found 0",
        ),
        ("{}.methods.sharp", METHOD + METHOD, "found 2"),
        ("{}.methods.sharp", "\ndef f(:\n", r"sharp\.py, line 2: not valid Python"),
    ],
)
def test_what_is_wrong_is_told_with_its_place_in_the_file(
    package, tmp_path, module, text, expected
):
    if text is not None:
        (package / "methods" / "sharp.py").write_text(text)
    with pytest.raises(UserError, match=rf"^adapt\.runs\.own\.method: .*{expected}"):
        read(tmp_path, method=module.format(package.name))


def test_a_protocol_that_it_does_not_know_is_told(package, tmp_path):
    text = METHOD.replace('("episodic", "online")', '("online",)')
    (package / "methods" / "sharp.py").write_text(text)
    message = r"^adapt\.runs\.own\.method: own_.* is defined for online, found adapt\.protocol"
    with pytest.raises(UserError, match=message):
        read(tmp_path, method=f"{package.name}.methods.sharp")


def test_what_it_lacks_when_it_is_imported_is_told(package):
    (package / "__init__.py").write_text("import no_such_thing\n")
    message = r"its module cannot be imported \(No module named 'no_such_thing'\)"
    with pytest.raises(UserError, match=message):
        load_method(f"{package.name}.methods.sharp")


def test_modules_are_found_wherever_python_finds_them(package):
    assert find_module_file(f"{package.name}.methods.sharp") == package / "methods" / "sharp.py"
    assert find_module_file(package.name) == package / "__init__.py"
    for name in ("pytest", "tttlab.methods.tent", "ruamel.yaml"):
        assert str(find_module_file(name)) == importlib.import_module(name).__file__
    for name in ("sys", "__main__.x", "math.x", "no_such_thing.x", "a..b"):
        assert find_module_file(name) is None


def test_its_code_is_hashed_with_all_that_it_imports(package):
    module = f"{package.name}.methods.sharp"
    names = list(method_code(module))
    assert names[0] == module
    own = {package.name, f"{package.name}.tools", module}
    assert {name for name in names if name.startswith("own_")} == own
    # A module that it imports, and one that this imports.
    assert {"tttlab.adaptation.method", "tttlab.networks.network"} <= set(names)


@pytest.mark.parametrize("text", ["def f(:\n", "from ....beyond import x\n"])
def test_a_file_that_it_imports_and_that_cannot_be_imported_is_named(package, text):
    (package / "tools.py").write_text(text)
    with pytest.raises(UserError, match=r"tools\.py: cannot be imported \("):
        method_code(f"{package.name}.methods.sharp")


SIGNATURE = "def scale(logits, temperature):\n"
RETURN = "    return logits / temperature\n"


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (f"{SIGNATURE}    # a comment\n    return (logits /\n            temperature)\n", True),
        (f'"""Said."""\n{SIGNATURE}    """Said."""\n{RETURN}', True),
        (f"{SIGNATURE}    return temperature / logits\n", False),
        (f"def scale(logits, temperature=1):\n{RETURN}", False),
        (f"TEXT = 'Said.'\n{SIGNATURE}{RETURN}", False),
    ],
)
def test_what_is_said_is_not_what_is_executed(package, text, same):
    module = f"{package.name}.methods.sharp"
    before = method_code(module)
    (package / "tools.py").write_text(text)
    read_module.cache_clear()
    assert (method_code(module) == before) == same


def test_a_docstring_that_is_read_is_executed(package):
    def code(docstring: str) -> str:
        (package / "tools.py").write_text(
            f'def scale(x, temperature):\n    "{docstring}"\n    return x * len(scale.__doc__)\n'
        )
        read_module.cache_clear()
        return method_code(f"{package.name}.methods.sharp")[f"{package.name}.tools"]

    assert code("one") != code("two")


def test_what_has_changed_is_told_by_run():
    tent = {"tttlab.methods.tent": "a", "tttlab.adaptation.method": "b"}
    flip = {"my.flip": "c", "my.tools": "d"}
    both = {"m": tent, "n": flip}
    before = {"none": {"m": tent}, "own": {"m": flip}, "gone": {"m": tent}, "other": both}
    assert describe_changes(before, {"none": {"m": tent}, "own": {"m": flip, "n": flip}}) == [
        "no method's code has changed"
    ]
    after = {
        "none": {"m": tent | {"tttlab.adaptation.method": "x"}},
        "new": {"m": tent, "n": flip},
        "own": {"m": tent},
        "other": {"m": tent, "n": flip | {"my.tools": "x", "my.more": "y"}},
    }
    assert describe_changes(before, after) == [
        "new runs: 'new' (tent, my.flip)",
        "runs with another method: 'own' (tent instead of my.flip)",
        "runs whose method's code has changed: "
        "'none' (tttlab.adaptation.method), 'other' (my.more, my.tools)",
    ]


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Make a folder of results; give the list of what the stage would have tried."""
    monkeypatch.setattr(places, "OUTPUTS", tmp_path / "outputs")
    tried = []

    def try_runs(_params, model, names) -> None:
        tried.extend((model, name) for name in names)

    monkeypatch.setattr(untrained, "try_runs", try_runs)
    return tried


@pytest.mark.parametrize(
    ("edited", "changed"),
    [
        ("methods/sharp.py", ["own"]),
        ("tools.py", ["own"]),
        ("__init__.py", ["own"]),
        ("methods/unrelated.py", []),
    ],
)
def test_an_edit_is_one_runs_alone(package, tmp_path, outputs, capsys, edited, changed):
    params = read(tmp_path, method=f"{package.name}.methods.sharp")

    def run_stage():
        read_module.cache_clear()
        outputs.clear()
        stage.run(params)
        files = (tmp_path / "outputs" / "methods").glob("*.json")
        return {path.stem: path.read_text() for path in files}

    before = run_stage()
    assert set(before) == set(params.adapt.runs)
    assert set(outputs) == set(params.pairs)
    modules = json.loads(before["ssl"])  # `ssl` is the method of each model's objective
    assert next(iter(modules["mae_vit"])) == "tttlab.methods.mae"
    assert next(iter(modules["simclr_convnet"])) == "tttlab.methods.simclr"
    assert run_stage() == before
    assert capsys.readouterr().out.splitlines()[-1] == "no method's code has changed"
    assert not outputs
    with (package / edited).open("a") as file:
        file.write("edited = True\n")
    after = run_stage()
    assert [run for run in before if after[run] != before[run]] == changed
    assert sorted(outputs) == [(model, run) for model in sorted(params.models) for run in changed]
    expected = "no method's code has changed"
    if changed:
        module = ".".join([package.name, *edited.removesuffix(".py").split("/")])
        module = module.removesuffix(".__init__")
        expected = f"runs whose method's code has changed: 'own' ({module})"
    assert capsys.readouterr().out.splitlines()[-1] == expected
    (tmp_path / "outputs" / "methods" / "gone.json").write_text("{}")  # of a run that was removed
    assert set(run_stage()) == set(before)


def test_other_settings_are_tried_anew_and_change_no_code(package, tmp_path, outputs, capsys):
    def run_stage(**settings) -> None:
        outputs.clear()
        stage.run(read(tmp_path, method=f"{package.name}.methods.sharp", **settings))

    run_stage(temperature=1.0)
    run_stage(temperature=1.0, lr=0.5, steps=3, average=0)  # settings that cannot fail
    assert not outputs
    run_stage(temperature=2.0, per_model={"mae_vit": {"temperature": 1.0}})
    assert outputs == [("simclr_convnet", "own")]
    per_model = {"mae_vit": {"temperature": 1.0, "trainable": "norm"}}
    run_stage(temperature=2.0, per_model=per_model)
    assert outputs == [("mae_vit", "own")]
    assert capsys.readouterr().out.splitlines()[-1] == "no method's code has changed"


def test_where_nothing_is_new_torch_is_not_imported(package, tmp_path, outputs):
    stage.run(read(tmp_path, method=f"{package.name}.methods.sharp"))
    code = (
        "import sys; from pathlib import Path; from pipeline import methods; "
        "from tttlab.config.params import read_params; "
        "methods.run(read_params(Path('params.yaml'))); "
        "print([name for name in ('torch', 'timm', 'numpy') if name in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == ["no method's code has changed", "[]"], finished.stderr


LOSS = "return entropy(scale(net(views).logits, self.temperature)).mean(), state"
VALUE = "value = entropy(net(views).logits).mean()"
VIEWS = "def views(self, network, images, generators): return"
PREDICT = "def predict(self, net, image, views, statistics): return"
BROKEN = {
    "a branch": (
        f"{VALUE}\n        if value > 0: value = -value\n        return value, state",
        "loss (line 25) branches on a value, which is another one for every image; use torch.where",
    ),
    "noise": (
        "return net(views + torch.randn_like(views)).logits.mean(), state",
        "loss (line 24) draws random numbers; draw them in `views`, "
        "from the generators that are given there",
    ),
    "a loss per view": (
        "return entropy(net(views).logits), state",
        "loss must return a tensor of one number, without dimensions, found a tensor of shape (1,)",
    ),
    "no state": (
        LOSS.removesuffix(", state"),
        "loss must return two things, loss, state, found a tensor of shape ()",
    ),
    "an exception": (
        f"{VALUE}\n        return value * statistics['bank'].mean(), state",
        "loss (line 25) fails with KeyError: 'bank'",
    ),
    "arguments": (
        f"{LOSS}\n\n    def views(self, images): return images",
        "views fails with TypeError: ",
    ),
    "one view too few": (
        f"{LOSS}\n\n    {VIEWS} images[0]",
        "views must give tensors whose first dimension counts the images",
    ),
    "a rule": (
        f"{LOSS}\n\n    {PREDICT} net(image[None]).logits",
        "predict must return logits of shape (10,), found a tensor of shape (1, 10)",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_method_is_told_by_hook_and_line_before_any_training(
    package, tmp_path, monkeypatch, kind
):
    text, expected = BROKEN[kind]
    (package / "__init__.py").write_text("")
    text = METHOD.replace(LOSS, text).replace("from typing", "import torch\nfrom typing", 1)
    (package / "methods" / "sharp.py").write_text(text)
    monkeypatch.setattr(places, "OUTPUTS", tmp_path / "outputs")
    method = f"{package.name}.methods.sharp"
    with pytest.raises(UserError) as caught:
        stage.run(read(tmp_path, alone=True, method=method))
    assert str(caught.value).startswith(f"adapt.runs.own, method {method} on mae_vit: {expected}")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "outputs" / "methods").iterdir())


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (
            "__init__.py",
            "import no_such_thing\n",
            r"its module cannot be imported \(No module named 'no_such_thing'\)",
        ),
        (
            "tools.py",
            "scale = undefined\n",
            r"its module cannot be imported \(NameError: name 'undefined' is not defined\)",
        ),
    ],
)
def test_a_method_that_cannot_be_imported_is_told_before_any_training(
    package, tmp_path, monkeypatch, file, text, expected
):
    (package / "__init__.py").write_text("")
    (package / file).write_text(text)
    monkeypatch.setattr(places, "OUTPUTS", tmp_path / "outputs")
    with pytest.raises(UserError, match=expected):
        stage.run(read(tmp_path, alone=True, method=f"{package.name}.methods.sharp"))


def test_large_images_are_tried_small_and_only_as_they_are_refused(package, tmp_path, monkeypatch):
    (package / "__init__.py").write_text("")
    file, sizes = package / "methods" / "sharp.py", []
    monkeypatch.setattr(places, "OUTPUTS", tmp_path / "outputs")
    build = untrained.build_untrained

    def build_untrained(*arguments):
        sizes.append(arguments[-1])
        return build(*arguments)

    monkeypatch.setattr(untrained, "build_untrained", build_untrained)
    params = read(tmp_path, alone=True, method=f"{package.name}.methods.sharp")
    params = params.model_copy(update={"data": params.data.model_copy(update={"image_size": 96})})
    stage.run(params)
    assert sizes == [64]
    refusing = f"if views.shape[-1] < 96: raise ValueError\n        {LOSS}"
    file.write_text(METHOD.replace(LOSS, refusing))
    sys.modules.pop(f"{package.name}.methods.sharp")
    read_module.cache_clear()
    stage.run(params)
    assert sizes == [64, 64, 96]
    file.write_text(METHOD.replace(LOSS, "return 1"))
    sys.modules.pop(f"{package.name}.methods.sharp")
    read_module.cache_clear()
    with pytest.raises(UserError, match="loss must return two things"):
        stage.run(params)


@pytest.mark.slow
def test_dvc_tries_methods_first_and_reruns_what_follows_a_changed_one_and_nothing_else(
    package, tmp_path
):
    """With the project's stage ``methods``, and small stages in place of those after it."""
    read(tmp_path, alone=True, method=f"{package.name}.methods.sharp")
    (package / "__init__.py").write_text("")
    of_project = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    command = {"cmd": f"{sys.executable} -m pipeline.methods", "deps": ["pipeline/methods.py"]}
    inputs = [path for path in of_project["prepare"]["deps"] if path.startswith("outputs/")]
    for_a_run = {"cmd": "echo ran ${key}", "deps": ["outputs/methods/${key}.json"]}
    stages = {
        "prepare": {"cmd": "echo ran prepare", "deps": inputs},
        "methods": of_project["methods"] | command,
        "tune": {"foreach": "${adapt.runs}", "do": for_a_run},
    }
    with (tmp_path / "dvc.yaml").open("w") as file:
        YAML().dump({"stages": stages}, file)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=ignore)
    (tmp_path / "src").symlink_to(ROOT / "src")

    def dvc(*words, fails=""):
        command = [sys.executable, "-m", "dvc", *words]
        finished = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )
        assert (finished.returncode != 0) == bool(fails), finished.stderr
        assert fails in finished.stderr
        lines = [line for line in finished.stdout.splitlines() if line.startswith("ran ")]
        return {line.removeprefix("ran ") for line in lines}

    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text(
        "[core]\nno_scm = true\nanalytics = false\ncheck_update = false\n"
    )
    tools = package / "tools.py"
    text = tools.read_text()
    tools.write_text("scale = None\n")
    assert dvc("repro", fails="own, method own_") == set()  # not even `prepare`
    tools.write_text(text)
    assert dvc("repro") == {"prepare", "none", "own"}
    tools.write_text(f'"""Said."""\n{text}')
    assert dvc("repro") == set()
    tools.write_text(text.replace("logits /", "2 * logits /"))
    assert dvc("repro") == {"own"}
