"""Where a stage reads and writes."""

import os
import shlex
from pathlib import Path

# The real root: mlflow.db and unfinished work must outlive a queued experiment's temporary folder.
ROOT = Path(os.environ.get("DVC_ROOT", Path.cwd())).resolve()
OUTPUTS = Path("outputs")
STAGES = Path("pipeline")  # the stages' scripts


def look_with(command: str) -> str:
    """Say how ``ttt-lab <command>`` is called on these results: from the folder that holds them.

    In the project that is ``make <command>``, which finds uv where it is not on the PATH, too.
    """
    elsewhere = f"cd {shlex.quote(str(ROOT))} && uv run ttt-lab {command}"
    return f"make {command}" if Path.cwd() == ROOT else elsewhere
