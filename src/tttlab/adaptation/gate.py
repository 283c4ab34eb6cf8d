"""A gate: adapt only to images for which a signal, measured without labels, promises a gain.

The rule is one threshold on one signal, which a reader can understand;
`tttlab.experiments.gate_choice` chooses both.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tttlab.adaptation.adapter import Adaptation, adapt
from tttlab.adaptation.method import Method
from tttlab.adaptation.signals import Signal, measure_signal
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import InnerLoop
from tttlab.networks.network import evaluating
from tttlab.networks.source_statistics import Statistics
from tttlab.runtime.group_size import FORWARD_LARGEST, Groups, Wish

# Whether an image looks shifted above the threshold, or below it; in the order of preference.
ABOVE: dict[Signal, bool] = {"distance": True, "loss": True, "confidence": False}


@dataclass(frozen=True)
class Gate:
    """Adapt to an image if its signal lies on the shifted side of a threshold.

    Attributes:
        signal: ``confidence`` of the source network's prediction, ``distance`` to the source, or
            the method's ``loss`` before the first step; see `tttlab.adaptation.signals`.
        threshold: in the signal's unit. The gate opens for a confidence up to the threshold, and
            for a distance or a loss from the threshold on.
    """

    signal: Signal
    threshold: float

    def opens(self, values: Tensor | np.ndarray) -> Any:
        """Tell for which signals ``(N,)`` to adapt; for NaN the gate stays shut."""
        return values >= self.threshold if ABOVE[self.signal] else values <= self.threshold


def adapt_gated(
    network: nn.Module,
    images: Tensor,
    method: Method,
    loop: InnerLoop,
    gate: Gate,
    *,
    statistics: Statistics,
    image_ids: Sequence[str | int] | None = None,
    seed: int = 0,
    images_per_step: Wish | Groups = "auto",
    **settings: Any,
) -> tuple[Adaptation, Tensor]:
    """Adapt to the images for which a gate opens; the others keep the source's prediction.

    Args:
        network: as for `adapt`, like all arguments but the gate.
        images: ``(N, 3, H, W)``.
        method: gives the loss.
        loop: settings of the steps.
        gate: the gate.
        statistics: source statistics.
        image_ids: names of the images.
        seed: of all random streams.
        images_per_step: images in a group; `Groups` keep what they have learnt from one call to the
            next.
        settings: further arguments of `adapt`.

    Returns:
        what `adapt` returns, with losses of NaN where the gate is shut; and where it opens
        ``(N,)``. Measuring the signal counts for every image's time.
    """
    task = Task(network, method, loop, statistics, seed).ready(images.device)
    names = [str(name) for name in (range(len(images)) if image_ids is None else image_ids)]
    groups = images_per_step if isinstance(images_per_step, Groups) else Groups(images_per_step)
    with evaluating(task.network):
        started = time.perf_counter()
        sizes = groups.of(gate.signal, largest=FORWARD_LARGEST, timed=False)
        source_logits, values = measure_signal(gate.signal, task, images, names, sizes)
        opened = gate.opens(values.cpu())
        measuring = (time.perf_counter() - started) * 1e3 / max(len(images), 1)
    source_logits = source_logits.cpu()
    if not opened.any():
        steps = len(settings.get("record", ()))
        return never_opened(source_logits, measuring, steps), opened
    adapted = adapt(
        network,
        images[opened],
        method,
        loop,
        statistics=statistics,
        seed=seed,
        image_ids=list(compress(names, opened.tolist())),
        images_per_step=groups.of("adapt"),
        **settings,
    )
    return spread(adapted, opened, source_logits, measuring), opened


def never_opened(source_logits: Tensor, measuring: float, steps: int) -> Adaptation:
    """Make the results for N images that the gate keeps out.

    Args:
        source_logits: ``(N, K)``.
        measuring: milliseconds per image, for the signal.
        steps: R, how many numbers of steps are recorded.
    """
    count = len(source_logits)
    return Adaptation(
        logits=source_logits,
        source_logits=source_logits,
        losses=torch.full((count, 1), float("nan")),
        fell_back=torch.zeros(count, dtype=torch.bool),
        milliseconds=torch.full((count,), measuring),
        logits_at=source_logits[:, None].expand(-1, steps, -1),
        milliseconds_at=torch.full((count, steps), measuring),
    )


def spread(
    adapted: Adaptation, opened: Tensor, source_logits: Tensor, measuring: float
) -> Adaptation:
    """Spread the results for the adapted images over all N images.

    Args:
        adapted: results for the images that the gate opens for.
        opened: ``(N,)``, which these are.
        source_logits: ``(N, K)``, the predictions for the others.
        measuring: milliseconds per image, for the signal.
    """
    count, steps = len(opened), adapted.logits_at.shape[1]

    def fill(results: Tensor, default: Tensor) -> Tensor:
        mask = opened.view(-1, *[1] * (results.ndim - 1))
        return default.to(results).masked_scatter(mask, results)

    no_losses = torch.full((count, adapted.losses.shape[1]), float("nan"))
    return Adaptation(
        logits=fill(adapted.logits, source_logits),
        source_logits=source_logits,
        losses=fill(adapted.losses, no_losses),
        fell_back=fill(adapted.fell_back, torch.zeros(count)),
        milliseconds=fill(adapted.milliseconds, torch.zeros(count)) + measuring,
        logits_at=fill(adapted.logits_at, source_logits[:, None].expand(-1, steps, -1)),
        milliseconds_at=fill(adapted.milliseconds_at, torch.zeros(count, steps)) + measuring,
    )


def saves_time(
    task: Task,
    gate: Gate,
    images: Tensor,
    image_ids: Sequence[str],
    groups: Groups,
    repeats: int = 3,
) -> bool:
    """Tell whether measuring the signal and adapting behind a gate is faster than adapting to all.

    Both are timed alternately on the same images. The fastest time of each counts, because other
    work of the machine can only slow them down.

    Args:
        task: what the images are adapted by.
        gate: the gate.
        images: ``(N, 3, H, W)``.
        image_ids: names of the images.
        groups: sizes of the groups of images.
        repeats: how often each is timed.
    """
    arguments = task.network, images, task.method, task.loop
    settings = {"statistics": task.statistics, "image_ids": image_ids, "seed": task.seed}

    def gated() -> None:
        adapt_gated(*arguments, gate, images_per_step=groups, **settings)

    def ungated() -> None:
        adapt(*arguments, images_per_step=groups.of("adapt"), **settings)

    seconds = np.array([[_seconds(gated), _seconds(ungated)] for _ in range(repeats)]).min(0)
    return bool(seconds[0] < seconds[1])


def _seconds(call: Callable[[], Any]) -> float:
    """Time a call whose results are on the CPU; a GPU has then finished its work."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
