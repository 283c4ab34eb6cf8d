"""Environment variables that libraries read while they are imported."""

import os

VARIABLES = {
    # Neither asks another host.
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Looking for plugins of pydantic reads the metadata of every installed package.
    "PYDANTIC_DISABLE_PLUGINS": "1",
    # Threads that spin while they wait slow small operations down a hundredfold when another
    # program shares the processor.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def set_variables() -> None:
    """Set those that are not set: to be called before anything else is imported."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
