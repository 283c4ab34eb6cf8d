"""A stage imports nothing that it does not need: every run of every stage pays for its imports."""

import subprocess
import sys

import pytest

from tools.stage_code import ROOT

COMPILER = """
import sys
from tttlab.runtime.compiler import postpone_compiler

postpone_compiler()
import timm, torch, torchvision

network = torch.nn.Linear(3, 2, dtype=torch.float64).requires_grad_(False)
inputs = torch.ones(1, 3, dtype=torch.float64)
weight = torch.ones(4, 2, 3, dtype=torch.float64, requires_grad=True)

def loss(weight):
    return torch.func.functional_call(network, {"weight": weight}, (inputs,)).sum()

losses = torch.func.vmap(loss)(weight)
weight.grad = torch.autograd.grad(losses.sum(), weight)[0]
torch.optim.Adam([weight], lr=0.5, fused=True).step()
dynamo = sys.modules["torch._dynamo"]
print(weight.detach().sum().item(), type(dynamo).__name__, "sympy" in sys.modules)
boxes = [torch.tensor([[0.0, 0, 4, 4]])]
print(torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), boxes, 2).sum().item())
compiled = torch.compile(network, backend="eager")
equal = torch.equal(compiled(weight[0].detach()), network(weight[0]))
print(equal, torch._dynamo.__name__, torch._dynamo.config.verbose)
import torch._dynamo.utils
supported = torch._dynamo.utils.is_compile_supported("cpu")
print(supported, sys.modules["torch._dynamo"] is torch._dynamo)
"""


def python(*words: str, cwd=ROOT) -> list[str]:
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def imported(code: str, *names: str, cwd=ROOT) -> list[str]:
    """List which of these modules a fresh process has imported after it ran the code."""
    report = f"import sys\nprint(*[name for name in {names} if name in sys.modules])"
    return python("-c", f"{code}\n{report}", cwd=cwd)[-1].split()


@pytest.mark.slow
def test_the_compiler_is_imported_when_something_is_compiled_and_not_before():
    """Adam's first step has the length of the learning rate: 24 ones become halves.

    The mean over ones, pooled to 2 × 2, is one.
    """
    before, pooled, compiled, supported = python("-c", COMPILER)
    total, stand_in, sympy_imported = before.split()
    assert float(total) == pytest.approx(12, abs=1e-6)
    assert (stand_in, sympy_imported) == ("_Compiler", "False")
    assert float(pooled) == 4
    assert compiled == "True torch._dynamo False"
    assert supported == "True True"


def run(stage: str, run: str) -> str:
    return (
        "import sys\n"
        f"sys.argv = ['{stage}', '{run}', '--params', r'{ROOT / 'params.yaml'}']\n"
        f"sys.path.insert(0, r'{ROOT}')\n"
        "import runpy\n"
        f"runpy.run_module('pipeline.{stage}', run_name='__main__', alter_sys=True)\n"
    )


@pytest.mark.parametrize(
    ("stage", "name"), [("tune", "none"), ("align", "none"), ("align", "shrink")]
)
def test_a_stage_that_has_nothing_to_do_ends_before_anything_heavy_is_imported(
    stage, name, tmp_path
):
    heavy = ("torch", "pandas", "mlflow", "timm", "scipy.stats")
    assert imported(run(stage, name), *heavy, cwd=tmp_path) == []
    # `tune` has written what `adapt` reads; where nothing is aligned, nothing is written.
    files = [path.name for path in (tmp_path / "outputs").rglob("*") if path.is_file()]
    written = ["made_of.json", "mae_vit.json", "simclr_convnet.json"]
    assert sorted(files) == (written if stage == "tune" else [])


def test_adapting_imports_what_it_needs():
    """MLflow and pandas on first use, libraries for views and corruptions where there are any."""
    start = (
        "from tttlab.runtime.compiler import postpone_compiler\npostpone_compiler()\n"
        "from tttlab.workflow import adaptations, processes\n"
    )
    heavy = (
        "mlflow",
        "pandas",
        "albumentations",
        "lightning_fabric",
        "pytorch_lightning",
        "scipy.stats",
        "sklearn",
        "sympy",
    )
    assert imported(start, *heavy) == []
    assert imported(start, "timm") == ["timm"]  # so the check works


def test_preparing_and_training_import_what_they_need():
    """The embedded images need no torch; a single process on a CPU trains without Fabric."""
    heavy = ("torch", "timm", "sklearn", "mlflow")
    assert imported("from tttlab.workflow import gathering, set_files", *heavy) == []
    start = (
        "from tttlab.runtime.compiler import postpone_compiler\npostpone_compiler()\n"
        "from tttlab.workflow import finetuning, pretraining\n"
        "from tttlab.runtime.ranks import open_fabric\n"
        "open_fabric('cpu', '32')\n"
    )
    heavy = ("lightning_fabric", "pytorch_lightning", "scipy.stats")
    assert imported(start, *heavy) == []
