"""How the stages recognise the launcher that started them, and the copy of an experiment."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from ruamel.yaml import YAML

from tools.stage_code import ROOT
from tttlab.config.experiments import Machine
from tttlab.runtime import ranks
from tttlab.workflow.leftovers import CODE
from tttlab.workflow.processes import open_fabric, started


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        # Fabric's own launcher: machine.devices gives the number of processes.
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, None),
        ({"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, (4, 2)),
        ({"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "3"}, (2, 3)),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}, (1, 1)),
        (
            {"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "interactive"},
            None,
        ),
        (
            {
                "TORCHELASTIC_RUN_ID": "7",
                "LOCAL_WORLD_SIZE": "2",
                "WORLD_SIZE": "2",
                "SLURM_NTASKS": "1",
            },
            (2, 1),
        ),
    ],
)
def test_processes_per_machine_and_machines(environment, expected):
    assert started(environment) == expected


@pytest.mark.parametrize(
    ("devices", "on_cpu", "expected"), [("auto", 3, 3), ("auto", 1, 1), (2, 3, 2), (1, 3, 1)]
)
def test_a_stage_says_how_many_processes_a_cpu_gets_where_the_settings_do_not(
    monkeypatch, devices, on_cpu, expected
):
    asked = []
    monkeypatch.setattr(ranks, "open_fabric", lambda *arguments: asked.append(arguments))
    machine = Machine(device="cpu", precision="32", devices=devices)
    open_fabric(SimpleNamespace(machine=machine), on_cpu)
    assert asked == [("cpu", "32", expected, 1)]


def test_unfinished_work_is_of_all_the_projects_code():
    assert {path.resolve() for path in CODE} == {ROOT / "pipeline", ROOT / "src" / "tttlab"}


@pytest.fixture
def experiment(tmp_path):
    """A project with untracked files, and the copy without them that DVC makes of an experiment."""
    project, copy = tmp_path / "project", tmp_path / "project" / ".dvc" / "tmp" / "exps" / "copy"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in (project, copy):
        for part in ("pipeline", "src"):
            shutil.copytree(ROOT / part, folder / part, ignore=ignore)
    (project / "own").mkdir()
    for file in ("src/tttlab/methods/mine.py", "src/flat.py", "own/flip.py"):
        shutil.copy(ROOT / "src" / "tttlab" / "methods" / "none.py", project / file)

    def run(method: str, folder, environment) -> str:
        values = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        values["adapt"]["runs"]["added"] = {"method": method}
        with (folder / "params.yaml").open("w") as file:
            YAML().dump(values, file)
        inherited = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}
        finished = subprocess.run(
            [sys.executable, "-m", "pipeline.methods"],
            cwd=folder,
            env=inherited | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert finished.returncode == 2
        return finished.stderr.strip()

    return project, copy, run


@pytest.mark.parametrize(
    ("method", "file"), [("mine", "src/tttlab/methods/mine.py"), ("own.flip", "own/flip.py")]
)
def test_a_queued_experiment_says_which_file_git_does_not_know(experiment, method, file):
    project, copy, run = experiment
    message = run(method, copy, {"DVC_ROOT": str(project)})
    problem = "unknown method" if method == "mine" else "no module"
    assert message.startswith(f"error: adapt.runs.added.method: {problem} '{method}'")
    assert message.endswith(
        f"; {file} is not in the copy that an experiment gets, "
        f"for git does not know it: git add {file}"
    )
    assert "\n" not in message


def test_a_name_that_is_nowhere_is_not_gits_fault(experiment):
    project, copy, run = experiment
    for folder, environment in ((copy, {"DVC_ROOT": str(project)}), (project, {})):
        assert "git" not in run("yours", folder, environment)
