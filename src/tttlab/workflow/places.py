"""Where a stage reads and writes."""

import os
from pathlib import Path

# What must outlive a queued experiment's temporary folder (mlflow.db, half-finished work) lies at the real root.
ROOT = Path(os.environ.get("DVC_ROOT", Path.cwd())).resolve()
OUTPUTS = Path("outputs")
STAGES = Path("pipeline")  # the stages' scripts
