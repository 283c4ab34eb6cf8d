"""Tables of a block's results; labels are joined to them here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from tttlab.data.image_sets import ImageSet
from tttlab.experiments.blocks import Block


def predictions(result: Mapping[str, Tensor], block: Block, images: ImageSet) -> pd.DataFrame:
    """Put one block's results next to the labels (−1: unknown), one row per image."""
    columns: dict[str, Any] = {
        **identity(block, images),
        "source_prediction": result["source_prediction"].numpy(),
        "untrained_prediction": result["predictions_at"][:, 0].numpy(),
        **{
            name: result[name].numpy()
            for name in ("adapted_prediction", "source_confidence", "adapted_confidence")
        },
        "loss_first": result["losses"][:, 0].numpy(),
        "loss_last": result["loss_last"].numpy(),
        **{
            name: result[name].numpy()
            for name in ("distance", "gate_open", "fell_back", "milliseconds", "gate_milliseconds")
        },
    }
    return pd.DataFrame(columns)


def steps_rows(
    steps: Sequence[int],
) -> Callable[[Mapping[str, Tensor], Block, ImageSet], pd.DataFrame]:
    """Make a table of one block's results along the recorded steps: one row per (image, step)."""

    def rows(result: Mapping[str, Tensor], block: Block, images: ImageSet) -> pd.DataFrame:
        tables = [
            pd.DataFrame(
                {
                    **identity(block, images),
                    "step": step,
                    "source_prediction": result["source_prediction"].numpy(),
                    "prediction": result["predictions_at"][:, place].numpy(),
                    "loss": result["losses"][:, min(step, result["losses"].shape[1] - 1)].numpy(),
                    "milliseconds": result["milliseconds_at"][:, place].numpy(),
                }
            )
            for place, step in enumerate(steps)
        ]
        return pd.concat(tables, ignore_index=True)

    return rows


def identity(block: Block, images: ImageSet) -> dict[str, Any]:
    """Name the images of a block, the shift, and the labels, which are joined here and were not seen before."""
    own = block.shift.of(images)
    return {
        "image_id": [own.image_ids[index] for index in block.images],
        "shift": block.shift.name,
        "corruption": block.shift.corruption,
        "severity": block.shift.severity,
        "label": np.asarray(own.labels)[block.images],
    }
