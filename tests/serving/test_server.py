"""The server over real HTTP: right answers, wrong bodies, limits, counts and MLflow's run."""

import http.client
import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn

from tests.helpers import bodies, served
from tttlab.serving import loading, server
from tttlab.serving.answers import Wish
from tttlab.serving.watching import Metrics, Record

JSON = {"Content-Type": "application/json"}
SECOND = 1.0


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return served.written(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def wrapped(model_folder, tmp_path_factory):
    return loading.wrap(model_folder, tmp_path_factory.mktemp("mlflow") / "model")


@pytest.fixture(scope="module")
def allowed(tmp_path_factory):
    """A folder with an image that may be asked for, beside one that may not."""
    folder = tmp_path_factory.mktemp("images") / "allowed"
    folder.mkdir()
    (folder / "inside.png").write_bytes(bodies.GOOD)
    (folder.parent / "outside.png").write_bytes(bodies.GOOD)
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    return folder


@contextmanager
def serving(wrapped, root, record=False, **config):
    """Serve in a thread; → port, what answers behind it, what counts and the MLflow run."""
    model = loading.load(wrapped, root, config)
    service = model.unwrap_python_model().service
    counts = Metrics(lambda: service.waiting)
    kept = Record(root, "m", {}, seconds=3600) if record else None
    app = server.create(model, {"source": "test"}, counts, kept)
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    (listener,) = running.servers
    try:
        yield listener.sockets[0].getsockname()[1], service, counts, kept
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def running(wrapped, allowed, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    with serving(wrapped, root, folder=str(allowed)) as (port, service, counts, _):
        ask(port, bodies.of(bodies.GOOD))  # the first one pays for warming up
        yield port, service, counts


def ask(port, body, headers=JSON, method="POST", path="/invocations"):
    """→ status, what was answered and the seconds that it took."""
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    kind = response.headers["Content-Type"]
    answer = json.loads(content) if kind == "application/json" and content.strip() else content
    return response.status, answer, time.perf_counter() - started


def assert_refused(answer, words):
    assert list(answer) == ["error_code", "message"]
    assert words in answer["message"]
    assert "\n" not in answer["message"]
    assert len(answer["message"]) <= server.LINE
    assert "Traceback" not in answer["message"]
    assert "Failed to predict" not in answer["message"]


BAD = bodies.bad(Path("/nowhere"))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body_gets_one_line_within_a_second_and_harms_nobody(name, running, allowed):
    port, service, _ = running
    body, status, words = BAD[name]
    expected = service.answer([bodies.GOOD], Wish(run="simclr"))
    parallel = []
    good = bodies.of(bodies.GOOD, run="simclr")
    other = threading.Thread(target=lambda: parallel.append(ask(port, good)))
    other.start()
    found, answer, seconds = ask(port, body.replace(b"/nowhere", str(allowed.parent).encode()))
    other.join()
    assert (found, answer.get("message")) == (status, answer["message"])
    assert_refused(answer, words)
    assert seconds < SECOND
    assert parallel[0][0] == 200
    assert_same(parallel[0][1]["predictions"], expected, 1e-4)


def assert_same(found, expected, tolerance):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one["run"], one["class"], one["gate"]) == (
            other["run"],
            other["class"],
            other["gate"],
        )
        for part in ("probabilities", "source_probabilities"):
            values = [list(row[part].values()) for row in (one, other)]
            np.testing.assert_allclose(*values, rtol=0, atol=tolerance)
        assert one["distance"] == pytest.approx(other["distance"], abs=tolerance * 100)
