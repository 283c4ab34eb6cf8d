"""Half-finished work: found again by its key, locked, and deleted when nobody needs it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import packages_distributions, version
from pathlib import Path

import psutil
import pytest
import torch

from tools.stage_code import FOLDERS, ROOT, closure, imported
from tttlab.errors import UserError
from tttlab.runtime import resuming
from tttlab.runtime.process_identity import Identity
from tttlab.runtime.resuming import Work, content_hash, forget_abandoned, forget_recorded, work_key


@pytest.fixture
def process():
    """A living process other than this one."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def hold(folder: Path, pid: int, created: float) -> None:
    folder.mkdir(parents=True)
    content = json.dumps({"pid": pid, "created": created})
    (folder / "process.json").write_text(content, encoding="utf-8")


def test_work_of_a_living_process_is_refused_and_that_of_a_dead_one_taken_over(tmp_path, process):
    hold(tmp_path / "work", process.pid, psutil.Process(process.pid).create_time())
    message = f"running as process {process.pid}; wait for it to end or stop it"
    with pytest.raises(UserError, match=message):
        Work(tmp_path / "work").__enter__()
    process.kill()
    # A zombie is dead, but nobody has asked for its exit status.
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with Work(tmp_path / "work"):
        lock = json.loads((tmp_path / "work" / "process.json").read_text())
        assert lock["pid"] == psutil.Process().pid
    process.wait()


def test_a_process_that_only_inherited_the_number_holds_nothing(tmp_path, process):
    hold(tmp_path / "work", process.pid, psutil.Process(process.pid).create_time() - 3600)
    with Work(tmp_path / "work"):
        pass


def test_a_lock_cut_off_by_a_full_disk_holds_nothing(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "process.json").write_text('{"pid": ')
    with Work(tmp_path / "work"):
        pass


def test_a_lock_of_another_machine_says_nothing_of_a_process_here(tmp_path, process):
    hold(tmp_path / "work", process.pid, psutil.Process(process.pid).create_time())
    lock = tmp_path / "work" / "process.json"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"host": "elsewhere"}))
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
    with Work(tmp_path / "work") as work:  # the lock is gone
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

    code = tmp_path / "code"
    code.mkdir()
    (code / "stage.py").write_text("1")

    def key(stage: str = "pretrain", **settings) -> str:
        return work_key(stage, {"seed": 0} | settings, [data], [code])

    first = key()
    assert key() == first
    assert work_key("pretrain", {"seed": 0}, [data, data / "pixels"], [code]) != first
    assert len({first, key("finetune"), key(seed=1), key(lr=0.1)}) == 4
    (code / "stage.py").write_text("2")
    assert key() != first
    (code / "stage.py").write_text("1")
    assert key() == first
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


def test_key_follows_the_version_of_every_library_that_computes(tmp_path, monkeypatch):
    """All imports of stages with unfinished work, except for files, settings, processes, tables."""
    stages = ("pretrain", "finetune", "tune", "adapt")
    paths = closure(*(FOLDERS["pipeline"] / f"{stage}.py" for stage in stages))
    names = {name.partition(".")[0] for path in paths for name in imported(path)}
    names -= sys.stdlib_module_names
    handling = {
        "alembic",
        "annotated_types",
        "filelock",
        "matplotlib",
        "mlflow",
        "pandas",
        "psutil",
        "pyarrow",
        "pydantic",
        "pydantic_core",
        "ruamel",
        "safetensors",
        "sqlalchemy",
        "tqdm",
        "pipeline",
        "tttlab",
    }
    distributions, libraries = packages_distributions(), set(resuming.LIBRARIES)
    missing = {
        name for name in names - handling if not set(distributions.get(name, ())) & libraries
    }
    assert missing == set()
    assert {"torch", "cv2", "numpy"} <= names
    assert "albucore" in resuming.LIBRARIES  # albumentations computes with it
    first = work_key("tune", {}, [], [])
    for library in resuming.LIBRARIES:

        def changed(name, library=library):
            return "0" if name == library else version(name)

        monkeypatch.setattr(resuming, "version", changed)
        assert work_key("tune", {}, [], []) != first


class TestFinished:
    def test_without_a_dvc_that_records_it_it_goes_at_once(self, tmp_path):
        with Work(tmp_path / "work") as work:
            work.save("block", {"number": 3})
        assert not (tmp_path / "work").exists()

    def test_it_stays_until_the_same_dvc_runs_another_stage(self, tmp_path, process):
        driver = Identity.of(psutil.Process(process.pid))
        with Work(tmp_path / "work", driver=driver) as work:
            work.save("block", {"number": 3})
            first = work.id
        forget_recorded(tmp_path, Identity.of(psutil.Process()))  # another DVC knows nothing of it
        forget_recorded(tmp_path, driver._replace(created=driver.created - 3600))
        with Work(tmp_path / "work", driver=driver) as again:
            assert again.load("block") == {"number": 3}
            assert again.id == first  # so that its run in MLflow goes on
            forget_recorded(tmp_path, driver)  # it is unfinished again
        assert (tmp_path / "work" / "block.pt").exists()
        forget_recorded(tmp_path, driver)
        assert not (tmp_path / "work").exists()
        with Work(tmp_path / "work", driver=driver) as new:
            assert not new.has("block")
            assert new.id != first

    def test_half_finished_work_is_never_taken_for_recorded(self, tmp_path, process):
        driver = Identity.of(psutil.Process(process.pid))
        work = Work(tmp_path / "work", driver=driver)
        with pytest.raises(KeyboardInterrupt), work:
            raise KeyboardInterrupt
        work.save("block", {"number": 3})
        forget_recorded(tmp_path, driver)
        assert work.has("block")


