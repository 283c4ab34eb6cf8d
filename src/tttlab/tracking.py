"""MLflow: one run per execution of a stage, one parent per execution of the pipeline. Nothing else imports mlflow.

Runs live in ``<root>/mlflow.db``, their files in ``<root>/mlruns``. Every call names the run it writes to, so several
processes can write at once and no global state is left behind. Importing this module is cheap; mlflow is imported on
first use.
"""

import hashlib
import json
import logging
import re
import shlex
import signal
import socket
import sqlite3
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock

from tttlab.errors import UserError
from tttlab.runtime.process_identity import Identity, find_driver

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Run as Record

EXPERIMENT = "ttt-lab"
ABOUT = """\
**Does training on the test image itself, without its label, help on shifted data?**

- [All adapt runs side by side](COMPARISON), the largest gain first
- [All executions of the pipeline](EXECUTIONS), with every setting and gain: for ablations, select some and press *Compare*
- [All trials of the tuning](TRIALS), the first of each tuning on top

| stage | what its run shows |
| --- | --- |
| `pipeline` | one execution, with its stages below it; its *Overview* holds the comparison, its artifacts the report |
| `pretrain` | self-supervised loss and kNN accuracy along the epochs |
| `finetune` | accuracy on the labeled validation images along the epochs |
| `tune` | what was chosen on source images under held-out corruptions, with one run per `trial` below it |
| `adapt` | per method and model: `gain/…`, `accuracy/<corruption>`, `accuracy_source/<corruption>`, `gate/…`, `cost/…` |

Charts are grouped by the part of a metric's name before the slash; `accuracy/<corruption>` runs along the severity, which is
the step of these metrics. All accuracies and gains are fractions.
"""
_LABELS = {"pipeline": ["execution"], "adapt": ["run", "model"], "trial": ["run", "model"]}  # tags shown for a stage
_SHOWN = {  # metrics shown for a stage, sorted by the first one: the largest gain, the smallest rank
    "adapt": ["gain/mean", "gain/training", "accuracy_source/mean", "accuracy/mean", "clean/source", "clean/adapted",
              "gate/gain", "gate/open", "cost/milliseconds_p50"],
    "trial": ["rank", "score", "gain", "clean_change", "milliseconds"],
}  # fmt: skip
_SETTINGS = ["steps", "lr", "trainable", "normalisation"]  # settings shown for a trial
_VIEWS = {"comparison": "adapt", "executions": "pipeline", "trials": "trial"}  # name in an address: stage
_MODE = "?workflowType=machine_learning"  # else MLflow shows its pages for language models

_NAME_LIMIT = 250  # characters of the name of a metric or parameter; MLflow refuses longer ones
_PLAIN = re.compile(r"[\w .:@-]*")  # what can stand between quotes in a filter
_TAG_LIMIT = 8_000  # characters; MLflow cuts longer ones, which would break a table in two


# --- the store -----------------------------------------------------------------------------------------------------


def database_uri(root: Path) -> str:
    """Give the absolute address of the store, the same from every working directory, whatever the folder is called."""
    from sqlalchemy import URL  # it knows how the version of it that is installed will read its own addresses

    # With the driver's name: MLflow takes an address without it literally, and makes the folder that has %3F in its name.
    return URL.create("sqlite+pysqlite", database=(root / "mlflow.db").resolve().as_posix()).render_as_string()


def files_uri(root: Path) -> str:
    """Give the absolute address of the runs' files."""
    return (root / "mlruns").resolve().as_uri()


@cache
def _open(root: Path) -> tuple["MlflowClient", str]:
    """Open the store, creating it on first use: a client and the experiment's id.

    MLflow's own creation of the database fails when several processes begin at once, hence the lock.

    Raises:
        UserError: there is a file that this version of MLflow cannot use.
    """
    from mlflow import MlflowClient

    files = files_uri(root)
    with FileLock(root / "mlflow.db.lock"), _quiet():
        try:
            client = MlflowClient(database_uri(root))
        except Exception as error:
            if misfit := _misfit(root):
                raise UserError(f"{root / 'mlflow.db'}: {misfit}") from error
            raise
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            number = client.create_experiment(EXPERIMENT, artifact_location=files)
            pages = _pages(number)
            about = re.sub("[A-Z]{5,}", lambda match: pages.get(match[0].lower(), match[0]), ABOUT)
            client.set_experiment_tag(number, "mlflow.note.content", about)
            client.set_experiment_tag(number, "mlflow.experimentKind", "custom_model_development")
            for name, stage in _VIEWS.items():
                client.set_experiment_tag(number, f"mlflow.sharedViewState.{name}", json.dumps(_view(stage)))
            return client, number
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        if experiment.artifact_location != files:
            _relocate(root, experiment.artifact_location, files)
    return client, experiment.experiment_id


