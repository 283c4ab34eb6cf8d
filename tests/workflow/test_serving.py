"""The command that serves: its mistakes, and a server of two processes of which one is killed."""

import errno
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from PIL import Image

from tests.helpers import bodies, served
from tttlab.errors import UserError
from tttlab.runtime import devices
from tttlab.serving import loading, server, watching
from tttlab.serving.pictures import Limits
from tttlab.workflow import cli
from tttlab.workflow.serving import FAILED_TO_START, Asked, application, configure

JSON = {"Content-Type": "application/json"}


def test_options_become_a_configuration(tmp_path):
    assert configure([], None, together=None, device=None) == {}
    assert configure([], None, device="auto") == {"device": "auto"}
    found = configure(["images=8", "seconds=2.5"], str(tmp_path), together=16, device="cpu")
    expected = {"images": 8, "seconds": 2.5, "folder": str(tmp_path.resolve())}
    assert found == expected | {"together": 16, "device": "cpu"}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((["image=8"], None), "--limit: no limit 'image'; did you mean 'images'? allowed: "),
        ((["folder=/"], None), "--limit: no limit 'folder'; "),
        ((["images=many"], None), "--limit: expected images=<number above 0, up to "),
        ((["images"], None), "--limit: expected images=<number above 0, up to "),
        ((["seconds=0"], None), "--limit: expected seconds=<number above 0, up to "),
        ((["seconds=nan"], None), "--limit: expected seconds=<number above 0, up to "),
        (
            (["seconds=inf"], None),
            "--limit: expected seconds=<number above 0, up to 1,000,000,000>",
        ),
        ((["seconds=1e10"], None), "--limit: expected seconds=<number above 0, up to"),
        ((["images=1.5"], None), "--limit: expected images=<number above 0, up to "),
        (([], "nowhere"), "--images: expected a folder, found none at nowhere"),
    ],
)
def test_a_wrong_option_is_told(options, line):
    with pytest.raises(UserError) as caught:
        configure(*options)
    assert line in str(caught.value)


@pytest.mark.parametrize("name", ["foo", "auto:1", "cuda:", "cuda:-1", "cuda:01", "mps", ""])
def test_a_name_of_no_device_is_told(name):
    with pytest.raises(UserError) as caught:
        configure([], None, device=name)
    assert str(caught.value) == (f"--device: expected auto, cpu, cuda or cuda:<n>, found {name!r}")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:2", "cuda:" + "9" * 30])
def test_a_missing_gpu_is_told_as_it_was_asked_for(name, monkeypatch):
    found = 0 if name in ("cuda", "cuda:0") else 2
    monkeypatch.setattr(devices, "count_gpus", lambda: found)
    with pytest.raises(UserError) as caught:
        configure([], None, device=name)
    line = f"expected a GPU for {name!r}, found {found}; set auto or cpu"
    assert str(caught.value) == f"--device: {line}"
    with pytest.raises(UserError) as caught:
        devices.choose_device(name)
    assert str(caught.value) == f"machine.device: {line}"


def test_a_store_that_cannot_be_read_ends_in_one_line(tmp_path):
    """Before two processes find out, of which each is started again and again."""
    folder = served.written(tmp_path / "model")
    (tmp_path / "mlflow.db").write_text("no database, and longer than sixteen bytes")
    done = run("serve", "--folder", str(folder), "--workers", "2", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path}/mlflow.db: expected a database of MLflow, ")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("mlflow.db: expected this, found that"), "error: mlflow.db: expected this, "),
        (OSError(errno.ENOSPC, "No space left on device"), "error: the disk is full; "),
        (RuntimeError("a fault of ours"), "Traceback (most recent call last):"),
    ],
)
@pytest.mark.parametrize("place", ["load", "Record", "create"])
def test_what_keeps_a_process_from_starting_ends_the_server(
    place, error, told, tmp_path, monkeypatch, capsys
):
    """By the status that uvicorn does not start again, and told by one process."""

    def fail(*_):
        raise error

    service = SimpleNamespace(
        waiting=0, limits=Limits(), model=SimpleNamespace(name="m"), watchers=[]
    )
    model = SimpleNamespace(unwrap_python_model=lambda: SimpleNamespace(service=service))
    monkeypatch.setattr(loading, "load", lambda *_: model)
    monkeypatch.setattr(watching, "Record", lambda *_: None)
    module = {"load": loading, "Record": watching, "create": server}[place]
    monkeypatch.setattr(module, place, fail)
    asked = Asked("models:/m/1", {}, str(tmp_path), True, str(tmp_path / "mistake"))
    monkeypatch.setenv("TTTLAB_SERVE", json.dumps(asdict(asked)))
    lines = []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            application()
        assert ended.value.code == FAILED_TO_START
        lines.append(capsys.readouterr().err)
    assert lines[0].startswith(told)
    assert lines[1] == ""
    assert (lines[0].count("\n") == 1) == told.startswith("error: ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "mlflow.db: expected registered models, found no file; run `make repro` first"),
        (["--folder", "."], "--folder: model.json: expected a model that adapts, found no file"),
        (["--workers", "0"], "--workers: expected at least 1, found 0"),
        (["--device", "foo"], "--device: expected auto, cpu, cuda or cuda:<n>, found 'foo'"),
        (["--together", "0"], "--together: expected at least 1, found 0"),
        (["--port", "99999"], "--port 99999: expected a free port"),
    ],
)
def test_a_mistake_ends_in_one_line(words, line, tmp_path):
    done = run("serve", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert line in done.stderr


def run(*words, cwd):
    command = [sys.executable, "-m", "tttlab.workflow.cli", *words]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def test_one_model_is_asked_for_in_one_way(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "--model", "a", "--folder", "b"])
    assert "not allowed with" in capsys.readouterr().err


