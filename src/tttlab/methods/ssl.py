"""The model's own pretraining objective at test time: an alias, for a comparison of models with different objectives."""


def method_of(objective: str) -> str:
    """Name the method file that trains on an objective (``simclr`` or ``mae``) at test time."""
    return objective
