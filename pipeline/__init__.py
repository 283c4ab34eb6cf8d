"""The stages of dvc.yaml, each a script that is read from top to bottom."""

import sys
from pathlib import Path

# A queued DVC experiment runs in a copy of the project and must import the sources of this copy,
# not the installed ones.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from tttlab.workflow.environment import set_variables

set_variables()
