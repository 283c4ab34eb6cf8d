"""What installers read and what they install: exact versions, and a wheel that stands alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import served
from tests.test_docs import code_blocks
from tools.stage_code import ROOT
from tttlab.config.method_settings import method_names
from tttlab.serving import registry
from tttlab.tracking.runs import Execution, pipeline_run, start_run
from tttlab.tracking.store import database_uri
from tttlab.workflow import cli

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = [
    line
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line and line[0] not in "#-"
]


def test_uv_and_pip_get_the_same_versions():
    assert PROJECT["tool"]["uv"]["constraint-dependencies"] == PINS
    assert not any("://" in pin for pin in PINS)


def test_every_dependency_is_pinned():
    pinned = {pin.split("==")[0] for pin in PINS}
    extras = PROJECT["project"]["optional-dependencies"].values()
    requirements = [requirement for extra in extras for requirement in extra]
    for requirement in [*PROJECT["project"]["dependencies"], *requirements]:
        name = re.split(r"[>=\[]", requirement)[0]
        assert name in pinned | {"ttt-lab"}, name


def test_pins_are_made_with_uvs_overrides():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    overrides = " ".join(f"'{one}'" for one in PROJECT["tool"]["uv"]["override-dependencies"])
    assert f"printf '%s\\n' {overrides} | $(UV) pip compile" in makefile


def test_the_successor_under_another_licence_is_kept_out():
    pins = dict(pin.split(";")[0].strip().split("==") for pin in PINS)
    assert pins["albumentations"].startswith("2.0.")
    assert "albumentationsx" not in pins
    assert "lightning" not in pins


def test_the_repository_has_the_extra_without_asking_for_it():
    """Uv installs the group dev by default; `make pins` compiles the group tools and the extra.

    The extra arc brings the extra pipeline.
    """
    extras = PROJECT["project"]["optional-dependencies"]
    assert "ttt-lab[pipeline]" in extras["arc"]
    groups = PROJECT["dependency-groups"]
    assert groups["dev"] == ["ttt-lab[arc]", {"include-group": "tools"}]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "--extra arc --group tools" in makefile


def test_the_command_says_its_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"ttt-lab {PROJECT['project']['version']}\n"


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["predict", "photo.png"], "params.yaml"),
        (["report"], "report.html"),
        (["ui"], "mlflow.db"),
    ],
)
def test_outside_a_project_the_command_ends_in_one_line(words, missing, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tttlab.workflow.cli", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout, line[:7]) == (2, "", "error: ")
    assert missing in line
    assert "found no" in line


# Of these the repository brings the libraries, and the wheel alone does not.
OF_THE_EXTRA = {"aws", "clust3", "mae", "simclr", "simsiam", "ttt_plus_plus"}
# What runs in both environments; it prints a line of JSON.
SCRIPT = """
import importlib, json, sys
import torch

torch.set_default_dtype(torch.float64)  # two machines' float32 drift apart along the steps
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
smooth = torch.randn(15, 3, 4, 4, generator=generator)
smooth = torch.nn.functional.interpolate(smooth, size=64, mode="bilinear")
namespace = {
    "source_images": smooth[:12],
    "test_images": 1.5 * smooth[12:] + 0.5,
    "labels": torch.zeros(3, dtype=torch.int64),
}
torch.manual_seed(0)
exec(sys.stdin.read(), namespace)
trained, result, opened = (namespace[name] for name in ("trained", "result", "opened"))

from tttlab.adaptation.engine import Engine

loop = namespace["InnerLoop"](lr=1e-2, trainable="norm")
engine = Engine(namespace["network"], "tent", loop).eval()
by_engine, loss = engine(namespace["test_images"])
refused = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(f"tttlab.methods.{name}")
    except ImportError as error:
        refused[name] = str(error)
