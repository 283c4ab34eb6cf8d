"""The deployment on Ray Serve: two real replicas on this machine, on loopback, and their end."""

import base64
import io
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image

from tests.helpers import served
from tttlab.serving import adaptive_model
from tttlab.serving.answers import Wish
from tttlab.serving.service import Service

ROOT = Path(__file__).resolve().parents[2]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray and MLflow warn of their own code
    pytest.importorskip("ray.serve", reason="needs Ray Serve: uv sync --extra serve")
    from tttlab.serving.ray_app import adapt_by_wish, build


def test_images_of_a_batch_are_adapted_to_by_wish_and_answered_in_order():
    calls = []

    def adapt(wish: Wish, pixels: list) -> list[dict]:
        calls.append((wish.run, len(pixels)))
        if wish.run == "bad" and any(image == 5 for image in pixels):
            raise ValueError("5")
        return [{"run": wish.run, "image": image} for image in pixels]

    wishes = [Wish(run) for run in ("a", "b", "a", "bad", "b", "bad", "a")]
    rows = adapt_by_wish(adapt, wishes, [0, 1, 2, 3, 4, 5, 6])
    assert isinstance(rows[5], ValueError)
    del rows[5]
    assert [(row["run"], row["image"]) for row in rows] == [
        *(("a", 0), ("b", 1), ("a", 2), ("bad", 3), ("b", 4), ("a", 6))
    ]
    assert calls == [("a", 3), ("b", 2), ("bad", 2), ("bad", 1), ("bad", 1)]


def test_ray_is_told_what_the_arguments_say(tmp_path):
    folder = served.written(tmp_path)
    args = {"folder": str(folder), "num_replicas": "3", "num_gpus": "0.5", "num_cpus": 2}
    args |= {"max_ongoing_requests": 7, "max_queued_requests": 9}
    deployment = build(args)._bound_deployment
    assert (deployment.num_replicas, deployment.max_ongoing_requests) == (3, 7)
    assert deployment.max_queued_requests == 9
    assert deployment.ray_actor_options == {
        "num_cpus": 2,
        "num_gpus": 0.5,
        "runtime_env": {"env_vars": {"MLFLOW_DISABLE_TELEMETRY": "true"}},
    }


def test_the_example_is_right(tmp_path):
    """Loopback only, and no argument that `build` does not know."""
    config = example(served.written(tmp_path), port=8000)
    assert config["http_options"]["host"] == "127.0.0.1"
    (application,) = config["applications"]
    build(application["args"])


def example(folder: Path, port: int) -> dict:
    config = yaml.safe_load((ROOT / "docs" / "serve_ray.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = port
    config["applications"][0]["args"]["folder"] = str(folder)
    return config


@contextmanager
def command(*words: str, log: Path, environment: dict[str, str], stop: signal.Signals):
    """Run a command in a session of its own until the end of the context."""
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name(words[0])), *words[1:]],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=os.environ | environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(stop)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(condition, seconds: float, log: Path):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.5)
    raise AssertionError(log.read_text(encoding="utf-8")[-3000:])


class Server:
    def __init__(self, port: int, metrics: int, head: int) -> None:
        self.url, self.metrics, self.head = f"http://127.0.0.1:{port}", metrics, head

    def is_up(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/ping", timeout=5).status == 200
        except OSError:
            return False

    def ask(self, body: bytes) -> tuple[int, dict | str]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/invocations", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def replicas(self) -> list[int]:
        head = psutil.Process(self.head).children(recursive=True)
        return [one.pid for one in head if one.is_running() and "ServeReplica" in title(one)]

    def counted(self, name: str) -> float:
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics").read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}{{.*}} (\S+)$", text, re.M))


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = tmp_path_factory.mktemp("ray")
    port, metrics, gcs = free_port(), free_port(), free_port()
    config, head_log, log = place / "serve.yaml", place / "head.log", place / "serve.log"
    config.write_text(yaml.safe_dump(example(served.written(place), port)), encoding="utf-8")
    environment = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_worker_niceness": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else replicas start by `uv run`, as this test did
    }
    words = f"start --head --block --port={gcs} --num-cpus=2 --object-store-memory=100000000"
    words += f" --include-dashboard=false --metrics-export-port={metrics}"
    words += f" --ray-client-server-port={free_port()}"
    options = {"environment": environment}
    stop_head = {"log": head_log, "stop": signal.SIGTERM}
    with command("ray", *words.split(), **options, **stop_head) as head:
        started = "Ray runtime started"
        wait_for(lambda: started in head_log.read_text(encoding="utf-8"), 90, head_log)
        words = f"run --address=127.0.0.1:{gcs} {config}"
        with command("serve", *words.split(), **options, log=log, stop=signal.SIGINT):
            one = Server(port, metrics, head.pid)
            wait_for(lambda: one.is_up() and len(one.replicas()) == 2, 180, log)
            yield one
    assert not [one.pid for one in psutil.process_iter() if f"port={gcs}" in title(one)]


