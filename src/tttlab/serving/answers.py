"""What a model says of single images, without and with adaptation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tttlab.adaptation.adapter import Adaptation, adapt
from tttlab.adaptation.gate import adapt_gated
from tttlab.adaptation.signals import measure_signal
from tttlab.errors import UserError
from tttlab.networks.network import evaluating
from tttlab.runtime.group_size import FORWARD_LARGEST, Groups
from tttlab.serving.adaptive_model import AdaptiveModel, ServedRun


@dataclass(frozen=True)
class Wish:
    """How images are to be adapted; a run's own values where nothing else is wished for.

    Attributes:
        run: the run's name; None: the one that tuning recommends.
        gate: False: adapt to every image, whatever the run's gate says.
        steps: number of steps; None: the run's.
        seed: of the random views; None: the run's.
        return_curve: whether the answer tells what every step changes.
    """

    run: str | None = None
    gate: bool = True
    steps: int | None = None
    seed: int | None = None
    return_curve: bool = False

    def applied(self, model: AdaptiveModel, most_steps: int | None = None) -> tuple[str, ServedRun]:
        """Give the name of the run that is wished for, and the run with what is wished.

        Args:
            model: the model.
            most_steps: the largest number of steps that is allowed; None: any.

        Raises:
            UserError: there is no such run, or it cannot do that.
        """
        name, run = model.find(self.run)
        task, gate = run.task, run.gate if self.gate else None
        if self.steps is not None:
            limit = "" if most_steps is None else f" to {most_steps}"
            if self.steps < 0 or (most_steps is not None and self.steps > most_steps):
                raise UserError(f"steps: expected an integer from 0{limit}, found {self.steps}")
            if self.steps and not run.takes_steps:
                raise UserError(
                    f"steps: run {name} trains nothing, so that it takes none; leave steps away"
                )
            task = replace(task, loop=replace(task.loop, steps=self.steps))
        if self.seed is not None:
            task = replace(task, seed=self.seed)
        return name, ServedRun(task, gate)


def answer(
    run: ServedRun,
    images: Tensor,
    names: Sequence[str],
    classes: Sequence[str],
    return_curve: bool = False,
    groups: Groups | None = None,
) -> list[dict[str, Any]]:
    """Classify images without and with adaptation, each on its own.

    Args:
        run: what they are adapted by.
        images: ``(N, 3, H, W)``, RGB in [0, 1], on the network's device.
        names: of the images, which key their random views.
        classes: names of the K classes.
        return_curve: whether to tell the prediction after every step.
        groups: keep which number of images is fastest from one call to the next; None: the call
            finds out for itself.

    Returns:
        for each image the class, its confidence and the probabilities of all classes, without
        (``source_class``, ``source_confidence``, ``source_probabilities``) and with adaptation
        (``class``, …); the ``distance`` to the source in units of natural variation; whether the
        ``gate`` opened (None: there is none), and whether the result ``fell_back`` to the
        source's; ``loss_before`` the first step and ``loss_after`` the last (None: no step was
        taken); the ``milliseconds`` spent on it; where wished for, the ``curve``: ``step``,
        ``loss`` and ``probabilities`` for every number of steps from 0 on. A number that is not
        finite is None, for JSON knows no other.
    """
    task, groups = run.task, groups or Groups()
    options = {
        "statistics": task.statistics,
        "image_ids": names,
        "seed": task.seed,
        "record": range(task.loop.steps + 1) if return_curve else (),
    }
    arguments = task.network, images, task.method, task.loop
    if run.gate is None:
        result = adapt(*arguments, images_per_step=groups.of("adapt"), **options)
        opened = [None] * len(names)
    else:
        result, mask = adapt_gated(*arguments, run.gate, images_per_step=groups, **options)
        opened = mask.tolist()
    with evaluating(task.network):
        sizes = groups.of("distance", largest=FORWARD_LARGEST, timed=False)
        _, distances = measure_signal("distance", task, images, names, sizes)
    rows = _rows(result, classes)
    for row, gate, distance in zip(rows, opened, distances.tolist(), strict=True):
        row |= {"gate": gate, "distance": _known(distance)}
    if return_curve:
        for row, curve in zip(rows, _curves(result, classes), strict=True):
            row["curve"] = curve
    return rows


def _rows(result: Adaptation, classes: Sequence[str]) -> list[dict[str, Any]]:
    sides = {"source_": result.source_logits, "": result.logits}
    told = [
        {
            "fell_back": bool(result.fell_back[index]),
            "loss_before": _known(float(losses[0])),
            "loss_after": _known(float(losses[-1])),
            "milliseconds": float(result.milliseconds[index]),
        }
        for index, losses in enumerate(result.losses)
    ]
    rows: list[dict[str, Any]] = [{} for _ in told]
    for prefix, logits in sides.items():
        for row, probabilities in zip(rows, logits.softmax(-1).tolist(), strict=True):
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            row |= {
                f"{prefix}class": classes[best],
                f"{prefix}confidence": _known(probabilities[best]),
                f"{prefix}probabilities": _by_class(classes, probabilities),
            }
    return [row | more for row, more in zip(rows, told, strict=True)]


def _curves(result: Adaptation, classes: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Give for every image a row per number of steps."""
    probabilities = result.logits_at.softmax(-1).tolist()
    steps = range(result.logits_at.shape[1])
    return [
        [
            {
                "step": step,
                "loss": _known(float(losses[step])) if step < len(losses) else None,
                "probabilities": _by_class(classes, of_image[step]),
            }
            for step in steps
        ]
        for of_image, losses in zip(probabilities, result.losses, strict=True)
    ]


def _by_class(classes: Sequence[str], probabilities: Sequence[float]) -> dict[str, float | None]:
    return dict(zip(classes, map(_known, probabilities), strict=True))


def _known(value: float) -> float | None:
    """Give a number; None for NaN and infinities, which JSON does not know."""
    return value if math.isfinite(value) else None
