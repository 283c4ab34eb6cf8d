"""The command that serves MLflow's pages, and their addresses."""

import sys
from pathlib import Path

from tttlab.tracking.store import addresses, database_uri, files_uri, open_store


def ui_command(root: Path, port: int) -> list[str]:
    """Write the command that serves MLflow's pages on this machine only, with one worker."""
    options = {
        "--backend-store-uri": database_uri(root),
        "--default-artifact-root": files_uri(root),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        "--uvicorn-opts": "--log-level warning",
    }
    arguments = [word for option in options.items() for word in option]
    return [sys.executable, "-m", "mlflow", "ui", *arguments]


def ui_pages(root: Path) -> dict[str, str]:
    """Give the addresses of MLflow's tables: of all runs and of single stages."""
    return addresses(open_store(root)[1])
