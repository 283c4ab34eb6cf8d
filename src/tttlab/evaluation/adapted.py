"""The files that the stage ``adapt`` writes for one run on one model, all seeds together."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tttlab.errors import UserError
from tttlab.evaluation.predictions import read_predictions


def read_adapted(folder: Path, seeds: Sequence[int]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read the predictions of a run, and its record.

    Args:
        folder: of the run and model.
        seeds: training seeds.

    Returns:
        a row per (image, shift, training seed); and the first seed's ``mlflow_run_id``,
        ``settings``, ``tuning`` and ``peak_memory_mb``, with ``losses`` (means over seeds, before
        every step) and ``milliseconds_p50`` of all seeds.

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
            f"{path}: expected what `adapt` tells of its predictions, found nothing that can be "
            "read; run `make repro`"
        ) from error
