"""Where a stage reads and writes."""

import os
import shlex
import shutil
import sys
from pathlib import Path

# The real root: mlflow.db and unfinished work must outlive a queued experiment's temporary folder.
ROOT = Path(os.environ.get("DVC_ROOT", Path.cwd())).resolve()
OUTPUTS = Path("outputs")
STAGES = Path("pipeline")  # the stages' scripts


def look_with(command: str) -> str:
    """Say how ``ttt-lab <command>`` is called on these results: from the folder that holds them.

    In the project that is ``make <command>``, which finds uv where it is not on the PATH, too.
    """
    ours = (ROOT / "Makefile").is_file() and (ROOT / "src" / "tttlab").is_dir()
    there = "" if Path.cwd() == ROOT else f"cd {shlex.quote(str(ROOT))} && "
    return f"{there}make {command}" if ours else f"{there}{program()} {command}"


def program() -> str:
    """Say how ``ttt-lab`` is called from any folder: uv may have put it on this PATH alone."""
    beside = shutil.which("ttt-lab", path=Path(sys.executable).parent)
    words = [beside] if beside else [sys.executable, "-m", "tttlab.workflow.cli"]
    return shlex.join(words)
