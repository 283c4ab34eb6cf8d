"""Unfinished work of the stages in .resume: how it is found again and when it is deleted."""

from pathlib import Path

import psutil

import tttlab
from tttlab.runtime.process_identity import Identity, find_driver
from tttlab.runtime.resuming import Work, forget_abandoned, forget_recorded
from tttlab.workflow import places

CODE = (Path(tttlab.__file__).parent, places.STAGES)  # after any edit in it, work starts anew


def store() -> Path:
    """Give the folder of all unfinished work; queued experiments share it with the project."""
    return places.ROOT / ".resume"


def tidy(wanted: Path | None = None) -> Identity | None:
    """Delete recorded work and, if a piece of work is ``wanted``, abandoned work except this piece.

    Returns:
        the DVC process that runs this stage.
    """
    driver = find_driver(psutil.Process())
    if driver and store().is_dir():
        forget_recorded(store(), driver)
    for line in forget_abandoned(store(), wanted) if wanted else ():
        print(line)
    return driver


def find_work(key: str, stage: str, owner: bool = True) -> Work:
    """Find a piece of work by its key; the owner deletes old work first."""
    folder = store() / key
    return Work(folder, stage, owner, tidy(folder) if owner else None)