WISHES = ({}, {"run": "simclr", "gate": False}, {"run": "shrink"}, {"gate": False, "steps": 1})


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def body(number: int) -> bytes:
    image = base64.b64encode(picture(number)).decode()
    records = {"dataframe_records": [{"image": image}], "params": WISHES[number % len(WISHES)]}
    return json.dumps(records).encode()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Answer about each image alone, without a server."""
    folder = served.written(tmp_path_factory.mktemp("alone"))
    service = Service(adaptive_model.load(folder))

    @cache
    def answer(number: int) -> dict:
        wish = Wish(**WISHES[number % len(WISHES)])
        return service.adapt(*service.checked([picture(number)], wish))[0]

    return answer


def compare(number: int, answer: dict, expected: dict) -> None:
    (row,) = answer["predictions"]
    for key in ("run", "gate", "fell_back"):
        assert row[key] == expected[key], number
    for key in ("source_probabilities", "probabilities"):
        found = torch.tensor([row[key][name] for name in served.CLASSES])
        right = torch.tensor([expected[key][name] for name in served.CLASSES])
        torch.testing.assert_close(found, right, atol=1e-4, rtol=0, msg=str(number))


@pytest.mark.slow
def test_many_clients_get_what_each_image_gets_alone_from_real_batches(server, alone):
    numbers = range(96)
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(server.ask, map(body, numbers)))
    assert {status for status, _ in answers} == {200}
    for number, (_, answer) in zip(numbers, answers, strict=True):
        compare(number, answer, alone(number))
    time.sleep(5)  # Ray tells its counters once a second
    batches = server.counted("ray_serve_batches_processed_total")
    assert 2 <= batches <= 72


@pytest.mark.slow
def test_what_cannot_be_served_is_refused_in_one_line(server):
    image = base64.b64encode(picture(0)).decode()
    for sent, status, line in (
        (b"{no", 400, "expected JSON such as"),
        (json.dumps({"inputs": ["aGVsbG8="]}).encode(), 400, "image 1: expected an image"),
        (json.dumps({"inputs": ["file:/etc/passwd"]}).encode(), 400, "image 1: expected an image"),
        (json.dumps({"inputs": [image], "params": {"run": "tent"}}).encode(), 400, "run: tent, wh"),
        (b'{"inputs": ["' + b"A" * 50_000_000 + b'"]}', 413, "expected a body of at most 16 MB"),
    ):
        started = time.monotonic()
        found, told = server.ask(sent)
        assert found == status
        assert json.loads(told)["message"].startswith(line)
        assert time.monotonic() - started < 10  # a second, where nothing else computes


@pytest.mark.slow
def test_a_replica_that_dies_is_started_again(server, alone):
    victim, other = server.replicas()
    numbers = range(64)

    def ask(number: int) -> tuple[int, dict | str]:
        if number == 32:
            os.kill(victim, signal.SIGKILL)
        return server.ask(body(number))

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, numbers))
    right = [
        (n, answer) for n, (status, answer) in zip(numbers, answers, strict=True) if status == 200
    ]
    assert {status for status, _ in answers} <= {200, 500, 503}
    assert len(right) >= len(numbers) - 8  # only what the replica had in work is lost
    for number, answer in right:
        compare(number, answer, alone(number))

    def again() -> bool:
        return len(now := server.replicas()) == 2 and victim not in now and other in now

    wait_for(again, 120, Path(os.devnull))
    assert server.ask(body(1))[0] == 200
