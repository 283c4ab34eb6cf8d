"""Registered models: what a version holds, when one is made, and what a loaded one answers."""

import base64
import io
import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image

from tests.helpers import served
from tttlab.adaptation.registry import load_method
from tttlab.errors import UserError
from tttlab.serving import adaptive_model, loading, registry
from tttlab.serving.adaptive_model import ServedRun
from tttlab.serving.pyfunc import images_of
from tttlab.serving.service import Service
from tttlab.tracking.runs import Execution, pipeline_run, start_run
from tttlab.tracking.store import database_uri
from tttlab.workflow import places
from tttlab.workflow.registering import own_code

CARD = "A small model.\n\nIt gained nothing."


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project's folder in whose registry the model is; → the folder, and a way to register."""
    root = tmp_path_factory.mktemp("project")
    folder, example = served.written(root), root / "example.png"
    Image.fromarray(pixels()).save(example)
    parent = pipeline_run(root, Execution("by hand", None))

    def register(card: str = CARD) -> tuple[int, bool]:
        with start_run(root, stage="register", name="register m", params={}, parent=parent) as run:
            return registry.register(run, root, "m", folder, card, example, [])

    assert register() == (1, True)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(database_uri(root))
    yield root, register
    mlflow.set_tracking_uri(before)


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(16, 16, 3), dtype=np.uint8)


