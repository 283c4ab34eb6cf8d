"""What `adapt` left of one run on one model, all training seeds together."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tttlab.errors import UserError
from tttlab.evaluation.predictions import read_predictions


def read_adapted(folder: Path, seeds: Sequence[int]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read the predictions, and what is told of them.

    Args:
        folder: of the run and model.
        seeds: of training, the first one's settings and run in MLflow are told.

    Returns:
        a row per (image, shift, training seed); and ``mlflow_run_id``, ``losses`` (mean over seeds,
        before every step), ``settings``, ``tuning``, ``peak_memory_mb``, ``milliseconds_p50``.

    Raises:
        UserError: a file is missing or cannot be used.
    """
    parts = [read_predictions(folder / f"{seed}.parquet") for seed in seeds]
    predictions = pd.concat(parts, ignore_index=True)
    entries = [_read_json(folder / f"{seed}.json") for seed in seeds]
    losses = pd.DataFrame([entry["losses"] for entry in entries]).mean().tolist()
    milliseconds = float(predictions["milliseconds"].median())
    return predictions, entries[0] | {"losses": losses, "milliseconds_p50": milliseconds}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: expected what `adapt` tells of its predictions, found nothing that can be read; run `adapt`"
        ) from error
