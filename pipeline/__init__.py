"""The stages of dvc.yaml, each a script that is read from top to bottom."""

import os
import sys
from pathlib import Path

# A queued DVC experiment runs in a copy of the project and must import the sources of this copy,
# not the installed ones.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Looking for plugins of pydantic reads the metadata of every installed package.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
# Threads that spin while they wait slow small operations down a hundredfold when another program
# shares the processor.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
