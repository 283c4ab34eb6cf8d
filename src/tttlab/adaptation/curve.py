"""Predictions after some of the steps, the time they take, and which of them can be used."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tttlab.runtime.devices import wait_for

EXPLOSION = 10.0  # a loss that grew by this factor (and by this much) has diverged, not improved


class Curve:
    """A group's predictions after recorded numbers of steps, and the time that each takes.

    The clock stands still while a prediction is made only for the record.

    Attributes:
        steps: numbers of steps to record.
        device: where the work is done.
        logits: step → ``(B, K)``, as far as recorded.
        milliseconds: step → time of the whole group for so many steps and one prediction.
    """

    def __init__(self, steps: Sequence[int], device: torch.device) -> None:
        self.steps, self.device = steps, device
        self.logits: dict[int, Tensor] = {}
        self.milliseconds: dict[int, float] = {}
        self._recording: dict[int, float] = {}
        wait_for(device)
        self._started = time.perf_counter()

    def spent(self) -> float:
        """Return the milliseconds since the start, without those for the record."""
        wait_for(self.device)
        elapsed = (time.perf_counter() - self._started) * 1e3
        return elapsed - sum(self._recording.values())

    def note(self, step: int, predict: Callable[[], Tensor]) -> None:
        """Predict ``(B, K)`` after a step, if it is to be recorded and is not yet."""
        if step in self.steps and step not in self.logits:
            before = self.spent()
            self.logits[step] = predict()
            self.milliseconds[step] = self.spent()
            self._recording[step] = self.milliseconds[step] - before

    def after_all(self, step: int, predict: Callable[[], Tensor]) -> Tensor:
        """Predict ``(B, K)`` after the last step, on the clock; a recorded prediction serves."""
        if step not in self.logits:
            return predict()
        self._recording.pop(step)
        return self.logits[step]

    def collect(self, final: Tensor, source: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``(B, R, K)`` and milliseconds ``(B, R)`` per image.

        Where adaptation failed by the recorded step, the logits are the source's.

        Args:
            final: ``(B, K)``, for steps that were not taken because no image had a gradient.
            source: ``(B, K)``.
            losses: ``(B, S + 1)``.
        """
        logits = source.new_empty(len(source), len(self.steps), *source.shape[1:])
        milliseconds = torch.empty(len(source), len(self.steps))
        for column, step in enumerate(self.steps):
            predicted = self.logits.get(step, final)
            usable = finite(predicted)
            if step and losses.shape[1] > 1:
                usable = usable & ~diverged(losses[:, : step + 1])
            logits[:, column] = where(usable, predicted, source)
            milliseconds[:, column] = self.milliseconds.get(step, self.spent()) / len(source)
        return logits.cpu(), milliseconds


def finite(logits: Tensor) -> Tensor:
    """Find the images ``(B,)`` whose predictions ``(B, …)`` are finite."""
    return logits.isfinite().flatten(1).all(1)


def where(usable: Tensor, logits: Tensor, source_logits: Tensor) -> Tensor:
    """Take predictions ``(B, …)`` of usable images ``(B,)``, and the source's of the others."""
    return torch.where(usable.view(-1, *[1] * (logits.ndim - 1)), logits, source_logits)


def diverged(losses: Tensor) -> Tensor:
    """Find images ``(B,)`` whose losses ``(B, S + 1)`` are not finite or have exploded."""
    growth = losses[:, -1] - losses[:, 0]
    return ~losses.isfinite().all(1) | (growth > EXPLOSION * losses[:, 0].abs().clamp_min(1))
