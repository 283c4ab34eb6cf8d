"""The stages in the order in which DVC runs them, and how far a stage is in the whole pipeline."""

# Stage → share of the time that the default settings take on two cores, percent. It only says how
# much is left; other settings shift it.
SHARES = {
    "methods": 3,
    "prepare": 1,
    "pretrain": 19,
    "finetune": 19,
    "source_stats": 3,
    "tune": 14,
    "distance": 6,
    "adapt": 25,
    "align": 4,
    "evaluate": 2,
    "report": 4,
}


def position(stage: str) -> str:
    """Say where a stage stands: ``stage 6 of 11, tune: about 55 % of the default run is left``."""
    number = list(SHARES).index(stage)
    left = sum(list(SHARES.values())[number:])
    about = f"about {left} % of the default run is left"
    return f"stage {number + 1} of {len(SHARES)}, {stage}: {about}"
