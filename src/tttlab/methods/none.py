"""No test-time training: the control every method is compared with.

With a normalisation policy other than ``source`` it shows what re-normalising alone gives.
"""

from dataclasses import dataclass

from tttlab.adaptation.method import Method


@dataclass(frozen=True)
class NoAdaptation(Method):
    """Predict with the source weights."""

    protocols = ("episodic", "online")
    trains = False
