"""The stages of arc/dvc.yaml; see the pipeline beside this folder."""

import sys
from pathlib import Path

# As in the other pipeline: a copy of the project imports its own sources.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from tttlab.workflow.environment import set_variables

set_variables()
