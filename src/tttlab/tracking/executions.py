"""Executions of the pipeline, and the end of runs that a killed process left open."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tttlab.runtime.process_identity import Identity, find_driver
from tttlab.tracking.store import find_runs, open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Record


@dataclass(frozen=True)
class Execution:
    """One execution of the pipeline, shared by all its stages.

    Attributes:
        name: The DVC experiment's name, ``repro``, or ``by hand <settings>``.
        pid: The process that drives the stages; the execution ends with it. None without a driver.
    """

    name: str
    pid: int | None


def find_execution(process: psutil.Process, experiment: str | None, settings: str) -> Execution:
    """Find the execution of the pipeline that a process belongs to.

    Args:
        process: The stage's process; its nearest ancestor that is DVC drives the execution.
        experiment: Name of the DVC experiment, if there is one.
        settings: Distinguishes executions by hand, such as a digest of the settings.
    """
    driver = find_driver(process)
    name = experiment or ("repro" if driver else f"by hand {settings}")
    return Execution(name, driver.pid if driver else None)


def owner_tags(pid: int) -> dict[str, str]:
    """Describe a process by tags from which others can tell whether it still runs."""
    created = Identity.of(psutil.Process(pid)).created
    return {"host": socket.gethostname(), "pid": str(pid), "pid_started": f"{created:.2f}"}


def owner_lives(tags: Mapping[str, str]) -> bool:
    """Tell whether the process that `owner_tags` described still runs."""
    return Identity(int(tags["pid"]), float(tags["pid_started"])).lives()


def close_abandoned(root: Path) -> list[str]:
    """Close the runs that a killed process left open; return their names.

    Only runs of this machine are closed. The run of a stage gets the status KILLED; the run of a
    pipeline gets the worst status of its stages.
    """
    client, experiment = open_store(root)
    here = find_runs(client, experiment, {"host": socket.gethostname()}, status="RUNNING")
    abandoned = [run for run in here if not owner_lives(run.data.tags)]
    # Stages first, because the status of a pipeline's run depends on theirs.
    abandoned.sort(key=lambda run: run.data.tags.get("role") == "pipeline")
    closed = []
    for run in abandoned:
        # The process may have ended its run after the listing. It is gone, so this is final.
        if client.get_run(run.info.run_id).info.status != "RUNNING":
            continue
        is_parent = run.data.tags.get("role") == "pipeline"
        status = _worst_status(client, run) if is_parent else "KILLED"
        client.set_terminated(run.info.run_id, status)
        closed.append(run.info.run_name)
    return closed


def _worst_status(client: "MlflowClient", parent: "Record") -> str:
    below = {"mlflow.parentRunId": parent.info.run_id}
    children = find_runs(client, parent.info.experiment_id, below)
    statuses = {run.info.status for run in children}
    return next((status for status in ("FAILED", "KILLED") if status in statuses), "FINISHED")
