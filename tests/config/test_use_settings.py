"""Ready-made settings are valid, and laying one over params.yaml loses nothing, with git or not."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.ready import lay_out
from tttlab.config.params import read_params

ROOT = Path(__file__).parents[2]
SETTINGS = sorted((ROOT / "settings").glob("*.yaml"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool, scm = load("use_settings"), load("without_git")


def git(*arguments, folder="."):
    command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
    subprocess.run(command, cwd=folder, check=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A git repository with params.yaml committed and two files of settings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings/a.yaml").write_text(
        "data: {test: {source: torch/cifar10, root: null, split: test}}  # why\n"
    )
    (tmp_path / "settings/b.yaml").write_text("b: 2\n")
    (tmp_path / "params.yaml").write_text("own: 1\n")
    for command in ("init -q", "add .", "commit -qm first"):
        git(*command.split())
    return tmp_path


@pytest.mark.parametrize("file", SETTINGS, ids=lambda file: file.stem)
def test_every_ready_made_file_is_valid(file, tmp_path):
    params = read_params(file, base=lay_out(tmp_path))
    for model, run in params.pairs:
        params.run_settings(run, model)


def test_settings_follow_each_other_and_are_used_once(project):
    assert tool.use(Path("settings/a.yaml"))
    assert Path("params.yaml").read_text() == Path("settings/a.yaml").read_text()
    assert not tool.use(Path("settings/a.yaml"))
    assert tool.use(Path("settings/b.yaml"))
    assert Path("params.yaml").read_text() == "b: 2\n"


def test_changes_that_nothing_else_holds_are_not_overwritten(project):
    Path("params.yaml").write_text("own: 2\n")
    with pytest.raises(ValueError, match="changes that would be lost"):
        tool.use(Path("settings/a.yaml"))
    assert Path("params.yaml").read_text() == "own: 2\n"
    git("commit", "-qam", "second")
    assert tool.use(Path("settings/a.yaml"))


def test_an_image_folder_takes_the_place_of_a_download(project):
    (project / "pictures/test/cat").mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(project / "pictures/test/cat/0.png")
    assert tool.use(Path("settings/a.yaml"), Path("pictures"))
    text = Path("params.yaml").read_text()
    assert "source: folder, root: pictures, split: test" in text
    assert "# why" in text
    # A file that the script wrote itself can be written again.
    assert tool.use(Path("settings/b.yaml"))
    message = r"DATA: expected a folder with test/<class>/<image> inside, found none at nowhere"
    with pytest.raises(ValueError, match=message):
        tool.use(Path("settings/a.yaml"), Path("nowhere"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [", r"PARAMS: expected YAML in settings/c\.yaml, found none \(while parsing"),
        ("own: 2", r"PARAMS: expected a section data in settings/c\.yaml, found none"),
        ("", r"PARAMS: expected a section data in settings/c\.yaml, found none"),
    ],
)
def test_settings_that_say_nothing_of_data_take_no_folder(text, message, project):
    Path("settings/c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        tool.use(Path("settings/c.yaml"), Path("pictures"))


def test_a_name_that_does_not_exist_is_answered_with_those_that_do(project):
    message = r"found none at settings/c\.yaml; there are settings/a\.yaml, settings/b\.yaml"
    with pytest.raises(ValueError, match=message):
        tool.use(Path("settings/c.yaml"))


@pytest.mark.parametrize("situation", ["no repository", "no commit", "no git", "not in it"])
def test_where_no_commit_holds_params_yaml_it_is_copied_and_can_be_brought_back(
    project, monkeypatch, capsys, situation
):
    if situation == "no git":
        monkeypatch.setenv("PATH", str(project / "empty"))
    else:
        shutil.rmtree(project / ".git")
    if situation == "no commit":
        git("init", "-q")
    if situation == "not in it":  # as in a project inside another repository
        git("init", "-q")
        git("add", "settings")
        git("commit", "-qm", "first")
    assert tool.use(Path("settings/a.yaml"))
    (copy,) = Path("settings").glob("before_*.yaml")
    assert f"params.yaml as it was is kept; PARAMS={copy} brings it back" in capsys.readouterr().out
    assert tool.use(Path("settings/b.yaml"))
    assert tool.use(copy)
    assert Path("params.yaml").read_text() == "own: 1\n"
    Path("params.yaml").write_text("own: 3\n")
    assert tool.use(Path("settings/a.yaml"))
    assert sorted(file.read_text() for file in Path("settings").glob("before_*.yaml")) == [
        "own: 1\n",
        "own: 3\n",
    ]


def test_a_checkout_with_the_line_ends_of_windows_is_unchanged(project):
    git("config", "core.autocrlf", "true")
    for file in ("params.yaml", "settings/b.yaml"):
        Path(file).unlink()
        git("checkout", "-q", "--", file)
        assert b"\r\n" in Path(file).read_bytes()
    assert tool.use(Path("settings/b.yaml"))
    assert not tool.use(Path("settings/b.yaml"))
    Path("params.yaml").write_bytes(b"b: 2\n")
    assert not tool.use(Path("settings/b.yaml"))
    Path("params.yaml").write_bytes(b"own: 2\r\n")
    with pytest.raises(ValueError, match="changes that would be lost"):
        tool.use(Path("settings/a.yaml"))


def test_a_checkout_of_this_project_has_the_same_line_ends_everywhere(project):
    shutil.copy(ROOT / ".gitattributes", project)
    shutil.copy(ROOT / "docs" / "pictures" / "mlflow.png", project)
    files = ("params.yaml", "Makefile", "run", "tool.py", "notes.md", "mlflow.png")
    for file in files[:-1]:
        Path(file).write_bytes(b"one\ntwo\n")
    before = {file: Path(file).read_bytes() for file in files}
    git("config", "core.autocrlf", "true")
    git("add", ".")
    git("commit", "-qm", "second")
    for file in files:
        Path(file).unlink()
    git("checkout", "-q", "--", ".")
    assert {file: Path(file).read_bytes() for file in files} == before


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("data", [None, "my pictures", "it's", 'a"b', "a;b#c", "ä"])
def test_make_hands_over_files_and_folders_of_any_name(tmp_path, data):
    shutil.copy(ROOT / "Makefile", tmp_path)
    uv = tmp_path / "uv"
    uv.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\n")
    uv.chmod(0o755)
    command = [
        "make",
        "-s",
        "repro",
        f"UV={uv}",
        "-o",
        ".venv/ready",
        "PARAMS=my settings.yaml",
        *([f"DATA={data}"] if data else []),
    ]
    process = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"]},
    )
    expected = [
        "run",
        "--quiet",
        "python",
        "tools/use_settings.py",
        "my settings.yaml",
        *(["--data", data] if data else []),
    ]
    assert process.stdout.splitlines()[1] == str(expected)


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        (True, None, True),
        (False, None, False),
        (False, "", True),
        (False, "*", False),
        (True, "*", True),
    ],
)
def test_whether_git_holds_the_project(tmp_path, inner, outer, expected):
    root = tmp_path / "outer" / "project"
    root.mkdir(parents=True)
    (root / "dvc.yaml").touch()
    if inner:
        git("init", "-q", folder=root)
    if outer is not None:
        git("init", "-q", folder=root.parent)
        (root.parent / ".gitignore").write_text(outer)
    assert scm.in_git(root) == expected


@pytest.mark.timeout(180)
def test_dvc_runs_the_pipeline_without_git_and_with_it_again(tmp_path):
    """A project unpacked from a ZIP file becomes a repository, at first without a commit."""
    (tmp_path / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", tmp_path / ".dvc")
    (tmp_path / "dvc.yaml").write_text(
        json.dumps({"stages": {"one": {"cmd": "echo x > out.txt", "outs": ["out.txt"]}}})
    )
    environment = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}

    def run(*arguments) -> str:
        process = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return process.stdout

    for _ in range(2):
        run(ROOT / "tools" / "without_git.py")
    run("-m", "dvc", "repro")
    assert "up to date" in run("-m", "dvc", "status")
    git("init", "-q", folder=tmp_path)
    run(ROOT / "tools" / "without_git.py")
    assert "no_scm" not in (tmp_path / ".dvc" / "config.local").read_text()
    assert "up to date" in run("-m", "dvc", "repro")
