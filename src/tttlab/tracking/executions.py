"""One parent run for each execution of the pipeline, and an end for the runs that a killed process left open."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tttlab.runtime.process_identity import Identity, find_driver

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Record
from tttlab.tracking.store import find_runs, open_store


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
    return Execution(
        experiment or ("repro" if driver else f"by hand {settings}"), driver.pid if driver else None
    )


def owner_tags(pid: int) -> dict[str, str]:
    """Name a process so that another one can tell, later, whether it still runs."""
    created = Identity.of(psutil.Process(pid)).created
    return {"host": socket.gethostname(), "pid": str(pid), "pid_started": f"{created:.2f}"}


def owner_lives(tags: Mapping[str, str]) -> bool:
    """Tell whether the process that `owner_tags` named still runs."""
    return Identity(int(tags["pid"]), float(tags["pid_started"])).lives()


def close_left_open(root: Path) -> list[str]:
    """Close the runs that a killed process left open; return their names.

    Only runs of this machine are judged. A stage's run becomes KILLED; a pipeline's run ends as its worst stage did.
    """
    client, experiment = open_store(root)
    here = find_runs(client, experiment, {"host": socket.gethostname()}, status="RUNNING")
    left = [run for run in here if not owner_lives(run.data.tags)]
    left.sort(
        key=lambda run: run.data.tags.get("role") == "pipeline"
    )  # stages first: their parents look at them
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
    children = find_runs(
        client, parent.info.experiment_id, {"mlflow.parentRunId": parent.info.run_id}
    )
    found = {run.info.status for run in children}
    return next((status for status in ("FAILED", "KILLED") if status in found), "FINISHED")