class Server:
    """A server in processes of its own."""

    def __init__(self, *words, cwd, temporary):
        temporary.mkdir()
        self.log = open(cwd / "log", "w", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tttlab.workflow.cli", "serve", "--port", "5600", *words],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"TMPDIR": str(temporary)},
        )
        self.told = [self.process.stdout.readline() for _ in range(4)]
        self.port = int(re.match(r"http://127\.0\.0\.1:(\d+) ", self.told[0])[1])

    def ask(self, method="GET", path="/ping", body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, JSON if body else {})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def predict(self, *images, **params):
        status, text = self.ask("POST", "/invocations", bodies.of(*images, **params))
        return status, json.loads(text)

    def wait(self):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                return self.ask()[0]
            except OSError:
                assert self.process.poll() is None, "it ended"
                time.sleep(0.2)
        raise TimeoutError

    def workers(self):
        found = []
        for child in psutil.Process(self.process.pid).children():
            try:
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child.pid)
            except psutil.Error:  # a zombie
                pass
        return found

    def end(self):
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(60)
        self.process.stdout.close()
        self.log.close()
        return code


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_others_go_on(tmp_path):
    folder = served.written(tmp_path / "model")
    words = ("--folder", str(folder), "--workers", "2", "--limit", "images=3", "--device", "cpu")
    server = Server(*words, cwd=tmp_path, temporary=tmp_path / "temporary")
    try:
        assert server.wait() == 200
        _, expected = server.predict(bodies.GOOD)
        first = server.workers()
        assert len(first) == 2
        os.kill(first[0], signal.SIGKILL)
        lost, deadline = 0, time.monotonic() + 60
        while len(server.workers()) < 2 and time.monotonic() < deadline:
            try:
                status, answer = server.predict(bodies.GOOD)
                assert status == 200
                assert answer["predictions"][0]["class"] == expected["predictions"][0]["class"]
            except (OSError, http.client.HTTPException):
                lost += 1
        assert lost <= 1  # what was on its way to the killed one
        second = server.workers()
        assert first[1] in second
        assert first[0] not in second
        status, answer = server.predict(*[bodies.GOOD] * 4)
        assert (status, answer["message"]) == (400, "expected 1 to 3 images, found 4")
        told = json.loads(server.ask(path="/model")[1])
        assert (told["name"], told["workers"], told["limits"]["images"]) == ("m", 2, 3)
    finally:
        code = server.end()
    assert code == 0, (tmp_path / "log").read_text(encoding="utf-8")
    assert list((tmp_path / "temporary").glob("ttt-lab-*")) == []


@pytest.mark.slow
def test_the_champion_is_served_and_recorded(tmp_path):
    from tttlab.serving import registry
    from tttlab.tracking.runs import start_run
    from tttlab.tracking.store import open_store

    root = tmp_path / "project"
    root.mkdir()
    folder = served.written(tmp_path / "model")
    Image.new("RGB", (16, 16)).save(folder / "example.png")
    client, _ = open_store(root)
    with start_run(root, stage="register", name="register m", params={}, parent="0" * 32) as run_:
        registry.register(run_, root, "m", folder, "# card", folder / "example.png", [])
    done = run("serve", "--model", "n", cwd=root)
    assert "--model: no registered model 'n'; allowed: m" in done.stderr
    server = Server("--model", "m", cwd=root, temporary=tmp_path / "temporary")
    try:
        assert server.wait() == 200
        status, answer = server.predict(bodies.GOOD, run="shrink")
        assert (status, answer["predictions"][0]["run"]) == (200, "shrink")
        told = json.loads(server.ask(path="/model")[1])
        assert (told["source"], told["version"]) == ("models:/m@champion", 1)
    finally:
        assert server.end() == 0
    (kept,) = [
        run_
        for run_ in client.search_runs([open_store(root)[1]])
        if run_.data.tags.get("stage") == "serve"
    ]
    assert kept.info.status == "FINISHED"
    assert kept.data.metrics["shrink/images"] == 1
    assert kept.data.params["source"] == "models:/m@champion"


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_folder_that_holds_another_model_ends_in_one_line(workers, tmp_path):
    (tmp_path / "model.json").write_text("{}", encoding="utf-8")
    words = ("--folder", str(tmp_path), "--no-record", "--workers", workers)
    done = run("serve", *words, cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == FAILED_TO_START
    assert len(errors) == 1
    assert "Traceback" not in done.stderr


def test_the_curl_line_is_that_of_the_documentation():
    from tttlab.workflow.serving import HELP

    text = Path("docs/serving.md").read_text(encoding="utf-8")
    for line in HELP.format(address="http://127.0.0.1:5001").splitlines()[1:]:
        assert line.strip(" |") in text