def _misfit(root: Path) -> str | None:
    """Say why this version of MLflow cannot use the database, and what to do; None: that is not what is wrong."""
    from alembic.script import ScriptDirectory
    from mlflow import __version__
    from mlflow.store import db_migrations

    away = "move it away and a new one is made: results do not depend on it, and the runs' files in mlruns stay"
    try:
        with closing(sqlite3.connect(root / "mlflow.db")) as connection:
            ((found,),) = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    except (sqlite3.DatabaseError, ValueError) as error:
        return f"expected a database of MLflow, found none that can be read ({error}); {away}"
    versions = ScriptDirectory(*db_migrations.__path__)
    if found == versions.get_current_head():
        return None
    if found in {version.revision for version in versions.walk_revisions()}:
        upgrade = shlex.join([sys.executable, "-m", "mlflow", "db", "upgrade", database_uri(root)])
        return f"expected tables of MLflow {__version__}, found those of an older version; copy it and run {upgrade}, or {away}"
    return f"expected tables of MLflow {__version__}, found those of a newer version; install that, or {away}"


def _view(stage: str, metrics: Sequence[str] = ()) -> dict[str, Any]:
    """Describe to MLflow's pages a table of all runs of one stage, with its own columns or with others."""
    metrics = list(metrics) or _SHOWN.get(stage, [])
    columns = [f"tags.`{name}`" for name in _LABELS[stage]] + [f"metrics.`{name}`" for name in metrics]
    columns += [f"params.`{name}`" for name in _SETTINGS] if stage == "trial" else []
    order = f"metrics.`{metrics[0]}`" if stage in _SHOWN else "attributes.start_time"
    return {"searchFilter": f'tags.stage = "{stage}"', "orderByKey": order, "orderByAsc": stage == "trial",
            "selectedColumns": columns, "columnOrder": columns}  # fmt: skip


def _relocate(root: Path, old: str, new: str) -> None:
    """Point the store at files that moved together with the project; MLflow keeps absolute paths."""
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        places = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}
        for table, column in places.items():
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (new, len(old) + 1, len(old), old),
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what MLflow says of making the database and of no git, and its uses of other libraries' deprecated ways."""
    least = {"mlflow.store.db.utils": logging.WARNING, "mlflow.utils.git_utils": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in least}
    for name, level in least.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


# --- processes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Execution:
    """One execution of the pipeline, shared by all its stages.

    Attributes:
        name: The DVC experiment's name, ``repro``, or ``by hand <settings>``.
        pid: The process that drives the stages; when it is gone, the execution is over. None when there is no such one.
    """

    name: str
    pid: int | None


def find_execution(process: psutil.Process, experiment: str | None, settings: str) -> Execution:
    """Find out which execution of the pipeline a process belongs to.

    Args:
        process: The stage's process; its nearest ancestor that is DVC drives the execution.
        experiment: Name of the DVC experiment, if there is one.
        settings: What tells executions by hand apart, such as a digest of the settings.
    """
    driver = find_driver(process)
    return Execution(experiment or ("repro" if driver else f"by hand {settings}"), driver.pid if driver else None)


def _owner_tags(pid: int) -> dict[str, str]:
    """Name a process so that another one can tell, later, whether it still runs."""
    created = Identity.of(psutil.Process(pid)).created
    return {"host": socket.gethostname(), "pid": str(pid), "pid_started": f"{created:.2f}"}


def _owner_lives(tags: Mapping[str, str]) -> bool:
    """Tell whether the process that `_owner_tags` named still runs."""
    return Identity(int(tags["pid"]), float(tags["pid_started"])).lives()


def sweep(root: Path) -> list[str]:
    """Close the runs that a killed process left open; return their names.

    Only runs of this machine are judged. A stage's run becomes KILLED; a pipeline's run ends as its worst stage did.
    """
    client, experiment = _open(root)
    here = _find(client, experiment, {"host": socket.gethostname()}, status="RUNNING")
    left = [run for run in here if not _owner_lives(run.data.tags)]
    left.sort(key=lambda run: run.data.tags.get("role") == "pipeline")  # stages first: their parents look at them
    closed = []
    for run in left:
        # Its process is gone, so nothing but this can change the run any more: ended properly just now, or never.
        if client.get_run(run.info.run_id).info.status != "RUNNING":
            continue
        is_parent = run.data.tags.get("role") == "pipeline"
        client.set_terminated(run.info.run_id, _worst_child(client, run) if is_parent else "KILLED")
        closed.append(run.info.run_name)
    return closed


