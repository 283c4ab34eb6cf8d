"""Which execution of the pipeline a stage belongs to: all stages of one ``dvc repro`` share one run in MLflow."""

import hashlib
import os

import psutil

from tttlab import tracking
from tttlab.config.params import Params


def execution(params: Params) -> tracking.Execution:
    """Find the DVC process or experiment that drives this stage; without one, settings tell executions apart."""
    settings = hashlib.sha256(params.model_dump_json().encode()).hexdigest()[:8]
    return tracking.find_execution(psutil.Process(), os.environ.get("DVC_EXP_NAME"), settings)
