"""One model and one method over all shifts, every image on its own: the table of predictions with and without."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from tttlab.adapter import Adaptation, InnerLoop, adapt
from tttlab.data import ImageSet
from tttlab.loaders import as_images
from tttlab.method import Method
from tttlab.normalisation import Normalisation
from tttlab.parallel import in_order
from tttlab.resuming import Work
from tttlab.shifts import Shift
from tttlab.source_statistics import Statistics, kinds


def adapt_to_shifts(
    network: nn.Module,
    method: Method,
    loop: InnerLoop,
    images: ImageSet,
    shifts: Sequence[Shift],
    *,
    work: Work,
    prefix: str,
    workers: int = 0,
    on_images: Callable[[int], Any] = lambda _count: None,
    **settings: Any,
) -> tuple[pd.DataFrame, np.ndarray]:
    """Adapt to every image of every shift and keep each finished shift, so that a killed sweep goes on where it was.

    Labels are joined to the predictions afterwards and never reach the computation.

    Args:
        network: the source network.
        method: the test-time method.
        loop: the inner loop.
        images: the clean test images.
        shifts: what is done to them.
        work: where finished shifts are kept.
        prefix: of the names under which they are kept.
        workers: processes that share the shifts; changes no result.
        on_images: called with the number of images done.
        settings: further arguments of `adapt_to_shift`.

    Returns:
        a row per (shift, image), and the mean loss over shifted images before every step and after the last ``(steps + 1,)``.
    """
    results = {shift: work.load(f"{prefix}-{shift.name}") for shift in shifts}
    missing = [shift for shift, found in results.items() if found is None]
    on_images((len(shifts) - len(missing)) * len(images))
    job = partial(adapt_to_shift, network, method, loop, images, **settings)
    for shift, result in zip(missing, in_order(job, missing, workers), strict=True):
        results[shift] = {name: torch.from_numpy(value) for name, value in result.items()}
        work.save(f"{prefix}-{shift.name}", results[shift])
        on_images(len(images))
    adapted = {shift: Adaptation(**result) for shift, result in results.items()}
    table = pd.concat([predictions(result, shift, images) for shift, result in adapted.items()], ignore_index=True)
    curves = torch.cat([result.losses for shift, result in adapted.items() if shift.severity])
    return table, curves.nanmean(0).numpy()


def adapt_to_shift(
    network: nn.Module,
    method: Method,
    loop: InnerLoop,
    images: ImageSet,
    shift: Shift,
    *,
    statistics: Statistics,
    seed: int,
    images_per_step: int | Literal["auto"] = "auto",
    device: str | torch.device = "cpu",
) -> dict[str, np.ndarray]:
    """Adapt to every image of one shift; the parts of an `Adaptation` as arrays, which cross process borders well.

    Args:
        network: the source network.
        method: the test-time method.
        loop: the inner loop.
        images: the clean test images.
        shift: what is done to them.
        statistics: source statistics.
        seed: of all random streams.
        images_per_step: a machine setting.
        device: where to compute.
    """
    pixels = as_images(torch.from_numpy(shift.apply(images, seed))).to(device)
    result = adapt(network, pixels, method, loop, statistics=statistics, image_ids=images.image_ids, seed=seed,
                   images_per_step=images_per_step)  # fmt: skip
    return {name: value.numpy() for name, value in result._asdict().items()}


def complete(
    statistics: Statistics, method: Method, network: nn.Module, batches: Callable[[], Iterable[torch.Tensor]]
) -> Statistics:
    """Add what a method needs and must measure itself.

    Args:
        statistics: the standard source statistics.
        method: the method.
        network: the source network.
        batches: opens the source images ``(N, 3, H, W)``; called only if something is missing.
    """
    missing = set(method.needs) - kinds(statistics)
    return statistics | (method.source_statistics(network, batches()) if missing else {})


def inner_loop(settings: Mapping[str, Any]) -> InnerLoop:
    """Build the inner loop from the adapter's settings as params.yaml has them, flat."""
    policy = Normalisation(settings["normalisation"], settings["prior"], settings["threshold"])
    own = {field.name: settings[field.name] for field in fields(InnerLoop) if field.name != "normalisation"}
    return InnerLoop(**own, normalisation=policy)


def predictions(result: Adaptation, shift: Shift, images: ImageSet) -> pd.DataFrame:
    """Put one shift's results next to the labels (−1: unknown), one row per image."""
    source_confidence, source = confidence(result.source_logits)
    adapted_confidence, adapted = confidence(result.logits)
    columns: dict[str, Any] = {
        "image_id": images.image_ids,
        "shift": shift.name,
        "corruption": shift.corruption,
        "severity": shift.severity,
        "label": np.asarray(images.labels),
        "source_prediction": source,
        "adapted_prediction": adapted,
        "source_confidence": source_confidence,
        "adapted_confidence": adapted_confidence,
        "loss_first": result.losses[:, 0].numpy(),
        "loss_last": result.losses[:, -1].numpy(),
        "fell_back": result.fell_back.numpy(),
        "milliseconds": result.milliseconds.numpy(),
    }
    return pd.DataFrame(columns)


def confidence(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Give the largest class probability and its class for ``logits (N, K)``, each ``(N,)``."""
    best = logits.softmax(-1).max(-1)
    return best.values.numpy(), best.indices.numpy()