def _worst_child(client: "MlflowClient", parent: "Record") -> str:
    children = _find(client, parent.info.experiment_id, {"mlflow.parentRunId": parent.info.run_id})
    found = {run.info.status for run in children}
    return next((status for status in ("FAILED", "KILLED") if status in found), "FINISHED")


def _find(client: "MlflowClient", experiment: str, tags: Mapping[str, str], status: str | None = None) -> list["Record"]:
    """Find the runs that have all these tags, and a status, the newest first.

    MLflow's filters have no escape for quotes and backslashes, so what may hold one is not written into them but compared here.
    """
    parts = [f"tags.`{name}` = '{value}'" for name, value in tags.items() if _PLAIN.fullmatch(value)]
    query = " and ".join(parts + ([f"attributes.status = '{status}'"] if status else []))
    found = page = client.search_runs([experiment], query)
    while page.token:
        page = client.search_runs([experiment], query, page_token=page.token)
        found += page
    return [run for run in found if tags.items() <= run.data.tags.items()]


# --- runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """An open run; every method writes at once.

    Attributes:
        id: MLflow's id of the run.
        resumed: Whether this goes on with a run that was killed.
    """

    id: str
    resumed: bool
    _client: "MlflowClient"

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log one value per name; None and NaN, which mean unknown, are left out."""
        _log_points(self._client, self.id, [(name, value, step) for name, value in values.items()])

    def log_series(self, name: str, values: Sequence[float], steps: Sequence[int] | None = None) -> None:
        """Log a whole curve; the steps count from 0 unless they are given."""
        steps = range(len(values)) if steps is None else steps
        points = [(name, value, step) for value, step in zip(values, steps, strict=True)]
        _log_points(self._client, self.id, points)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a copy of a file, or of a folder with what is in it."""
        log = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        log(self.id, str(path), folder)

    def log_figure(self, figure: "Figure", name: str) -> None:
        """Keep a figure under a name such as ``figures/loss.png``."""
        self._client.log_figure(self.id, figure, name)

    def log_table(self, table: "pd.DataFrame", name: str) -> None:
        """Keep a table that MLflow can show, under a name such as ``tables/shifts.json``."""
        with _quiet():
            self._client.log_table(self.id, table, name)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; values become text."""
        _log_tags(self._client, self.id, tags)

    def log_input(self, name: str, source: str, digest: str, count: int, context: str) -> None:
        """Record a data set that the run reads.

        Args:
            name: What it is called, such as ``test``.
            source: Where it comes from, such as ``sklearn/digits``.
            digest: What identifies its content; the first 36 characters are kept.
            count: Number of images.
            context: What it is used for: ``training``, ``validation`` or ``test``.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # The entity, and not mlflow.data.from_…: that would read the images, guess a schema and warn about it.
        profile, place = json.dumps({"num_rows": count}), json.dumps({"uri": source})
        data = Dataset(name, digest[:36], source_type="local", source=place, profile=profile)
        self._client.log_inputs(self.id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])


def pipeline_run(root: Path, execution: Execution, description: str = "") -> str:
    """Find the parent run of this execution of the pipeline, or create it; return its id.

    Args:
        root: Folder of ``mlflow.db``.
        execution: From `find_execution`. Without a process that drives it, the run is closed at once: nobody would be
            there to close it later, and a closed run still takes results.
        description: Markdown shown until the comparison takes its place.
    """
    client, experiment = _open(root)
    with FileLock(root / "mlflow.db.lock"):
        owner = _owner_tags(execution.pid) if execution.pid else {}
        own = {"role": "pipeline", "execution": execution.name}
        for run in _find(client, experiment, own | {name: owner[name] for name in ("host", "pid") if owner}):
            if not owner or _owner_lives(run.data.tags):
                return run.info.run_id
        tags = {**own, "stage": "pipeline", **owner}
        tags |= {"mlflow.note.content": description} if description else {}
        name = f"pipeline · {execution.name} · {time.strftime('%d %b %H:%M')}"
        run_id = _create(client, experiment, name, tags)
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

    It ends FINISHED, FAILED after an exception (whose text becomes the tag ``error``), or KILLED after Ctrl-C or a
    polite kill. What a kill -9 left open is closed by the next run that starts.

    Args:
        root: Folder of ``mlflow.db``.
        stage: The stage's name.
        name: What the run is, in words: ``pretrain mae_vit · mae · 40 epochs``.
        params: Settings, nested as they are in params.yaml; logged when the run is created.
        parent: Id of the pipeline's run.
        tags: More tags, such as model, method, protocol, source_run_id.
        resume_key: What identifies a piece of work as long as it is kept (`resuming.Work.id`). A run with this key is
            opened again, and its curves go on; else a new one is created.
    """
    client, experiment = _open(root)
    sweep(root)
    tags = {"stage": stage, **(tags or {}), "mlflow.parentRunId": parent, **_owner_tags(psutil.Process().pid)}
    before = _find(client, experiment, {"resume_key": resume_key}) if resume_key else []
    if before:
        run = Run(before[0].info.run_id, resumed=True, _client=client)
        _log_tags(client, run.id, tags)  # first its new process, then its state: a sweep may look in between
        client.update_run(run.id, status="RUNNING")
    else:
        tags |= {"resume_key": resume_key} if resume_key else {}
        run = Run(_create(client, experiment, name, tags), resumed=False, _client=client)
        _log_params(client, run.id, params)
    with _closing(client, run.id), _interruptible():
        yield run


