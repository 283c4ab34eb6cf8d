"""What a stage's process imports: seconds that every stage of every run pays, so nothing that it does not need."""

import subprocess
import sys

import pytest

from tools.stage_code import ROOT

COMPILER = """
import sys
from tttlab.runtime.compiler import postpone_compiler

postpone_compiler()
import timm, torch, torchvision

network, weight = torch.nn.Linear(3, 2, dtype=torch.float64), torch.ones(4, 2, 3, dtype=torch.float64, requires_grad=True)
network.requires_grad_(False)

def one(weight):
    return torch.func.functional_call(network, {"weight": weight}, (torch.ones(1, 3, dtype=torch.float64),)).sum()

losses = torch.func.vmap(one)(weight)
weight.grad = torch.autograd.grad(losses.sum(), weight)[0]
torch.optim.Adam([weight], lr=0.5, fused=True).step()
print(weight.detach().sum().item(), type(sys.modules["torch._dynamo"]).__name__, "sympy" in sys.modules)
print(torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), [torch.tensor([[0.0, 0, 4, 4]])], 2).sum().item())
compiled = torch.compile(network, backend="eager")
print(torch.equal(compiled(weight[0].detach()), network(weight[0])), torch._dynamo.__name__, torch._dynamo.config.verbose)
import torch._dynamo.utils
print(torch._dynamo.utils.is_compile_supported("cpu"), sys.modules["torch._dynamo"] is torch._dynamo)
"""


def python(*words: str, cwd=ROOT) -> list[str]:
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def imported(code: str, *names: str, cwd=ROOT) -> list[str]:
    """Which of these modules a fresh process has imported after some code."""
    return python(
        "-c",
        f"{code}\nimport sys\nprint(*[name for name in {names} if name in sys.modules])",
        cwd=cwd,
    )[-1].split()


def test_the_compiler_is_imported_when_something_is_compiled_and_not_before():
    """Adam's first step is one learning rate long: 24 ones become halves. The mean over ones is one."""
    first, pooled, compiled, asked = python("-c", COMPILER)
    total, stand_in, algebra = first.split()
    assert float(total) == pytest.approx(12, abs=1e-6)
    assert (stand_in, algebra) == ("_Compiler", "False")
    assert float(pooled) == 4
    assert compiled == "True torch._dynamo False"
    assert asked == "True True"


def run(stage: str, run: str) -> str:
    return (
        "import sys\n"
        f"sys.argv = ['{stage}', '{run}', '--params', r'{ROOT / 'params.yaml'}']\n"
        f"sys.path.insert(0, r'{ROOT}')\n"
        "import runpy\n"
        f"runpy.run_module('pipeline.{stage}', run_name='__main__', alter_sys=True)\n"
    )


@pytest.mark.parametrize(
    ("stage", "name"), [("tune", "none"), ("tune", "views"), ("align", "none"), ("align", "shrink")]
)
def test_a_stage_that_has_nothing_to_do_ends_before_anything_heavy_is_imported(
    stage, name, tmp_path
):
    assert (
        imported(run(stage, name), "torch", "pandas", "mlflow", "timm", "scipy.stats", cwd=tmp_path)
        == []
    )
    # `tune` has written what `adapt` reads; where nothing is aligned, nothing is written.
    files = [path.name for path in (tmp_path / "outputs").rglob("*") if path.is_file()]
    written = ["made_of.json", "mae_vit.json", "simclr_convnet.json"]
    assert sorted(files) == (written if stage == "tune" else [])


def test_adapting_imports_what_it_needs():
    """MLflow on first use, and the makers of views and corruptions, which import nothing light, where there are any."""
    start = (
        "from tttlab.runtime.compiler import postpone_compiler\npostpone_compiler()\n"
        "from tttlab.workflow import curves, network_runs, processes\n"
    )
    heavy = (
        "mlflow",
        "albumentations",
        "lightning_fabric",
        "pytorch_lightning",
        "scipy.stats",
        "sklearn",
        "sympy",
    )
    assert imported(start, *heavy) == []
    assert imported(start, "timm") == ["timm"]  # the check itself works
