"""MLflow's store of this project: runs in ``<root>/mlflow.db``, their files in ``<root>/mlruns``, and what its pages show.

Importing this room is cheap; mlflow is imported on first use, and nowhere else.
"""

import json
import logging
import re
import shlex
import sqlite3
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from tttlab.errors import UserError

if TYPE_CHECKING:
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
_LABELS = {
    "pipeline": ["execution"],
    "adapt": ["run", "model"],
    "trial": ["run", "model"],
}  # tags shown for a stage
_SHOWN = {  # metrics shown for a stage, sorted by the first one: the largest gain, the smallest rank
    "adapt": [
        "gain/mean",
        "gain/training",
        "accuracy_source/mean",
        "accuracy/mean",
        "clean/source",
        "clean/adapted",
        "gate/gain",
        "gate/open",
        "cost/milliseconds_p50",
    ],
    "trial": ["rank", "score", "gain", "clean_change", "milliseconds"],
}
_SETTINGS = ["steps", "lr", "trainable", "normalisation"]  # settings shown for a trial
VIEWS = {
    "comparison": "adapt",
    "executions": "pipeline",
    "trials": "trial",
}  # name in an address: stage
MODE = "?workflowType=machine_learning"  # else MLflow shows its pages for language models
_PLAIN = re.compile(r"[\w .:@-]*")  # what can stand between quotes in a filter


def database_uri(root: Path) -> str:
    """Give the absolute address of the store, the same from every working directory, whatever the folder is called."""
    from sqlalchemy import (
        URL,
    )  # it knows how the version of it that is installed will read its own addresses

    # With the driver's name: MLflow takes an address without it literally, and makes the folder that has %3F in its name.
    return URL.create(
        "sqlite+pysqlite", database=(root / "mlflow.db").resolve().as_posix()
    ).render_as_string()


def files_uri(root: Path) -> str:
    """Give the absolute address of the runs' files."""
    return (root / "mlruns").resolve().as_uri()


@cache
def open_store(root: Path) -> tuple["MlflowClient", str]:
    """Open the store, creating it on first use: a client and the experiment's id.

    MLflow's own creation of the database fails when several processes begin at once, hence the lock.

    Raises:
        UserError: there is a file that this version of MLflow cannot use.
    """
    from mlflow import MlflowClient

    files = files_uri(root)
    with FileLock(root / "mlflow.db.lock"), quiet():
        try:
            client = MlflowClient(database_uri(root))
        except Exception as error:
            if misfit := _misfit(root):
                raise UserError(f"{root / 'mlflow.db'}: {misfit}") from error
            raise
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            number = client.create_experiment(EXPERIMENT, artifact_location=files)
            pages = addresses(number)
            about = re.sub("[A-Z]{5,}", lambda match: pages.get(match[0].lower(), match[0]), ABOUT)
            client.set_experiment_tag(number, "mlflow.note.content", about)
            client.set_experiment_tag(number, "mlflow.experimentKind", "custom_model_development")
            for name, stage in VIEWS.items():
                client.set_experiment_tag(
                    number, f"mlflow.sharedViewState.{name}", json.dumps(table_view(stage))
                )
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


def table_view(stage: str, metrics: Sequence[str] = ()) -> dict[str, Any]:
    """Describe to MLflow's pages a table of all runs of one stage, with its own columns or with others."""
    metrics = list(metrics) or _SHOWN.get(stage, [])
    columns = [f"tags.`{name}`" for name in _LABELS[stage]] + [
        f"metrics.`{name}`" for name in metrics
    ]
    columns += [f"params.`{name}`" for name in _SETTINGS] if stage == "trial" else []
    order = f"metrics.`{metrics[0]}`" if stage in _SHOWN else "attributes.start_time"
    return {
        "searchFilter": f'tags.stage = "{stage}"',
        "orderByKey": order,
        "orderByAsc": stage == "trial",
        "selectedColumns": columns,
        "columnOrder": columns,
    }


def _relocate(root: Path, old: str, new: str) -> None:
    """Point the store at files that moved together with the project; MLflow keeps absolute paths."""
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        places = {
            "experiments": "artifact_location",
            "runs": "artifact_uri",
            "logged_models": "artifact_location",
        }
        for table, column in places.items():
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (new, len(old) + 1, len(old), old),
            )


@contextmanager
def quiet() -> Iterator[None]:
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


def find_runs(
    client: "MlflowClient", experiment: str, tags: Mapping[str, str], status: str | None = None
) -> list["Record"]:
    """Find the runs that have all these tags, and a status, the newest first.

    MLflow's filters have no escape for quotes and backslashes, so what may hold one is not written into them but compared here.
    """
    parts = [
        f"tags.`{name}` = '{value}'" for name, value in tags.items() if _PLAIN.fullmatch(value)
    ]
    query = " and ".join(parts + ([f"attributes.status = '{status}'"] if status else []))
    found = page = client.search_runs([experiment], query)
    while page.token:
        page = client.search_runs([experiment], query, page_token=page.token)
        found += page
    return [run for run in found if tags.items() <= run.data.tags.items()]


def addresses(experiment: str) -> dict[str, str]:
    """Give the addresses, inside MLflow's pages, of the table of all runs and of the tables of single stages."""
    runs = f"#/experiments/{experiment}/runs{MODE}"
    return {"all runs": runs} | {name: f"{runs}&viewStateShareKey={name}" for name in VIEWS}
