"""One model and one method over all shifts, every image on its own: the table of predictions with and without."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from tttlab.adapter import Adaptation, InnerLoop, adapt
from tttlab.data import ImageSet
from tttlab.loaders import as_images
from tttlab.method import Method
from tttlab.normalisation import Normalisation
from tttlab.resuming import Work
from tttlab.shifts import Shift
from tttlab.source_statistics import Statistics


def adapt_to_shifts(
    network: nn.Module,
    method: Method,
    loop: InnerLoop,
    images: ImageSet,
    shifts: Sequence[Shift],
    *,
    statistics: Statistics,
    seed: int,
    work: Work,
    prefix: str,
    images_per_step: int | str = "auto",
    device: str | torch.device = "cpu",
    on_images: Callable[[int], None] | None = None,
) -> tuple[pd.DataFrame, np.ndarray]:
    """Adapt to every image of every shift and keep each finished shift, so that a killed sweep goes on where it was.

    Labels are joined to the predictions afterwards and never reach the computation.

    Args:
        network: the source network.
        method: the test-time method.
        loop: the inner loop.
        images: the clean test images.
        shifts: what is done to them.
        statistics: source statistics.
        seed: of all random streams.
        work: where finished shifts are kept.
        prefix: of the names under which they are kept.
        images_per_step: a machine setting.
        device: where to compute.
        on_images: called with the number of images done.

    Returns:
        a row per (shift, image), and the mean loss over shifted images before every step and after the last ``(steps + 1,)``.
    """
    rows, curves = [], []
    for shift in shifts:
        name = f"{prefix}-{shift.name}"
        if (kept := work.load(name)) is None:
            pixels = as_images(torch.from_numpy(shift.apply(images, seed))).to(device)
            result = adapt(network, pixels, method, loop, statistics=statistics, image_ids=images.image_ids, seed=seed,
                           images_per_step=images_per_step, on_images=on_images)  # fmt: skip
            kept = result._asdict()
            work.save(name, kept)
        elif on_images:
            on_images(len(images))
        result = Adaptation(**kept)
        rows.append(predictions(result, shift, images))
        if shift.severity:
            curves.append(result.losses)
    return pd.concat(rows, ignore_index=True), torch.cat(curves).nanmean(0).numpy()


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
