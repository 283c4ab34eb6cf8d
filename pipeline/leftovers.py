"""What stages leave in .resume, and when it goes."""

from pathlib import Path

import psutil

import pipeline
from tttlab.process_identity import Identity, find_driver
from tttlab.resuming import forget_abandoned, forget_recorded


def store() -> Path:
    """Give the folder of all unfinished work; queued experiments share it with the project."""
    return pipeline.ROOT / ".resume"


def tidy(wanted: Path | None = None) -> Identity | None:
    """Throw away what nobody needs but for the ``wanted`` piece of work, and say so; return the DVC that runs this stage."""
    driver = find_driver(psutil.Process())
    if driver and store().is_dir():
        forget_recorded(store(), driver)
    for line in forget_abandoned(store(), wanted) if wanted else ():
        print(line)
    return driver
