"""The study for a lent GPU: its order, that it goes on where it stopped, and one real row."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import arc, mixers
from tools import gpu_study
from tools.gpu_study import Piece, list_pieces, show, study
from tttlab.runtime import devices

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_most_valuable_come_first_and_every_piece_has_a_file_of_its_own():
    pieces = list(list_pieces(CUDA))
    assert pieces[0] == Piece("tests")
    assert pieces[-1] == Piece("scaling")
    rows = pieces[1:-1]
    assert [row.precision for row in rows] == ["bfloat16"] * 8 + ["float32"] * 8
    assert all("@224" in row.case for row in rows[:4])
    assert {row.case.split("@")[0] for row in rows} == {"resnet18", "vit_small"}
    assert len({piece.file for piece in pieces}) == len(pieces)
    assert rows[0].file == "row_resnet18@224-views8-all_bfloat16.json"


@pytest.fixture
def ran(monkeypatch):
    """Keep what would be run; the first piece fails once, the second takes too long once."""
    commands, faults = (
        [],
        [subprocess.CalledProcessError(3, "x"), subprocess.TimeoutExpired("x", 1)],
    )

    def run(command, timeout, check):
        assert 0 < timeout <= gpu_study.LIMIT
        commands.append(command[4])
        if faults:
            raise faults.pop(0)
        out = Path(command[command.index("--out") + 1])
        (out / list(list_pieces(CPU))[int(command[4])].file).write_text("{}")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_what_failed_or_took_too_long_is_tried_again_and_what_is_done_is_not(ran, tmp_path, capsys):
    numbers = [str(number) for number in range(len(list(list_pieces(CPU))))]
    study(tmp_path, CPU, True, 5)
    assert ran == numbers
    printed = capsys.readouterr().out
    assert "tests.json: failed with exit code 3" in printed
    assert "stopped after" in printed
    study(tmp_path, CPU, True, 5)
    assert ran == [*numbers, "0", "1"]


def test_nothing_is_begun_when_time_is_over(ran, tmp_path, capsys):
    study(tmp_path, CPU, True, 0.1)
    assert not ran
    assert "the same command goes on" in capsys.readouterr().out


def test_a_row_is_the_benchmarks_own(tmp_path, monkeypatch, capsys):
    arguments = ["gpu_study", "--device", "cpu", "--smoke", "--out", str(tmp_path), "--piece", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu_study.main()
    piece = list(list_pieces(CPU))[2]
    assert [file.name for file in tmp_path.iterdir()] == [piece.file]
    row = json.loads((tmp_path / piece.file).read_text())
    assert row["name"] == piece.case
    assert row["ours_over_floor"] > 0
    assert row["machine"]["torch"] == torch.__version__
    show(tmp_path)
    assert capsys.readouterr().out.startswith(piece.case)


def test_a_machine_without_a_gpu_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_study", "--device", "cpu"])
    with pytest.raises(SystemExit):
        gpu_study.main()
    assert "expected a GPU, found none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module", [gpu_study, benchmarks, mixers, arc], ids=lambda one: one.__name__
)
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("foo", "expected auto, cpu, cuda or cuda:<n>, found 'foo'"),
        ("cuda:7", "expected a GPU for 'cuda:7', found 3; set auto or cpu"),
    ],
)
def test_a_wrong_device_is_told_in_one_line(module, name, line, monkeypatch, capsys):
    monkeypatch.setattr(devices, "count_gpus", lambda: 3)
    monkeypatch.setattr(sys, "argv", ["a benchmark", "--device", name])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: --device: {line}\n"
