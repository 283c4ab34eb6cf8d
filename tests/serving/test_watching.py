"""What a server did, as Prometheus and MLflow tell it."""

import errno
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from tests.serving.test_server import ask, bodies, serving
from tests.serving.test_server import model_folder as model_folder
from tests.serving.test_server import wrapped as wrapped
from tttlab.serving import watching
from tttlab.serving.watching import Metrics, Record
from tttlab.tracking.runs import Run
from tttlab.tracking.store import open_store


def row(run="memo", distance=1.0, adapted=True, changed=False, fell_back=False, confidence=0.7):
    moved = 0.1 if adapted else 0.0
    return {
        "run": run,
        "class": "bee" if changed else "ant",
        "source_class": "ant",
        "probabilities": {"ant": confidence - moved, "bee": 1 - confidence + moved},
        "source_probabilities": {"ant": confidence, "bee": 1 - confidence},
        "confidence": confidence,
        "distance": distance,
        "fell_back": fell_back,
    }


ROWS = [
    row(distance=0.4, adapted=False, confidence=0.95),
    row(distance=7.0, changed=True, confidence=0.35),
    row(distance=100.0, adapted=False, fell_back=True, confidence=0.7),
]
COUNTED = {
    'tttlab_images_total{run="memo"}': 3,
    'tttlab_adapted_images_total{run="memo"}': 1,
    'tttlab_changed_classes_total{run="memo"}': 1,
    'tttlab_fell_back_images_total{run="memo"}': 1,
    'tttlab_distance_bucket{le="0.5",run="memo"}': 1,
    'tttlab_distance_bucket{le="8.0",run="memo"}': 2,
    'tttlab_distance_bucket{le="64.0",run="memo"}': 2,
    'tttlab_distance_bucket{le="+Inf",run="memo"}': 3,
    'tttlab_distance_sum{run="memo"}': 107.4,
    'tttlab_confidence_bucket{le="0.4",run="memo"}': 1,
    'tttlab_request_seconds_count{run="memo"}': 2,
    'tttlab_request_seconds_sum{run="memo"}': 0.75,
    'tttlab_batch_images_sum{run="memo"}': 5,
    'tttlab_refused_requests_total{reason="INVALID_PARAMETER_VALUE"}': 2,
    "tttlab_waiting_images": 4,
}


def count(watcher):
    watcher.answered(ROWS[:2], 0.25)
    watcher.answered(ROWS[2:], 0.5)
    watcher.answered([row(run="shrink")], 1.0)
    watcher.worked("memo", 5)
    watcher.refused("INVALID_PARAMETER_VALUE")
    watcher.refused("INVALID_PARAMETER_VALUE")


def read(text):
    lines = [line for line in text.splitlines() if line and line[0] != "#"]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_what_is_no_number_is_in_no_histogram_and_no_quantile():
    """The image is counted all the same."""
    rows = [row(distance=4.0), row(distance=None) | {"confidence": None}]
    metrics = Metrics(lambda: 0)
    metrics.answered(rows, 0.5)
    found = read(metrics.text())
    assert found['tttlab_images_total{run="memo"}'] == 2
    assert found['tttlab_distance_count{run="memo"}'] == 1
    assert found['tttlab_distance_sum{run="memo"}'] == 4
    assert found['tttlab_confidence_count{run="memo"}'] == 1
    kept = [{"adapted": True, "changed": False, "fell_back": False} | one for one in rows]
    summary = watching._summary(kept)
    assert (summary["images"], summary["distance_p10"], summary["distance_p90"]) == (2, 4.0, 4.0)
    assert summary["confidence_p50"] == pytest.approx(0.7)
    alone = watching._summary(kept[1:])
    assert not [name for name in alone if name.startswith(("distance", "confidence"))]


def test_prometheus_reads_what_was_counted():
    metrics = Metrics(lambda: 4)
    count(metrics)
    found = read(metrics.text())
    for name, value in COUNTED.items():
        assert found[name] == pytest.approx(value), name
    assert found['tttlab_images_total{run="shrink"}'] == 1


