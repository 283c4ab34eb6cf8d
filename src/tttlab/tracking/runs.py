"""One MLflow run for each execution of a stage, below one run for each execution of the pipeline.

Every call names the run it writes to, so that several processes can write at once and no global
state remains.
"""

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock

from tttlab.tracking.executions import Execution, close_abandoned, owner_lives, owner_tags
from tttlab.tracking.recorder import by_recorder
from tttlab.tracking.records import create_run, log_params, log_points, log_tags
from tttlab.tracking.store import MODE, find_runs, open_store, quiet

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Run:
    """An open run; every method writes at once.

    Attributes:
        id: MLflow's id of the run.
        resumed: Whether this continues a run that was killed.
        root: Folder of ``mlflow.db``.
    """

    id: str
    resumed: bool
    root: Path

    @property
    def client(self) -> "MlflowClient":
        """MLflow's client, in the process that asks."""
        return open_store(self.root)[0]

    @by_recorder
    def log_points(self, points: Sequence[tuple[str, float | None, int]]) -> None:
        """Log (name, value, step) points; None and NaN, which mean unknown, are left out."""
        log_points(self.client, self.id, points)

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log one value per name; None and NaN, which mean unknown, are left out."""
        self.log_points([(name, value, step) for name, value in values.items()])

    def log_series(
        self, name: str, values: Sequence[float], steps: Sequence[int] | None = None
    ) -> None:
        """Log a whole curve; the steps count from 0 unless they are given."""
        steps = range(len(values)) if steps is None else steps
        self.log_points([(name, value, step) for value, step in zip(values, steps, strict=True)])

    @by_recorder
    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a copy of a file or of a folder with its contents."""
        client = self.client
        log = client.log_artifacts if Path(path).is_dir() else client.log_artifact
        log(self.id, str(path), folder)

    @by_recorder
    def log_table(self, table: "pd.DataFrame", name: str) -> None:
        """Keep a table that MLflow can show, under a name such as ``tables/shifts.json``."""
        with quiet():
            self.client.log_table(self.id, table, name)

    @by_recorder
    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; values become text."""
        log_tags(self.client, self.id, tags)

    @by_recorder
    def log_input(self, name: str, source: str, digest: str, count: int, context: str) -> None:
        """Record a data set that the run reads.

        Args:
            name: Such as ``test``.
            source: Its origin, such as ``sklearn/digits``.
            digest: Identifies its content; the first 36 characters are kept.
            count: Number of images.
            context: Its use: ``training``, ``validation`` or ``test``.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # mlflow.data.from_… would read the images, guess a schema and warn about it.
        data = Dataset(
            name,
            digest[:36],
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps({"num_rows": count}),
        )
        tags = [InputTag("mlflow.data.context", context)]
        self.client.log_inputs(self.id, [DatasetInput(data, tags)])

    @by_recorder
    def end(self, status: str = "FINISHED") -> None:
        """Close the run."""
        self.client.set_terminated(self.id, status)


@by_recorder
def pipeline_run(root: Path, execution: Execution) -> str:
    """Find the parent run of this execution of the pipeline, or create it; return its id.

    Args:
        root: Folder of ``mlflow.db``.
        execution: From `find_execution`. If no process drives it, nothing could close the run
            later. So it is closed at once; a closed run still takes results.
    """
    client, experiment = open_store(root)
    with FileLock(root / "mlflow.db.lock"):
        owner = owner_tags(execution.pid) if execution.pid else {}
        identity = {"role": "pipeline", "execution": execution.name}
        process = {name: owner[name] for name in ("host", "pid") if owner}
        for run in find_runs(client, experiment, identity | process):
            if not owner or owner_lives(run.data.tags):
                return run.info.run_id
        tags = {**identity, "stage": "pipeline", **owner}
        name = f"pipeline · {execution.name} · {time.strftime('%d %b %H:%M')}"
        run_id = create_run(client, experiment, name, tags)
        if execution.pid is None:
            client.set_terminated(run_id)
        return run_id


@contextmanager
def start_run(
    root: Path,
    *,
    stage: str,
    name: str,
    params: Mapping[str, Any],
    parent: str,
    tags: Mapping[str, Any] | None = None,
    resume_key: str | None = None,
) -> Iterator[Run]:
    """Open a run for the time of a ``with`` block.

    It ends FINISHED, FAILED after an exception (whose text becomes the tag ``error``), or KILLED
    after Ctrl-C or SIGTERM. After SIGKILL, the next run that starts closes it.

    Args:
        root: Folder of ``mlflow.db``.
        stage: The stage's name.
        name: The run in words: ``pretrain mae_vit · mae · 40 epochs``.
        params: Settings, nested as in params.yaml; logged when the run is created.
        parent: Id of the pipeline's run.
        tags: More tags, such as model, method, protocol, source_run_id.
        resume_key: Identifies unfinished work as long as it is kept (`resuming.Work.id`). A run
            with this key is opened again and its curves continue; else a new one is created.
    """
    tags = {"stage": stage, **(tags or {}), "mlflow.parentRunId": parent}
    tags |= owner_tags(psutil.Process().pid)
    run = _open_run(root, name, params, tags, resume_key)
    with _closing(run), _interruptible():
        yield run


@by_recorder
def _open_run(
    root: Path,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, Any],
    resume_key: str | None,
) -> Run:
    """Create a run, or open the unfinished one again; see `start_run`."""
    client, experiment = open_store(root)
    close_abandoned(root)
    earlier = find_runs(client, experiment, {"resume_key": resume_key}) if resume_key else []
    if earlier:
        run = Run(earlier[0].info.run_id, resumed=True, root=root)
        # The tags come first: another process closes a RUNNING run whose tags name a dead process.
        log_tags(client, run.id, tags)
        client.update_run(run.id, status="RUNNING")
    else:
        tags = {**tags, "resume_key": resume_key} if resume_key else tags
        run = Run(create_run(client, experiment, name, tags), resumed=False, root=root)
        log_params(client, run.id, params)
    return run


@contextmanager
def _closing(run: Run) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        run.set_tags({"error": f"{type(error).__name__}: {error}"})
        run.end("FAILED")
        raise
    except BaseException:  # Ctrl-C, SIGTERM
        run.end("KILLED")
        raise
    run.end()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM raise an exception in the block, as Ctrl-C does, so that the run is closed."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    # Python handles signals in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run_link(root: Path, run_id: str | None) -> str | None:
    """Give the address of a run's page within MLflow's; None if this store has no such run."""
    from mlflow.exceptions import MlflowException

    client, experiment = open_store(root)
    try:
        client.get_run(run_id or "")
    except MlflowException:
        return None
    return f"#/experiments/{experiment}/runs/{run_id}{MODE}"
