"""The server over real HTTP: right answers, wrong bodies, limits, counts and MLflow's run."""

import http.client
import json
import re
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import uvicorn

from tests.helpers import bodies, served
from tests.test_docs import code_blocks
from tools.stage_code import ROOT
from tttlab.serving import loading, replies, requests, server
from tttlab.serving.answers import Wish
from tttlab.serving.pictures import Limits
from tttlab.serving.watching import Metrics, Record

JSON = {"Content-Type": "application/json"}
SECOND = 1.0


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return served.written(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def wrapped(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "m #1 %20ä"  # which means something in an address
    shutil.copytree(model_folder, folder)
    return loading.wrap(folder, tmp_path_factory.mktemp("mlflow") / "model")


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
    with in_thread(server.create(model, {"source": "test"}, counts, kept)) as port:
        yield port, service, counts, kept


@contextmanager
def in_thread(app):
    """Serve an application; → its port."""
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", access_log=False))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    (listener,) = running.servers
    try:
        yield listener.sockets[0].getsockname()[1]
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
    if content.startswith("{"):
        assert response.headers["Content-Type"] == "application/json"
        content = json.loads(content)
    return response.status, content, time.perf_counter() - started


def assert_refused(answer, words):
    assert list(answer) == ["error_code", "message"]
    assert words in answer["message"]
    assert "\n" not in answer["message"]
    assert len(answer["message"]) <= replies.LINE
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


@pytest.mark.parametrize("form", ["instances", "dataframe_records", "inputs"])
def test_every_form_of_a_request_gets_the_same_answer(form, running):
    port, service, _ = running
    expected = service.answer([bodies.GOOD] * 2, Wish(run="simclr", gate=False, steps=1, seed=4))
    rows = [{"image": bodies.encoded(bodies.GOOD)}, {"image": "file:inside.png"}]
    params = {"run": "simclr", "gate": False, "steps": 1, "seed": 4, "return_curve": False}
    columns = {"image": [row["image"] for row in rows]}
    table = {"columns": ["image"], "data": [[row["image"]] for row in rows]}
    asked = [{form: rows}, {"inputs": columns}, {"dataframe_split": table}]
    for one in asked:
        status, answer, _ = ask(port, json.dumps(one | {"params": params}).encode())
        assert status == 200, answer
        assert_same(answer["predictions"], expected, 1e-5)


def test_the_documented_lines_of_python_ask_the_server(running, tmp_path, monkeypatch, capsys):
    port, service, _ = running
    code, *_ = code_blocks("docs/serving.md")
    (tmp_path / "photo.png").write_bytes(bodies.GOOD)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("5001", str(port)), {})
    (row,) = service.answer([bodies.GOOD])
    expected = f"{row['source_class']} → {row['class']} distance {row['distance']:.1f}\n"
    assert capsys.readouterr().out == expected


def test_the_documented_limits_are_those_of_the_code():
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) ", text, flags=re.MULTILINE))
    limits = asdict(Limits())
    del limits["folder"]
    assert {name: int(value.replace(",", "")) for name, value in table.items()} == limits
    assert f"| {server.REQUESTS} requests at once, and {server.HELD} × `megabytes`" in text
    assert f"{requests.VALUES:,} values" in text


def test_lists_of_numbers_are_an_image(running):
    port, service, _ = running
    pixels = np.random.default_rng(0).integers(256, size=(20, 20, 3)).tolist()
    _, answer, _ = ask(port, bodies.of(pixels))
    assert_same(answer["predictions"], service.answer([pixels]), 1e-5)


@pytest.mark.parametrize(
    ("headers", "method", "path", "status", "words"),
    [
        ({"Content-Type": "text/csv"}, "POST", "/invocations", 415, "found 'text/csv'"),
        ({}, "POST", "/invocations", 415, "content type application/json, found none"),
        (JSON | {"Content-Encoding": "gzip"}, "POST", "/invocations", 415, "not compressed"),
        ({"Content-Type": "application/json; charset=x"}, "POST", "/invocations", 415, "found 'x'"),
        (JSON, "PUT", "/invocations", 405, "Method Not Allowed"),
        (JSON, "POST", "/nothing", 404, "expected one of /invocations, /ping, "),
        (JSON, "GET", "/docs", 404, "expected one of /invocations, /ping, "),
        (JSON, "GET", "/openapi.json", 404, "expected one of /invocations, /ping, "),
    ],
)
def test_a_request_of_another_kind_is_refused(headers, method, path, status, words, running):
    found, answer, seconds = ask(running[0], bodies.of(bodies.GOOD), headers, method, path)
    assert found == status
    assert_refused(answer, words)
    assert seconds < SECOND


def test_a_body_without_a_length_is_counted_while_it_comes(running):
    def parts():
        for _ in range(200):
            yield b" " * 100_000

    status, answer, seconds = ask(running[0], parts())  # in chunks
    assert status == 413
    assert_refused(answer, "expected a body of at most 16 MB")
    assert seconds < SECOND