STAGE = """
import os, signal, sys
from pathlib import Path
from tttlab.workflow.leftovers import store, tidy
from tttlab.runtime.resuming import Work

name, fatal = sys.argv[1], Path("fatal")
driver = tidy()
with Work(store() / name, name, driver=driver) as work:
    print(f"{name}: {'taken up' if work.has('block') else 'computed'}", flush=True)
    work.save("block", {})
    Path(f"{name}.txt").write_text(name)
if fatal.exists():
    fatal.unlink()
    os.kill(driver.pid, signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_dvc_killed_between_a_stages_last_line_and_its_record_costs_no_work(tmp_path):
    run = f"{sys.executable} stage.py"
    stages = {
        "one": {"cmd": f"{run} one", "outs": ["one.txt"]},
        "two": {"cmd": f"{run} two", "deps": ["one.txt"], "outs": ["two.txt"]},
    }
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "fatal").touch()
    (tmp_path / ".dvc").mkdir()
    config = "[core]\nno_scm = true\nanalytics = false\ncheck_update = false\n"
    (tmp_path / ".dvc" / "config").write_text(config)
    environment = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}
    environment["PYTHONPATH"] = str(ROOT / "src")

    def repro() -> tuple[int, list[str]]:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "repro"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if re.match("(one|two):", line)]
        return done.returncode, lines

    def kept() -> list[str]:
        return sorted(path.name for path in (tmp_path / ".resume").iterdir() if path.is_dir())

    assert repro() == (-signal.SIGKILL, ["one: computed"])
    assert kept() == ["one"]
    assert not (tmp_path / "dvc.lock").exists()
    assert repro() == (0, ["one: taken up", "two: computed"])
    assert kept() == ["two"]  # the last stage; the next one, such as evaluate, would delete it


class TestAbandoned:
    @staticmethod
    def leave(store: Path, name: str, days: float, size: int = 10, **lock) -> Path:
        folder = store / name
        folder.mkdir(parents=True)
        (folder / "about.json").write_text(json.dumps({"id": name, "stage": f"tune {name}"}))
        (folder / "block.pt").write_bytes(b"0" * size)
        if lock:
            (folder / "process.json").write_text(json.dumps(lock))
        for path in (*folder.iterdir(), folder):
            os.utime(path, 2 * (time.time() - days * 86_400,))
        return folder

    def test_another_setting_tried_for_some_days_leaves_the_first_ones_work(self, tmp_path):
        folders = [self.leave(tmp_path, name, days) for name, days in (("a", 3), ("b", 13.9))]
        assert forget_abandoned(tmp_path, tmp_path / "wanted") == []
        assert all(folder.exists() for folder in folders)

    def test_what_is_old_goes_with_a_line_but_never_what_is_wanted_or_in_hand(
        self, tmp_path, process
    ):
        pid, created = Identity.of(psutil.Process(process.pid))
        self.leave(tmp_path, "old", 14.1, size=3 * 2**20)
        self.leave(tmp_path, "dead", 15, pid=pid, created=created - 3600)
        self.leave(tmp_path, "elsewhere", 15, pid=pid, created=created, host="elsewhere")
        self.leave(tmp_path, "wanted", 30)
        self.leave(tmp_path, "living", 30, pid=pid, created=created)
        for name, age in (("unrecorded", 0), ("given_up", 3600)):  # the second's DVC is gone
            mark = self.leave(tmp_path, name, 30) / "finished.json"
            mark.write_text(json.dumps({"pid": pid, "created": created - age}))
            for path in (mark, mark.parent):
                os.utime(path, 2 * (time.time() - 30 * 86_400,))
        lines = forget_abandoned(tmp_path, tmp_path / "wanted")
        assert lines[0] == (
            f"threw away what tune old left in {tmp_path.name} (3 MiB): "
            "last used more than 14 days ago"
        )
        assert len(lines) == 4
        kept = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
        assert kept == ["living", "unrecorded", "wanted"]

    def test_of_much_the_newest_stays_and_then_what_fits(self, tmp_path, monkeypatch):
        monkeypatch.setattr(resuming, "KEPT_BYTES", 5 * 2**20)
        self.leave(tmp_path, "wanted", 0, size=9 * 2**20)
        self.leave(tmp_path, "newest", 1, size=3 * 2**20)
        self.leave(tmp_path, "large", 2, size=3 * 2**20)
        self.leave(tmp_path, "fits", 3, size=1 * 2**20)
        self.leave(tmp_path, "elsewhere", 4, size=9 * 2**20, pid=1, created=0.0, host="elsewhere")
        lines = forget_abandoned(tmp_path, tmp_path / "wanted")
        assert [line.split()[4] for line in lines] == ["large"]
        assert "last used 2 days ago, and 0 GiB of newer work are kept" in lines[0]
        (tmp_path / "newest" / "block.pt").write_bytes(b"0" * 6 * 2**20)
        lines = forget_abandoned(tmp_path, tmp_path / "wanted")
        assert [line.split()[4] for line in lines] == ["fits"]
        assert (tmp_path / "newest").exists()

    def test_a_store_that_does_not_exist_yet_holds_nothing(self, tmp_path):
        assert forget_abandoned(tmp_path / "new", tmp_path / "new" / "wanted") == []