print(json.dumps({
    "change": (trained.logits - trained.logits_at[:, 0]).norm(dim=1).tolist(),
    "losses": trained.losses.tolist(),
    "engine": by_engine.norm(dim=1).tolist(),
    "loss": loss.item(),
    "gated": result.logits.norm(dim=1).tolist(),
    "opened": opened.tolist(),
    "refused": refused,
}))
"""


def uv(*words: str) -> str:
    """Run uv; skip the test where uv is missing or reaches no index."""
    found = os.environ.get("UV") or shutil.which("uv") or shutil.which(".tools/bin/uv", path=ROOT)
    if not found:
        pytest.skip("uv is not on the PATH")
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    environment["UV_COMPILE_BYTECODE"] = "0"  # it would take a minute for torch
    done = subprocess.run(
        [found, *words], capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    if done.returncode and "error sending request" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy, for building leaves folders beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
    )
    uv("build", "--quiet", "--wheel", "--out-dir", str(folder), str(folder))
    (built,) = folder.glob("*.whl")
    return built


@contextmanager
def environment(folder: Path, *install: str) -> Iterator[Path]:
    """Install in a fresh environment, with our exact versions; → its folder bin."""
    uv("venv", "--quiet", "--python", sys.executable, str(folder))
    scripts = folder / ("Scripts" if sys.platform == "win32" else "bin")
    pins = ["--constraint", str(ROOT / "requirements.txt")]
    uv("pip", "install", "--quiet", "--python", str(scripts / "python"), *pins, *install)
    yield scripts
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """The wheel with what it requires and nothing else; → the folder bin of its environment."""
    with environment(tmp_path_factory.mktemp("bare") / "environment", str(wheel)) as scripts:
        yield scripts


def run(*words: str | Path, cwd: Path, code: int = 0, given: str = "") -> tuple[str, str]:
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, timeout=300, check=False, input=given
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
def test_the_wheel_needs_little_and_computes_what_the_repository_computes(bare, tmp_path):
    installed = json.loads(uv("pip", "list", "--python", str(bare / "python"), "--format", "json"))
    names = {package["name"] for package in installed}
    assert {"annotated-types", "numpy", "timm", "torch", "ttt-lab"} <= names
    extra = PROJECT["project"]["optional-dependencies"]["pipeline"]
    optional = {requirement.split(">")[0] for requirement in extra}
    brought_by_torch_or_timm = {
        *("filelock", "jinja2", "pillow", "safetensors", "torchvision", "tqdm")
    }
    assert names & optional <= brought_by_torch_or_timm

    snippet = "\n".join(code_blocks("docs/tutorials/python.md"))
    snippet = snippet.replace("pretrained=True", "pretrained=False")  # no download here
    words = ("-W", "error", "-c", SCRIPT, *method_names())
    computed = []
    for python in (bare / "python", sys.executable):
        out, _ = run(python, *words, cwd=tmp_path, given=snippet)
        computed.append(json.loads(out.splitlines()[-1]))
    alone, here = computed
    refused = alone.pop("refused")
    assert here.pop("refused") == {}
    for name in alone:
        np.testing.assert_allclose(alone[name], here[name], rtol=1e-6, err_msg=name)
    assert min(alone["change"]) > 1e-5
    assert alone["opened"] == [True] * 3

    assert refused.keys() == OF_THE_EXTRA
    for line in refused.values():
        assert 'is not installed; run: pip install "ttt-lab[pipeline]"' in line
        assert "\n" not in line


@pytest.mark.slow
def test_what_the_wheel_alone_lacks_ends_in_a_line_that_names_the_extra(bare, tmp_path):
    command = bare / "ttt-lab"
    assert run(command, "--version", cwd=tmp_path)[0].startswith("ttt-lab ")
    assert "predict" in run(command, "--help", cwd=tmp_path)[0]
    for words in (["predict", "photo.png"], ["methods"]):
        out, told = run(command, *words, cwd=tmp_path, code=2)
        assert out == ""
        assert told.startswith("error: this needs the library ")
        assert told.endswith('which is not installed; run: pip install "ttt-lab[pipeline]"\n')


# Loads the registered model that its argument names, and prints what it answers.
LOADING = """
import json, sys
import mlflow, numpy as np

mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/m@champion")
pixels = np.random.default_rng(5).integers(256, size=(3, 20, 24, 3), dtype=np.uint8)
answers = model.predict([{"image": image} for image in pixels], params={"gate": False})
print(json.dumps([list(answer["probabilities"].values()) for answer in answers]))
"""


@pytest.mark.slow
def test_a_registered_model_needs_the_wheel_and_no_repository(wheel, tmp_path):
    """It is loaded from the registry with exactly the requirements that it names."""
    root, example = tmp_path / "project", tmp_path / "example.png"
    folder = served.written(root)
    Image.new("RGB", (16, 16)).save(example)
    parent = pipeline_run(root, Execution("by hand", None))
    with start_run(root, stage="register", name="register", params={}, parent=parent) as opened:
        registry.register(opened, root, "m", folder, "A small model.", example, [])
    (named,) = root.rglob("requirements.txt")
    others = [line for line in named.read_text().split() if not line.startswith("ttt-lab==")]
    store = database_uri(root)
    with environment(tmp_path / "environment", str(wheel), *others) as scripts:
        out, _ = run(scripts / "python", "-c", LOADING, store, cwd=tmp_path)
    here, _ = run(sys.executable, "-c", LOADING, store, cwd=tmp_path)
    alone, expected = (np.array(json.loads(text.splitlines()[-1])) for text in (out, here))
    assert alone.shape == (3, len(served.CLASSES))
    np.testing.assert_allclose(alone, expected, atol=1e-4)
