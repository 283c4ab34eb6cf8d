"""Where a stage reads and writes."""

import os
from pathlib import Path

# The real root: mlflow.db and unfinished work must outlive a queued experiment's temporary folder.
ROOT = Path(os.environ.get("DVC_ROOT", Path.cwd())).resolve()
OUTPUTS = Path("outputs")
STAGES = Path("pipeline")  # the stages' scripts


def look_with(command: str) -> str:
    """Say how ``ttt-lab <command>`` is called on these results: from the folder that holds them."""
    there = "" if Path.cwd() == ROOT else f"cd {ROOT} && "
    return f"{there}uv run ttt-lab {command}"
