"""What a server did, as metrics of Prometheus and as points of an MLflow run.

Drift shows in them without any label: see docs/serving.md.
"""

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tttlab.tracking.executions import close_abandoned, owner_tags
from tttlab.tracking.records import create_run, log_params
from tttlab.tracking.runs import Run
from tttlab.tracking.store import open_store

DISTANCES = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
CONFIDENCES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_log = logging.getLogger("uvicorn.error")


def was_adapted(row: Mapping[str, Any]) -> bool:
    """Whether an image's answer is that of an adapted network, and not the network's own."""
    return row["probabilities"] != row["source_probabilities"]


class Metrics:
    """Counts as Prometheus reads them.

    Args:
        waiting: gives the number of images that wait.
        shared: the folder through which several processes add up what they count, which must be
            ``PROMETHEUS_MULTIPROC_DIR`` before the library is imported; None: a single process.
    """

    def __init__(self, waiting: Callable[[], int], shared: Path | None = None) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._count_waiting, self._shared = waiting, shared
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, label: str = "run") -> Counter:
            return Counter(f"tttlab_{name}", text, [label], registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"tttlab_{name}", text, ["run"], buckets=buckets, registry=registry)

        self._images = counter("images", "images answered")
        self._adapted = counter("adapted_images", "answers of an adapted network")
        self._changed = counter("changed_classes", "answers of another class than the network's")
        self._fell_back = counter("fell_back_images", "images that adapting failed on")
        self._refused = counter("refused_requests", "requests refused or failed", "reason")
        self._distance = histogram("distance", "distance to the source images", DISTANCES)
        self._confidence = histogram("confidence", "largest probability", CONFIDENCES)
        self._seconds = histogram("request_seconds", "time of a request, with waiting", SECONDS)
        self._batches = histogram("batch_images", "images adapted to together", BATCHES)
        self._waiting = Gauge(
            "tttlab_waiting_images",
            "images that wait or are worked on",
            registry=registry,
            multiprocess_mode="livesum",
        )

    def worked(self, run: str, images: int) -> None:
        """Take note of a batch."""
        self._batches.labels(run).observe(images)
        self._waiting.set(self._count_waiting())

    def answered(self, rows: Sequence[dict[str, Any]], seconds: float) -> None:
        """Take note of an answer."""
        run = rows[0]["run"]
        self._images.labels(run).inc(len(rows))
        self._adapted.labels(run).inc(sum(map(was_adapted, rows)))
        self._changed.labels(run).inc(sum(row["class"] != row["source_class"] for row in rows))
        self._fell_back.labels(run).inc(sum(row["fell_back"] for row in rows))
        self._seconds.labels(run).observe(seconds)
        for row in rows:
            for name, seen in (("distance", self._distance), ("confidence", self._confidence)):
                if row[name] is not None:  # else no bucket is right
                    seen.labels(run).observe(row[name])

    def refused(self, reason: str) -> None:
        """Take note of a request that got no answer."""
        self._refused.labels(reason).inc()

    def text(self) -> str:
        """Write all metrics in Prometheus' text format."""
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

        self._waiting.set(self._count_waiting())
        registry = self._registry
        if self._shared:
            for file in self._shared.glob("gauge_live*.db"):  # of processes that were killed
                pid = int(file.stem.rpartition("_")[2])
                if not _lives(pid):
                    mark_process_dead(pid, str(self._shared))
            registry = CollectorRegistry()
            MultiProcessCollector(registry, str(self._shared))
        return generate_latest(registry).decode()


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Record:
    """An MLflow run with a point of every metric per period, for as long as requests come.

    Args:
        root: folder of ``mlflow.db``.
        model: the model's name.
        params: what the run is to say of the server.
        seconds: a period.
    """

    def __init__(
        self, root: Path, model: str, params: Mapping[str, Any], seconds: float = 60.0
    ) -> None:
        client, experiment = open_store(root)
        close_abandoned(root)
        tags = {"stage": "serve", "model": model} | owner_tags(psutil.Process().pid)
        run = create_run(client, experiment, f"serve {model}", tags)
        log_params(client, run, params)
        self.run, self._period = Run(run, resumed=False, root=root), seconds
        self._lock, self._over, self._started = threading.Lock(), threading.Event(), time.time()
        self._empty()
        self._thread = threading.Thread(target=self._write, name="record", daemon=True)
        self._thread.start()

    def _empty(self) -> None:
        self._rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._batches: dict[str, list[int]] = defaultdict(list)
        self._refused: Counter[str] = Counter()

    def worked(self, run: str, images: int) -> None:
        """Take note of a batch."""
        with self._lock:
            self._batches[run].append(images)

    def answered(self, rows: Sequence[dict[str, Any]], seconds: float) -> None:
        """Take note of an answer."""
        kept = [
            {
                "adapted": was_adapted(row),
                "changed": row["class"] != row["source_class"],
                "fell_back": row["fell_back"],
                "distance": row["distance"],
                "confidence": row["confidence"],
            }
            for row in rows
        ]
        with self._lock:
            self._rows[rows[0]["run"]] += kept
            self._seconds[rows[0]["run"]].append(seconds)

    def refused(self, reason: str) -> None:
        """Take note of a request that got no answer."""
        with self._lock:
            self._refused[reason] += 1

    def flush(self) -> None:
        """Write a point of everything since the last one; the step counts seconds."""
        with self._lock:
            rows, seconds, batches = self._rows, self._seconds, self._batches
            refused, values = self._refused, {}
            self._empty()
        for run, of_run in rows.items():
            values |= {f"{run}/{name}": value for name, value in _summary(of_run).items()}
            values |= _quantiles(f"{run}/seconds", seconds[run])
        values |= {f"{run}/batch_mean": float(np.mean(sizes)) for run, sizes in batches.items()}
        values |= {f"refused/{reason}": count for reason, count in refused.items()}
        if values:
            self.run.log_metrics(values, round(time.time() - self._started))

    def close(self) -> None:
        """Write the last point and end the run."""
        self._over.set()
        self._thread.join()
        try:
            self._try_to_flush()
        finally:
            self.run.end()

    def _write(self) -> None:
        while not self._over.wait(self._period):
            self._try_to_flush()

    def _try_to_flush(self) -> None:
        """Write a point; where that fails, it is lost, and the next one is tried."""
        try:
            self.flush()
        except Exception:
            _log.exception("a point of the MLflow run could not be written")


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Count a run's images, and summarise what was found on them."""
    shares = {
        name: float(np.mean([row[name] for row in rows]))
        for name in ("adapted", "changed", "fell_back")
    }
    return {
        "images": len(rows),
        **shares,
        **_quantiles("distance", [row["distance"] for row in rows]),
        **_quantiles("confidence", [row["confidence"] for row in rows]),
    }


def _quantiles(name: str, values: Sequence[float | None]) -> dict[str, float]:
    """Give deciles and median of the values that are known; nothing where there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return {}
    found = np.quantile(known, (0.1, 0.5, 0.9))
    return {f"{name}_p{q}": float(value) for q, value in zip((10, 50, 90), found, strict=True)}
