"""The execution of the pipeline: all stages of one ``dvc repro`` share one run in MLflow."""

import hashlib
import os

import psutil

from tttlab.config.params import Params
from tttlab.tracking.executions import Execution, find_execution
from tttlab.tracking.runs import pipeline_run
from tttlab.workflow import places


def execution(params: Params) -> Execution:
    """Find the DVC process or experiment that drives this stage.

    Without one, the settings tell executions apart.
    """
    settings = hashlib.sha256(params.model_dump_json().encode()).hexdigest()[:8]
    return find_execution(psutil.Process(), os.environ.get("DVC_EXP_NAME"), settings)


def parent_run(params: Params) -> str:
    """Find or create the MLflow run of this execution of the pipeline, and return its id."""
    return pipeline_run(places.ROOT, execution(params))