def raw(port, head, body=b""):
    """→ an open connection on which a request was begun."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    lines = ["POST /invocations HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    connection.sendall("\r\n".join([*lines, *head, "", ""]).encode() + body)
    return connection


@pytest.mark.slow
def test_a_client_that_waits_to_be_asked_is_refused_before_it_sends(running):
    with raw(running[0], ["Content-Length: 50000000", "Expect: 100-continue"]) as connection:
        answer = b"".join(iter(lambda: connection.recv(10_000), b""))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"expected a body of at most 16 MB" in answer


@pytest.mark.slow
def test_clients_that_leave_or_wait_harm_nobody(wrapped, tmp_path):
    with serving(wrapped, tmp_path, seconds=1.0) as (port, service, _, _):
        ask(port, bodies.of(bodies.GOOD))
        raw(port, ["Content-Length: 1000"], b'{"inst').close()
        with raw(port, ["Content-Length: 1000"], b'{"inst') as waiting:
            status, answer, _ = ask(port, bodies.of(bodies.GOOD))
            assert status == 200
            assert_same(answer["predictions"], service.answer([bodies.GOOD]), 1e-5)
            reply = b"".join(iter(lambda: waiting.recv(10_000), b""))
        assert reply.startswith(b"HTTP/1.1 408")
        assert b"the body did not arrive within 1 s" in reply


def test_too_much_at_once_is_told_with_its_status(wrapped, tmp_path, monkeypatch):
    with serving(wrapped, tmp_path, waiting=1, seconds=30.0) as (port, service, counts, _):
        ask(port, bodies.of(bodies.GOOD))
        may, real = threading.Event(), service._batcher._work
        service._batcher._work = lambda *given: may.wait(20) and real(*given)
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(ask, port, bodies.of(bodies.GOOD))
            while not service.waiting:
                time.sleep(0.01)
            status, answer, seconds = ask(port, bodies.of(bodies.GOOD))
            assert (status, answer["error_code"]) == (429, "RESOURCE_EXHAUSTED")
            assert_refused(answer, "1 images wait already; try again later")
            assert seconds < SECOND
            monkeypatch.setattr(server, "REQUESTS", 1)
            assert ask(port, bodies.of(bodies.GOOD))[1]["message"].startswith("1 requests wait")
            monkeypatch.setattr(server, "HELD", 0)
            monkeypatch.setattr(server, "REQUESTS", 9)
            assert ask(port, bodies.of(bodies.GOOD))[1]["message"].startswith("too many bytes")
            may.set()
            assert first.result(30)[0] == 200
        assert 'refused_requests_total{reason="RESOURCE_EXHAUSTED"} 3.0' in counts.text()


def test_an_answer_that_takes_too_long_is_given_up(wrapped, tmp_path):
    with serving(wrapped, tmp_path, seconds=0.3) as (port, service, _, _):
        may, real = threading.Event(), service._batcher._work
        service._batcher._work = lambda *given: may.wait(20) and real(*given)
        status, answer, seconds = ask(port, bodies.of(bodies.GOOD))
        may.set()
        assert (status, answer["error_code"]) == (504, "DEADLINE_EXCEEDED")
        assert_refused(answer, "no answer within 0.3 s; send fewer images")
        assert seconds < 0.3 + SECOND


def test_a_fault_of_the_server_is_one_line_and_its_log_says_why(wrapped, tmp_path, caplog):
    with serving(wrapped, tmp_path) as (port, service, counts, _):
        real = service._batcher._work
        service._batcher._work = lambda kind, items: [][1]
        status, answer, _ = ask(port, bodies.of(bodies.GOOD))
        assert (status, answer["error_code"]) == (500, "INTERNAL_ERROR")
        assert_refused(answer, "the server failed; its log says why")
        assert "IndexError" in caplog.text
        service._batcher._work, limits = real, service.limits
        service.limits = None
        status, answer, _ = ask(port, bodies.of(bodies.GOOD))
        service.limits = limits
        assert (status, answer["error_code"]) == (500, "INTERNAL_ERROR")
        assert_refused(answer, "the server failed; its log says why")
        assert ask(port, bodies.of(bodies.GOOD))[0] == 200
        assert 'refused_requests_total{reason="INTERNAL_ERROR"} 2.0' in counts.text()


def test_as_many_requests_as_arrive_are_adapted_to_together(wrapped, tmp_path):
    """More than asyncio has threads for by default."""
    with serving(wrapped, tmp_path) as (port, service, counts, _):
        ask(port, bodies.of(bodies.GOOD, run="none"))
        may, real, sizes = threading.Event(), service._batcher._work, []

        def work(kind, items):
            assert may.wait(30)
            sizes.append(len(items))
            return real(kind, items)

        service._batcher._work = work
        with ThreadPoolExecutor(61) as threads:
            asked = [
                threads.submit(ask, port, bodies.of(bodies.GOOD, run="none")) for _ in range(61)
            ]
            deadline = time.monotonic() + 30
            while service.waiting < 61 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert service.waiting == 61
            may.set()
            assert {future.result(60)[0] for future in asked} == {200}
        assert len(sizes) == 2
        assert sum(sizes) == 61
        assert 'tttlab_batch_images_count{run="none"} 3.0' in counts.text()


def test_the_model_says_what_it_is(running):
    _, told, _ = ask(running[0], None, {}, "GET", "/model")
    assert (told["name"], told["classes"], told["best"]) == ("m", served.CLASSES, "memo")
    assert told["source"] == "test"
    assert set(told["runs"]) == set(served.LOOPS)
    assert told["runs"]["memo"] == {
        "method": "memo",
        "steps": 2,
        "gate": {"signal": "distance", "threshold": 1.5},
    }
    assert told["limits"]["images"] == 64
    assert told["limits"]["folder"] is True  # its name is nobody's business


def test_pings_are_answered(running):
    for path in ("/ping", "/health", "/version"):
        assert ask(running[0], None, {}, "GET", path)[0] == 200
