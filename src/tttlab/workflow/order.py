"""The stages in the order in which DVC runs them, and how far a stage is in the whole pipeline."""

from collections.abc import Mapping

# Stage → share of the time that the default settings take on two cores, percent. It only says how
# much is left; other settings shift it.
SHARES = {
    "methods": 3,
    "prepare": 2,
    "pretrain": 12,
    "finetune": 13,
    "source_stats": 2,
    "tune": 18,
    "distance": 8,
    "adapt": 23,
    "align": 6,
    "evaluate": 3,
    "report": 7,
    "register": 3,
}


# The same of the pipeline for ARC.
ARC_SHARES = {"prepare": 1, "train": 30, "adapt": 62, "evaluate": 2, "align": 2, "report": 3}


def position(stage: str, shares: Mapping[str, int] = SHARES) -> str:
    """Say where a stage stands: ``stage 6 of 12, tune: about 68 % of the default run is left``."""
    number = list(shares).index(stage)
    left = sum(list(shares.values())[number:])
    about = f"about {left} % of the default run is left"
    return f"stage {number + 1} of {len(shares)}, {stage}: {about}"
