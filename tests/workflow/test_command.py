"""What a stage says of itself before it begins."""

import errno
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.stage_code import ROOT
from tttlab.errors import DISK_FULL, one_line
from tttlab.runtime.process_identity import Identity
from tttlab.workflow import checking, cli, command, places, ui
from tttlab.workflow.environment import VARIABLES
from tttlab.workflow.order import SHARES, position


def test_a_stage_tells_what_is_left_itself_included():
    shares = list(SHARES.values())
    assert position("methods") == "stage 1 of 12, methods: about 100 % of the default run is left"
    left = sum(shares[-3:])
    assert position("evaluate").startswith(f"stage 10 of 12, evaluate: about {left} %")


@pytest.mark.parametrize(
    ("stage", "driver", "rank", "told"),
    [
        ("tune", True, 0, True),
        ("tune", False, 0, False),  # by hand
        ("tune", True, 1, False),  # one of several processes
        ("stage_of_ones_own", True, 0, False),
    ],
)
def test_only_the_first_process_that_dvc_started_tells_it(
    monkeypatch, capsys, tmp_path, stage, driver, rank, told
):
    spec = SimpleNamespace(name=f"pipeline.{stage}")
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    monkeypatch.setattr(sys, "argv", [stage])
    monkeypatch.setattr(command, "RANK", rank)
    found = Identity(os.getpid(), 0.0) if driver else None
    monkeypatch.setattr(command, "find_driver", lambda _process: found)
    monkeypatch.setattr(command, "read_params", lambda *_, **__: SimpleNamespace(seeds=(0,)))
    command.main(lambda _params: None, "a stage")
    assert (position("tune") in capsys.readouterr().out) == told


def test_check_runs_the_same_stages_in_the_same_order():
    assert list(checking.STAGES) == list(SHARES)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "outputs/a"),
        RuntimeError("writing failed: No space left on device (os error 28)"),
        sqlite3.OperationalError("database or disk is full"),
    ],
)
def test_a_full_disk_is_told_in_one_line(error, capsys):
    with pytest.raises(SystemExit) as ended, one_line():
        raise error
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {DISK_FULL}\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(OSError, match="not found"), one_line():
        raise OSError(errno.ENOENT, "not found")


@pytest.mark.parametrize("folder", ["pipeline", "arc/pipeline"])
def test_a_copy_of_the_project_imports_its_own_sources_and_asks_nobody(folder, tmp_path):
    """A queued DVC experiment runs in such a copy."""
    copy = tmp_path / "copy"
    for part in (folder, "src/tttlab"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import os, pipeline, tttlab; print(tttlab.__file__); print(os.environ)"
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=(copy / folder).parent,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.splitlines()[0]).is_relative_to(copy)
    assert all(f"'{name}': '{value}'" in done.stdout for name, value in VARIABLES.items())


def test_a_command_to_be_copied_quotes_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "ROOT", tmp_path / "my results")
    folder = f"'{tmp_path / 'my results'}'"
    assert places.look_with("ui") == f"cd {folder} && {places.program()} ui"
    monkeypatch.setattr(places, "ROOT", ROOT)
    assert places.look_with("ui") == "make ui"
    monkeypatch.chdir(tmp_path)
    assert places.look_with("ui") == f"cd {ROOT} && make ui"


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("script", [True, False], ids=["script", "module"])
def test_a_command_to_be_copied_runs_where_there_is_no_project(
    tmp_path, monkeypatch, inside, script
):
    """In any shell: the environment of uv and the project's Makefile are not there."""
    out = tmp_path / "my results"
    page = out / "outputs" / "report.html"
    page.parent.mkdir(parents=True)
    page.write_text("", encoding="utf-8")
    (out / "Makefile").write_text("report:\n\tfalse\n", encoding="utf-8")  # of another project
    monkeypatch.setattr(places, "ROOT", out)
    monkeypatch.chdir(out if inside else tmp_path)
    if not script:
        monkeypatch.setattr(places.shutil, "which", lambda *_, **__: None)
    done = subprocess.run(
        ["/bin/sh", "-c", places.look_with("report")],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{page}\n"


def test_a_port_that_answers_or_may_not_be_taken_is_passed_over(monkeypatch):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        assert ui.is_taken(busy.getsockname()[1])
        port = busy.getsockname()[1]
    assert not ui.is_taken(port)

    def forbidden(_socket, _address):
        raise PermissionError

    monkeypatch.setattr(ui.socket, "socket", type("S", (socket.socket,), {"bind": forbidden}))
    assert ui.is_taken(port)


def test_ctrl_c_ends_in_one_line(monkeypatch, capsys):
    def interrupted(_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_methods", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main(["methods"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    monkeypatch.setattr(cli, "_check", interrupted)
    with pytest.raises(SystemExit):
        cli.main(["check", "--network", "a.pt"])
    assert capsys.readouterr().err.startswith("interrupted; the same command goes on")


def test_predict_writes_a_dash_for_what_is_no_number():
    told = {"file": "a.png", "source_class": "ant", "class": "bee", "milliseconds": 4.0}
    told |= {"source_confidence": None, "confidence": 0.75, "distance": None}
    shown = cli._shown(told | {"gate": None, "fell_back": False})
    assert (shown["without"], shown["with"]) == ("ant (–)", "bee (75%)")
    assert (shown["distance"], shown["gate"]) == ("–", "–")
