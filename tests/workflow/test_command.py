"""What a stage says of itself before it begins."""

import errno
import os
import sqlite3
import sys
from types import SimpleNamespace

import pytest

from tttlab.errors import DISK_FULL, one_line
from tttlab.runtime.process_identity import Identity
from tttlab.workflow import checking, command
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
