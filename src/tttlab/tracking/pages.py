"""The command that serves MLflow's pages, and their addresses."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from tttlab.tracking.store import addresses, database_uri, files_uri, open_store


def ui_command(root: Path, port: int) -> list[str]:
    """Write the command that serves MLflow's pages on this machine only, with one worker."""
    places = ["--backend-store-uri", database_uri(root), "--default-artifact-root", files_uri(root)]
    return [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        *places,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--uvicorn-opts",
        "--log-level warning",
    ]


def ui_pages(root: Path) -> dict[str, str]:
    """Give the addresses, inside MLflow's pages, of the table of all runs and of the tables of single stages."""
    return addresses(open_store(root)[1])