@contextmanager
def _closing(client: "MlflowClient", run_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _log_tags(client, run_id, {"error": f"{type(error).__name__}: {error}"})
        client.set_terminated(run_id, "FAILED")
        raise
    except BaseException:  # Ctrl-C, SIGTERM
        client.set_terminated(run_id, "KILLED")
        raise
    client.set_terminated(run_id, "FINISHED")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM end the block with an exception, as Ctrl-C does; without this the run would stay open."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # Python takes signals in the main thread only
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- what is logged ------------------------------------------------------------------------------------------------


def log_predictions(run: Run, scored: "pd.DataFrame") -> None:
    """Log what one run did to one network: accuracy per corruption along the severities, gains, clean accuracy, cost.

    Args:
        run: The adapt stage's run.
        scored: From `tttlab.evaluation.predictions.score`; what is unknown there is left out.
    """
    clean, shifted = scored[scored["shift"] == "clean"].mean(numeric_only=True), scored[scored["shift"] != "clean"]
    curves = {"accuracy": "accuracy_adapted", "accuracy_source": "accuracy_source"}
    if shifted["accuracy_source"].isna().all():
        curves = {"changed": "changed"}
    means = shifted.groupby(["corruption", "severity"])[[*curves.values()]].mean()
    points = [
        (f"{name}/{key[0]}", row[column], int(key[1])) for key, row in means.iterrows() for name, column in curves.items()
    ]
    overall, milliseconds = shifted.mean(numeric_only=True), shifted["milliseconds"]
    totals = {"accuracy/mean": overall["accuracy_adapted"], "accuracy_source/mean": overall["accuracy_source"],
              "changed/mean": overall["changed"], "gain/mean": overall["gain"], "gain/training": overall["training_gain"],
              "clean/source": clean["accuracy_source"], "clean/adapted": clean["accuracy_adapted"],
              "gate/gain": overall["gated_gain"], "gate/clean_adapted": clean["accuracy_gated"]}  # fmt: skip
    if overall["gate_milliseconds"] > 0:
        totals |= {"gate/open": overall["open"], "gate/clean_open": clean["open"]}
    totals |= {f"cost/milliseconds_p{p}": milliseconds.quantile(p / 100) for p in (50, 95)}
    totals |= {"fell_back": shifted["fell_back"].sum()}
    points += [(name, value, 0) for name, value in totals.items()]
    # MLflow's tables show every digit there is, so a few are enough; the predictions file is exact.
    _log_points(run._client, run.id, [(name, round(value, 4), step) for name, value, step in points])


def log_trials(
    parent: Run, trials: Sequence[tuple[Mapping[str, Any], Mapping[int, Mapping[str, float]]]], tags: Mapping[str, Any]
) -> None:
    """Log every trial of a tuning as a run below it, which MLflow can then draw side by side.

    Args:
        parent: The tuning's run.
        trials: From best to worst, per trial its settings, and its results by the number of images that gave them.
        tags: Of the trials, such as model, method, run.
    """
    client = parent._client
    experiment = client.get_run(parent.id).info.experiment_id
    for trial in _find(client, experiment, {"mlflow.parentRunId": parent.id}):  # of a tuning that was killed after them
        client.delete_run(trial.info.run_id)
    for rank, (values, results) in enumerate(trials, 1):
        name = f"trial {rank} · {', '.join(f'{key} {value}' for key, value in values.items())}"
        run = _create(client, experiment, name, {"stage": "trial", **tags, "mlflow.parentRunId": parent.id})
        _log_params(client, run, values)
        points = [(key, round(value, 4), step) for step, found in results.items() for key, value in found.items()]
        _log_points(client, run, [("rank", rank, 0), *points])
        client.set_terminated(run)


def compare(
    root: Path,
    parent: str,
    *,
    table: "pd.DataFrame",
    description: str,
    figures: Mapping[str, Path],
    metrics: Mapping[str, float],
    settings: Mapping[str, Any],
    page: Path,
) -> None:
    """Put the comparison on the pipeline's run and close it.

    Args:
        root: Folder of ``mlflow.db``.
        parent: Id of the pipeline's run.
        table: A row per model and run.
        description: The comparison in Markdown, which the run's page shows.
        figures: Picture files by name.
        metrics: Values by name, such as ``gain/<model>/<run>``.
        settings: What made them, nested as in params.yaml, for comparing executions; the first ones logged stay.
        page: The HTML report.
    """
    client, experiment = _open(root)
    run = Run(parent, resumed=True, _client=client)
    run.log_table(table, "comparison.json")
    for path in figures.values():
        run.log_artifact(path, "figures")
    run.log_artifact(page)
    run.log_metrics({name: round(value, 4) for name, value in metrics.items() if value is not None})
    logged = client.get_run(parent).data.params
    _log_params(client, parent, {name: value for name, value in flatten(settings).items() if _legal(name) not in logged})
    run.set_tags({"mlflow.note.content": description})
    gains = [_legal(name) for name in metrics if name.startswith("gain/")]
    client.set_experiment_tag(experiment, "mlflow.sharedViewState.executions", json.dumps(_view("pipeline", gains)))
    client.set_terminated(parent, "FINISHED")


def run_link(root: Path, run_id: str | None) -> str | None:
    """Give the address of a run's page inside MLflow's pages; None when this store has no such run."""
    from mlflow.exceptions import MlflowException

    client, experiment = _open(root)
    try:
        client.get_run(run_id or "")
    except MlflowException:
        return None
    return f"#/experiments/{experiment}/runs/{run_id}{_MODE}"


def _create(client: "MlflowClient", experiment: str, name: str, tags: Mapping[str, Any]) -> str:
    from mlflow.tracking.context.registry import resolve_tags  # who, which script, which commit

    tags = {key: str(value)[:_TAG_LIMIT] for key, value in tags.items()}
    with _quiet():
        tags = resolve_tags(tags)
    return client.create_run(experiment, run_name=name, tags=tags).info.run_id


def _log_points(client: "MlflowClient", run_id: str, points: Sequence[tuple[str, float | None, int]]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    known = [(name, float(value), step) for name, value, step in points if value is not None and value == value]
    metrics = [Metric(_legal(name), value, now, step) for name, value, step in known]
    for start in range(0, len(metrics), 1_000):  # MLflow's limit for one call
        client.log_batch(run_id, metrics=metrics[start : start + 1_000])


def _log_tags(client: "MlflowClient", run_id: str, tags: Mapping[str, Any]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(name, str(value)[:_TAG_LIMIT]) for name, value in tags.items()])


def _log_params(client: "MlflowClient", run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    entries = [Param(_legal(name), str(value)) for name, value in flatten(params).items()]
    for start in range(0, len(entries), 100):  # MLflow's limit for one call
        client.log_batch(run_id, params=entries[start : start + 100])


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested values by their path: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat = {}
    for name, value in nested.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return flat


def _legal(name: str) -> str:
    """Write a name as MLflow takes it for a metric or parameter; where that changes it, a digest keeps it unlike all others."""
    legal = re.sub(r"[^\w\-. :/]", "_", name)
    if legal == name and len(name) <= _NAME_LIMIT:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{legal[: _NAME_LIMIT - len(digest) - 1]} {digest}"


# --- the pages -----------------------------------------------------------------------------------------------------


def ui_command(root: Path, port: int) -> list[str]:
    """Write the command that serves MLflow's pages on this machine only, with one worker."""
    places = ["--backend-store-uri", database_uri(root), "--default-artifact-root", files_uri(root)]
    return [sys.executable, "-m", "mlflow", "ui", *places, "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--uvicorn-opts", "--log-level warning"]  # fmt: skip


def ui_pages(root: Path) -> dict[str, str]:
    """Give the addresses, inside MLflow's pages, of the table of all runs and of the tables of single stages."""
    return _pages(_open(root)[1])


def _pages(experiment: str) -> dict[str, str]:
    runs = f"#/experiments/{experiment}/runs{_MODE}"
    return {"all runs": runs} | {name: f"{runs}&viewStateShareKey={name}" for name in _VIEWS}
