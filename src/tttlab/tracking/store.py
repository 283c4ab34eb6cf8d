"""MLflow's store of this project and the tables that its pages show.

Runs are in ``<root>/mlflow.db``, their files in ``<root>/mlruns``. This room imports mlflow on
first use only, so that importing the room is cheap.
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
from tttlab.tracking.moving import relocate

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Record


EXPERIMENT = "ttt-lab"
ABOUT = """\
**Does training on the test image itself, without its label, help on shifted data?**

- [All adapt runs side by side](COMPARISON), the largest gain first
- [All executions of the pipeline](EXECUTIONS), with every setting and gain: for ablations, \
select some and press *Compare*
- [All trials of the tuning](TRIALS), the first of each tuning on top
- [All runs on ARC's tasks](ARCRUNS), most solved tasks first

| stage | what its run shows |
| --- | --- |
| `pipeline` | one execution, with its stages below it; its *Overview* holds the comparison, \
its artifacts the report |
| `pretrain` | self-supervised loss and kNN accuracy along the epochs |
| `finetune` | accuracy on the labeled validation images along the epochs |
| `tune` | what was chosen on source images under held-out corruptions, \
with one run per `trial` below it |
| `adapt` | per method and model: `gain/…`, `accuracy/<corruption>`, \
`accuracy_source/<corruption>`, `gate/…`, `cost/…` |
| `arc train` | loss and share of exact answers along the epochs |
| `arc adapt` | per run: `tasks/solved`, `tasks/pass1` and `tasks/pass2` along the steps, `cost/…` |

Charts are grouped by the part of a metric's name before the slash; `accuracy/<corruption>` runs \
along the severity, which is
the step of these metrics. All accuracies and gains are fractions.
"""
# Tags shown for a stage.
_LABELS = {
    "pipeline": ["execution"],
    "adapt": ["run", "model"],
    "arc adapt": ["run"],
    "trial": ["run", "model"],
}
# Metrics shown for a stage. The rows are sorted by the first: the largest gain, the smallest rank.
_SHOWN = {
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
    "arc adapt": ["tasks/solved", "tasks/pass1", "tasks/pass1_one_view", "cost/seconds_per_task"],
    "trial": ["rank", "score", "gain", "clean_change", "milliseconds"],
}
_SETTINGS = ["steps", "lr", "trainable", "normalisation"]  # settings shown for a trial
# By name in an address: the stage.
VIEWS = {"comparison": "adapt", "executions": "pipeline", "trials": "trial", "arcruns": "arc adapt"}
MODE = "?workflowType=machine_learning"  # else MLflow shows its pages for language models
_PLAIN = re.compile(r"[\w .:@-]*")  # values that need no escape in a filter


def database_uri(root: Path) -> str:
    """Give the absolute address of the store, for any working directory and name of the folder."""
    from sqlalchemy import URL  # the installed version reads the addresses that it wrote

    # With the driver's name. MLflow takes an address without it literally: for a folder with a
    # question mark it would create one with %3F in its name.
    database = (root / "mlflow.db").resolve().as_posix()
    return URL.create("sqlite+pysqlite", database=database).render_as_string()


def files_uri(root: Path) -> str:
    """Give the absolute address of the runs' files."""
    return (root / "mlruns").resolve().as_uri()


def import_mlflow() -> None:
    """Import what an open store needs of MLflow."""
    import mlflow.store.tracking.sqlalchemy_store
    import mlflow.tracking.client  # noqa: F401


@cache
def open_store(root: Path) -> tuple["MlflowClient", str]:
    """Open the store, or create it on first use.

    The lock is needed because MLflow fails to create the database in several processes at once.

    Returns:
        a client and the experiment's id.

    Raises:
        UserError: this version of MLflow cannot use the existing file.
    """
    files = files_uri(root)
    with FileLock(root / "mlflow.db.lock"), quiet():
        client = open_client(root)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return client, _create_experiment(client, files)
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
    return client, experiment.experiment_id


def open_client(root: Path) -> "MlflowClient":
    """Open a store that exists, or a new one, and correct its paths if the project was moved.

    Raises:
        UserError: this version of MLflow cannot use the existing file, or its paths are wrong and
            it cannot be written.
    """
    from mlflow import MlflowClient

    store = root / "mlflow.db"
    try:
        client = MlflowClient(database_uri(root))
    except Exception as error:
        if reason := _why_unusable(root):
            raise UserError(f"{store}: {reason}") from error
        raise
    try:
        relocate(store, EXPERIMENT, files_uri(root))
    except sqlite3.OperationalError as error:
        raise UserError(
            f"{store}: expected paths in {root}, found those of the folder from which it was moved "
            f"or copied, and no way to correct them ({error}); make it writable"
        ) from error
    return client


def _create_experiment(client: "MlflowClient", files: str) -> str:
    experiment = client.create_experiment(EXPERIMENT, artifact_location=files)
    pages = addresses(experiment)
    about = re.sub("[A-Z]{5,}", lambda match: pages.get(match[0].lower(), match[0]), ABOUT)
    client.set_experiment_tag(experiment, "mlflow.note.content", about)
    client.set_experiment_tag(experiment, "mlflow.experimentKind", "custom_model_development")
    for name, stage in VIEWS.items():
        view = json.dumps(table_view(stage))
        client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{name}", view)
    return experiment


def _why_unusable(root: Path) -> str | None:
    """Say why MLflow cannot use the database, and what to do; None if its version is not why."""
    from alembic.script import ScriptDirectory
    from mlflow import __version__
    from mlflow.store import db_migrations

    move_away = (
        "move it away and a new one is made: results do not depend on it, "
        "and the runs' files in mlruns stay"
    )
    try:
        with closing(sqlite3.connect(root / "mlflow.db")) as connection:
            rows = connection.execute("SELECT version_num FROM alembic_version").fetchall()
            ((revision,),) = rows
    except (sqlite3.DatabaseError, ValueError) as error:
        return f"expected a database of MLflow, found none that can be read ({error}); {move_away}"
    versions = ScriptDirectory(*db_migrations.__path__)
    if revision == versions.get_current_head():
        return None
    expected = f"expected tables of MLflow {__version__}"
    if revision in {version.revision for version in versions.walk_revisions()}:
        upgrade = shlex.join([sys.executable, "-m", "mlflow", "db", "upgrade", database_uri(root)])
        remedy = f"copy it and run {upgrade}, or {move_away}"
        return f"{expected}, found those of an older version; {remedy}"
    return f"{expected}, found those of a newer version; install that, or {move_away}"


def table_view(stage: str, metrics: Sequence[str] = ()) -> dict[str, Any]:
    """Describe a table of all runs of one stage to MLflow's pages.

    Args:
        stage: The stage.
        metrics: Columns; empty for the usual ones of the stage.
    """
    metrics = list(metrics) or _SHOWN.get(stage, [])
    columns = [f"tags.`{name}`" for name in _LABELS[stage]]
    columns += [f"metrics.`{name}`" for name in metrics]
    columns += [f"params.`{name}`" for name in _SETTINGS] if stage == "trial" else []
    order = f"metrics.`{metrics[0]}`" if stage in _SHOWN else "attributes.start_time"
    return {
        "searchFilter": f'tags.stage = "{stage}"',
        "orderByKey": order,
        "orderByAsc": stage == "trial",
        "selectedColumns": columns,
        "columnOrder": columns,
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Silence MLflow's warnings, and its messages where the user has nothing to do."""
    levels = {
        "mlflow.store.db.utils": logging.WARNING,  # the database is created
        "mlflow.utils.git_utils": logging.ERROR,  # there is no git
        "mlflow.pyfunc": logging.WARNING,  # an example is tried
        "mlflow.utils.environment": logging.ERROR,  # uv's environments have no pip
    }
    previous = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in previous.items():
            logging.getLogger(name).setLevel(level)


def find_runs(
    client: "MlflowClient", experiment: str, tags: Mapping[str, str], status: str | None = None
) -> list["Record"]:
    """Find the runs that have all these tags, and a status if it is given, the newest first.

    MLflow's filters cannot escape quotes and backslashes. So they leave out values that may hold
    one, and the tags are compared here again.
    """
    plain = {name: value for name, value in tags.items() if _PLAIN.fullmatch(value)}
    parts = [f"tags.`{name}` = '{value}'" for name, value in plain.items()]
    parts += [f"attributes.status = '{status}'"] if status else []
    query = " and ".join(parts)
    runs = page = client.search_runs([experiment], query)
    while page.token:
        page = client.search_runs([experiment], query, page_token=page.token)
        runs += page
    return [run for run in runs if tags.items() <= run.data.tags.items()]


def addresses(experiment: str) -> dict[str, str]:
    """Give the addresses of MLflow's tables: of all runs and of single stages."""
    runs = f"#/experiments/{experiment}/runs{MODE}"
    return {"all runs": runs} | {name: f"{runs}&viewStateShareKey={name}" for name in VIEWS}