def encoded(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def loaded(project):
    return mlflow.pyfunc.load_model("models:/m@champion")


def test_a_version_says_what_it_is_and_needs(project, loaded):
    root, _ = project
    version = MlflowClient().get_model_version_by_alias("m", "champion")
    assert (version.version, version.description) == (1, CARD)
    assert MlflowClient().get_registered_model("m").description == "A small model."
    assert MlflowClient().get_run(version.run_id).data.tags["stage"] == "register"
    requirements = registry.requirements()
    assert [line for line in requirements if line.startswith(("ttt-lab==", "mlflow==", "torch=="))]
    files = {path.name: path for path in (root / "mlruns").rglob("*") if path.is_file()}
    assert files["requirements.txt"].read_text().split() == requirements
    assert "set_model(AdaptiveModel())" in files["pyfunc_code.py"].read_text()
    assert "python_model.pkl" not in files
    (column,), params = loaded.metadata.signature.inputs, loaded.metadata.signature.params
    assert column.name == "image"
    assert [param.name for param in params] == ["run", "gate", "steps", "seed", "return_curve"]
    (row,) = loaded.predict([{"image": pixels()}], params={"return_curve": True})
    assert {column.name for column in loaded.metadata.signature.outputs} == row.keys()
    example = json.loads(files["input_example.json"].read_text())
    assert base64.b64decode(example["data"][0][0]) == encoded(pixels())


def test_a_new_version_is_made_only_where_something_is_new(project):
    _, register = project
    assert register() == (1, False)
    assert register(f"{CARD} Or little.") == (2, True)
    client = MlflowClient()
    assert client.get_model_version_by_alias("m", "champion").version == 2
    assert client.get_registered_model("m").aliases == {"champion": 2}
    assert register() == (3, True)  # what is champion counts, not what once was


@pytest.fixture
def moved(project, tmp_path):
    """A copy of the project, while its own folder is away; → the copy."""
    root, _ = project
    before, away = mlflow.get_tracking_uri(), root.with_name("away")
    shutil.copytree(root, tmp_path / "the copy")
    root.rename(away)
    yield tmp_path / "the copy"
    away.rename(root)
    mlflow.set_tracking_uri(before)


def files_of(root: Path, uri: str) -> Path:
    """Give the folder that MLflow loads a registered version from."""
    name, number = uri.removeprefix("models:/").split("/")
    address = MlflowClient(database_uri(root)).get_model_version_download_uri(name, number)
    return Path(unquote(urlsplit(address).path))


def test_a_copied_project_serves_its_own_champion(moved):
    uri, _ = loading.champion(moved, "m")
    files = files_of(moved, uri)
    assert files.is_relative_to(moved / "mlruns" / "models")
    loaded = loading.load(uri, moved, {"device": "cpu"})
    expected = Service(adaptive_model.load(moved / "served", "cpu")).answer([pixels(1)])
    (answer,), (wanted,) = loaded.predict([{"image": pixels(1)}]), expected
    assert answer["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
    # It is the file of the copy that is read: without it there is no model.
    shutil.rmtree(files)
    with pytest.raises(UserError, match=f"^{uri}: expected a model of MLflow, found none"):
        loading.load(uri, moved, {"device": "cpu"})


def test_a_model_that_is_loaded_by_its_address_is_that_of_the_copy(moved):
    loading.load("models:/m/1", moved, {"device": "cpu"})
    assert files_of(moved, "models:/m/1").is_relative_to(moved)


def test_an_address_of_a_store_is_that_of_the_copy(moved):
    """So Ray's replicas name it."""
    loading.correct_paths(database_uri(moved))
    assert files_of(moved, "models:/m/1").is_relative_to(moved)
    for other in ("http://127.0.0.1:1", "sqlite://", f"sqlite:///{moved}/none/mlflow.db"):
        loading.correct_paths(other)
    assert not (moved / "none").exists()


def test_a_version_that_an_earlier_release_left_behind_is_corrected(moved):
    """All else in that store says already where the files are."""
    loading.champion(moved, "m")
    right = files_of(moved, "models:/m/1")
    with closing(sqlite3.connect(moved / "mlflow.db")) as database, database:
        database.execute("UPDATE model_versions SET storage_location = 'file:///gone/m'")
    assert files_of(moved, "models:/m/1") == Path("/gone/m")
    uri, _ = loading.champion(moved, "m")
    assert files_of(moved, "models:/m/1") == right
    assert files_of(moved, uri).is_relative_to(moved)


FORMS = {
    "bytes": lambda image: encoded(image),
    "base64": lambda image: base64.b64encode(encoded(image)).decode(),
    "data URL": lambda image: f"data:image/png;base64,{base64.b64encode(encoded(image)).decode()}",
    "array": lambda image: image,
    "lists": lambda image: image.tolist(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_model_answers_the_same_in_every_form(loaded, form):
    images = [pixels(1), pixels(2)]
    expected = loaded.unwrap_python_model().service.answer(images)
    sent = [FORMS[form](image) for image in images]
    for request in (
        pd.DataFrame({"image": sent}),
        [{"image": one} for one in sent],
        {"image": sent},
    ):
        for row, wanted in zip(loaded.predict(request), expected, strict=True):
            timed = {"milliseconds"}
            numbers = row["probabilities"], wanted["probabilities"]
            assert [*numbers[0].values()] == pytest.approx([*numbers[1].values()], abs=1e-5)
            assert row.keys() - timed == wanted.keys() - timed
            assert (row["run"], row["gate"]) == (wanted["run"], wanted["gate"])


def test_parameters_reach_the_run(loaded):
    request = pd.DataFrame({"image": [encoded(pixels(1))]})
    (plain,) = loaded.predict(request, params={"run": "none"})
    assert plain["probabilities"] == plain["source_probabilities"]
    params = {"run": "simclr", "gate": False, "steps": 3, "return_curve": True}
    (curved,) = loaded.predict(request, params=params)
    assert [point["step"] for point in curved["curve"]] == [0, 1, 2, 3]
    assert curved["curve"][3]["probabilities"] == curved["probabilities"]
    assert (curved["curve"][0]["loss"], curved["curve"][3]["loss"]) == (
        curved["loss_before"],
        curved["loss_after"],
    )
    (other,) = loaded.predict(request, params=params | {"seed": 8})
    assert other["probabilities"] != curved["probabilities"]


@pytest.mark.parametrize(
    ("image", "params", "message"),
    [
        ("no base64!", {}, "image 1: expected an image in base64, found text that is none"),
        (b"no image", {}, "image 1: expected an image, found none that can be read"),
        (b"", {"run": "tent"}, "run: tent, which adapts along a stream of images"),
        (b"", {"run": "mem"}, "run: unknown run 'mem'; did you mean 'memo'?"),
        (b"", {"steps": 51}, "steps: expected an integer from 0 to 50, found 51"),
        (b"", {"run": "shrink", "steps": 1}, "steps: run shrink trains nothing"),
        ("file:/etc/passwd", {}, "found the name of a file, and this server opens none"),
    ],
)
def test_what_cannot_be_served_ends_in_one_line(loaded, image, params, message):
    with pytest.raises(MlflowException) as caught:
        loaded.predict(pd.DataFrame({"image": [image]}), params=params)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.get_http_status_code() == 400


def test_a_folder_is_served_beside_a_store_that_cannot_be_read(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database, and longer than sixteen bytes")
    uri = loading.wrap(served.written(tmp_path / "model"), tmp_path / "wrapped")
    model = loading.load(uri, tmp_path, {"device": "cpu"})
    assert len(model.predict([{"image": pixels()}])) == 1


def test_images_are_found_in_whatever_mlflow_passes_on():
    images = ["a", "b"]
    for given in (
        pd.DataFrame({"image": images}),
        {"image": images},
        images,
        [{"image": "a"}, {"image": "b"}],
        {"image": [images]},
    ):
        assert images_of(given) == images
    stack = np.zeros((2, 4, 4, 3), np.uint8)
    for given in (stack, {"image": [stack]}, {"image": list(stack)}, {"image": stack.tolist()}):
        assert [np.shape(image) for image in images_of(given)] == [(4, 4, 3), (4, 4, 3)]
    for wrong in ({"picture": images}, [{"picture": "a"}], [{"image": "a"}, {"picture": "b"}]):
        with pytest.raises(UserError, match="expected a column 'image', found"):
            images_of(wrong)


OWN_METHOD = '''
from dataclasses import dataclass

from tttlab.adaptation.method import Method


@dataclass(frozen=True)
class Doubled(Method):
    """A prediction rule of one's own: logits twice as large."""

    trains = False

    def predict(self, net, image, views, statistics):
        return 2 * net(image.unsqueeze(0)).logits[0]
'''
ASKING = """
import json, sys
import mlflow, numpy as np

mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/own@champion")
(answer,) = model.predict([{"image": np.full((16, 16, 3), 90, np.uint8)}], {"run": "doubled"})
print(json.dumps([answer["source_probabilities"], answer["probabilities"]]))
"""


@pytest.mark.slow
def test_a_method_of_ones_own_travels_with_the_model(tmp_path, monkeypatch):
    """It is loaded by another process, which knows nothing of the project's folder."""
    root = tmp_path / "project"
    (root / "my_methods").mkdir(parents=True)
    (root / "my_methods" / "doubling.py").write_text(OWN_METHOD, encoding="utf-8")
    monkeypatch.syspath_prepend(root)
    monkeypatch.setattr(places, "ROOT", root)
    model, network = served.model(root / "network")
    task = replace(model.runs["none"].task, method=load_method("my_methods.doubling"))
    own = replace(model, runs={"doubled": ServedRun(task)}, best="doubled")
    code = own_code(own)
    assert code == [str(root / "my_methods")]
    adaptive_model.save(own, root / "served", network)
    Image.fromarray(pixels()).save(root / "example.png")
    parent = pipeline_run(root, Execution("by hand", None))
    with start_run(root, stage="register", name="register", params={}, parent=parent) as run:
        example = root / "example.png"
        registry.register(run, root, "own", root / "served", CARD, example, code)
    words = [sys.executable, "-c", ASKING, database_uri(root)]
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = (np.array([*one.values()]) for one in json.loads(done.stdout))
    np.testing.assert_allclose(after, before**2 / (before**2).sum(), rtol=1e-5)
