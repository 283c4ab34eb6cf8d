import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tttlab.errors import UserError
from tttlab.resuming import Work, content_hash, work_key


@pytest.fixture
def other():
    """A living process that is not this one."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def hold(folder: Path, pid: int, created: float) -> None:
    folder.mkdir(parents=True)
    (folder / "process.json").write_text(json.dumps({"pid": pid, "created": created}), encoding="utf-8")


def test_work_of_a_living_process_is_refused_and_that_of_a_dead_one_taken_over(tmp_path, other):
    hold(tmp_path / "work", other.pid, psutil.Process(other.pid).create_time())
    with pytest.raises(UserError, match=f"running as process {other.pid}; wait for it to end or stop it"):
        Work(tmp_path / "work").__enter__()
    other.kill()
    while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:  # dead, but nobody has asked for its exit status
        time.sleep(0.01)
    with Work(tmp_path / "work"):
        assert json.loads((tmp_path / "work" / "process.json").read_text())["pid"] == psutil.Process().pid
    other.wait()


def test_a_process_that_only_inherited_the_number_holds_nothing(tmp_path, other):
    hold(tmp_path / "work", other.pid, psutil.Process(other.pid).create_time() - 3600)
    with Work(tmp_path / "work"):
        pass


def test_a_lock_cut_off_by_a_full_disk_holds_nothing(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "process.json").write_text('{"pid": ')
    with Work(tmp_path / "work"):
        pass


def test_others_join_work_that_only_its_owner_locks_and_deletes(tmp_path):
    with Work(tmp_path / "work") as work:
        lock = (tmp_path / "work" / "process.json").read_text()
        with Work(tmp_path / "work", owner=False) as joined:
            joined.save("block", {"number": 3})
            assert (tmp_path / "work" / "process.json").read_text() == lock
        assert work.has("block")
        assert not work.has("other")
        assert work.load("block") == {"number": 3}
    assert not (tmp_path / "work").exists()


def test_a_folder_survives_failure_and_goes_after_success(tmp_path):
    def fail() -> None:
        with Work(tmp_path / "work") as work:
            work.save("weights", {"tensor": torch.arange(3), "rows": [{"loss": 0.5}]})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with Work(tmp_path / "work") as work:  # the lock did not stay
        kept = work.load("weights")
        assert kept["rows"] == [{"loss": 0.5}]
        assert kept["tensor"].tolist() == [0, 1, 2]
        assert work.load("something else") is None
    assert not (tmp_path / "work").exists()


def test_a_kill_while_saving_leaves_the_state_before(tmp_path, monkeypatch):
    work = Work(tmp_path)
    work.save("state", {"epoch": 1})

    def die(state, file) -> None:
        file.write(b"half of it")
        raise SystemExit

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(SystemExit):
        work.save("state", {"epoch": 2})
    assert work.load("state") == {"epoch": 1}


def test_key_follows_stage_settings_and_inputs(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "pixels").write_bytes(b"1")

    def key(stage: str = "pretrain", **settings) -> str:
        return work_key(stage, {"seed": 0} | settings, [data])

    first = key()
    assert key() == first
    assert work_key("pretrain", {"seed": 0}, [data, data / "pixels"]) != first
    assert len({first, key("finetune"), key(seed=1), key(lr=0.1)}) == 4
    (data / "pixels").write_bytes(b"2")
    changed = key()
    assert changed != first
    (data / "pixels").rename(data / "labels")
    assert key() not in (first, changed)


def test_content_hash_sees_only_the_files_asked_for(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "code.py").write_text("1")
    before = content_hash(tmp_path, "*.py")
    (tmp_path / "notes.txt").write_text("1")
    assert content_hash(tmp_path, "*.py") == before
    (tmp_path / "inner" / "code.py").write_text("2")
    assert content_hash(tmp_path, "*.py") != before