PROCESS = """
import os, sys
from pathlib import Path
from tests.serving.test_watching import count, read, COUNTED
from tttlab.serving import watching
from tttlab.serving.watching import Metrics
metrics = Metrics(lambda: 4, Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
count(metrics)
found = read(metrics.text())
print(found['tttlab_images_total{run="memo"}'], found["tttlab_waiting_images"])
"""


@pytest.mark.slow
def test_processes_add_up_and_those_that_ended_wait_for_nothing(tmp_path):
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    words = [sys.executable, "-W", "ignore", "-c", PROCESS]
    found = [
        subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert found == ["3.0 4.0\n", "6.0 4.0\n"]


def points(client, run, name):
    return [point.value for point in client.get_metric_history(run, name)]


def test_an_mlflow_run_has_a_point_per_period(tmp_path):
    record = Record(tmp_path, "m", {"limits": {"images": 64}}, seconds=3600)
    client, _ = open_store(tmp_path)
    record.flush()  # nothing was asked: nothing is written
    count(record)
    record.flush()
    record.answered([row(distance=3.0)], 2.0)
    record.close()
    run = client.get_run(record.run.id)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["stage"], run.data.tags["model"]) == ("serve", "m")
    assert run.data.params == {"limits.images": "64"}
    expected = {
        "memo/images": [3, 1],
        "memo/adapted": [1 / 3, 1],
        "memo/changed": [1 / 3, 0],
        "memo/fell_back": [1 / 3, 0],
        "memo/distance_p50": [7.0, 3.0],
        "memo/distance_p90": [np.quantile([0.4, 7.0, 100.0], 0.9), 3.0],
        "memo/confidence_p10": [np.quantile([0.95, 0.35, 0.7], 0.1), 0.7],
        "memo/seconds_p50": [0.375, 2.0],
        "memo/batch_mean": [5.0],
        "shrink/images": [1],
        "refused/INVALID_PARAMETER_VALUE": [2],
    }
    for name, values in expected.items():
        assert points(client, record.run.id, name) == pytest.approx(values), name


def test_a_server_counts_what_it_answers_and_refuses(wrapped, tmp_path):
    with serving(wrapped, tmp_path, record=True) as (port, _, _, record):
        _, answer, _ = ask(port, bodies.of(bodies.GOOD, bodies.GOOD, run="simclr", gate=False))
        ask(port, b"no JSON")
        ask(port, bodies.of(bodies.GOOD, run="tent"))
        ask(port, b" " * 17_000_000)
        status, text, _ = ask(port, None, {}, "GET", "/metrics")
        found = read(text)
    assert status == 200
    assert found['tttlab_images_total{run="simclr"}'] == 2
    assert found['tttlab_adapted_images_total{run="simclr"}'] == 2
    distance = answer["predictions"][0]["distance"]
    assert found['tttlab_distance_sum{run="simclr"}'] == pytest.approx(2 * distance)
    assert found['tttlab_batch_images_sum{run="simclr"}'] == 2
    for reason, count in (("INVALID_PARAMETER_VALUE", 2), ("REQUEST_TOO_LARGE", 1)):
        assert found[f'tttlab_refused_requests_total{{reason="{reason}"}}'] == count
    client, _ = open_store(tmp_path)  # the server has ended, and with it the run
    run = client.get_run(record.run.id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["simclr/images"] == 2
    assert run.data.metrics["refused/REQUEST_TOO_LARGE"] == 1


def test_a_point_that_cannot_be_written_is_lost_and_the_next_one_is_not(tmp_path, monkeypatch):
    record = Record(tmp_path, "m", {}, seconds=0.01)
    client, _ = open_store(tmp_path)
    write, failed = Run.log_metrics, threading.Event()

    def full(*_arguments):
        failed.set()
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Run, "log_metrics", full)
    record.answered([row()], 1.0)
    assert failed.wait(10)
    monkeypatch.setattr(Run, "log_metrics", write)
    record.answered([row(distance=3.0)], 2.0)
    record.close()
    assert points(client, record.run.id, "memo/images") == [1]
    assert client.get_run(record.run.id).info.status == "FINISHED"
