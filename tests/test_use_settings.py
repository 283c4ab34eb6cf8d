"""Ready-made settings: they are valid, and laying one over params.yaml loses nothing."""

import importlib.util
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tttlab.params import read_params

ROOT = Path(__file__).parent.parent
SETTINGS = sorted((ROOT / "settings").glob("*.yaml"))
spec = importlib.util.spec_from_file_location("use_settings", ROOT / "tools" / "use_settings.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A git repository with params.yaml committed and two files of settings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings/a.yaml").write_text("data: {test: {source: torch/cifar10, root: null, split: test}}  # why\n")
    (tmp_path / "settings/b.yaml").write_text("b: 2\n")
    (tmp_path / "params.yaml").write_text("own: 1\n")
    for command in ("init -q", "add .", "-c user.name=n -c user.email=e commit -qm first"):
        subprocess.run(["git", *command.split()], check=True)
    return tmp_path


@pytest.mark.parametrize("file", SETTINGS, ids=lambda file: file.stem)
def test_every_ready_made_file_is_valid(file, tmp_path):
    for name in ("unlabeled", "labeled/a", "test"):
        (tmp_path / "data" / name).mkdir(parents=True)
    params = read_params(file, base=tmp_path)
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
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", "commit", "-qam", "second"], check=True)
    assert tool.use(Path("settings/a.yaml"))


def test_an_image_folder_takes_the_place_of_a_download(project):
    (project / "pictures/test/cat").mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(project / "pictures/test/cat/0.png")
    assert tool.use(Path("settings/a.yaml"), Path("pictures"))
    text = Path("params.yaml").read_text()
    assert "source: folder, root: pictures, split: test" in text
    assert "# why" in text
    assert tool.use(Path("settings/b.yaml"))  # what the script wrote itself is not lost
    with pytest.raises(ValueError, match=r"DATA: expected a folder with test/<class>/<image> inside, found none at nowhere"):
        tool.use(Path("settings/a.yaml"), Path("nowhere"))


def test_a_name_that_does_not_exist_is_answered_with_those_that_do(project):
    with pytest.raises(ValueError, match=r"found none at settings/c\.yaml; there are settings/a\.yaml, settings/b\.yaml"):
        tool.use(Path("settings/c.yaml"))
