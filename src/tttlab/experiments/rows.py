"""Tables of a block's results, with the labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from tttlab.data.image_sets import ImageSet
from tttlab.experiments.blocks import Block

if TYPE_CHECKING:
    import pandas as pd


def predictions(result: Mapping[str, Tensor], block: Block, images: ImageSet) -> "pd.DataFrame":
    """Tabulate one block's results and the labels (−1: unknown), one row per image."""
    import pandas as pd

    columns = {
        "source_prediction": result["source_prediction"],
        "untrained_prediction": result["predictions_at"][:, 0],
        "adapted_prediction": result["adapted_prediction"],
        "source_confidence": result["source_confidence"],
        "adapted_confidence": result["adapted_confidence"],
        "loss_first": result["losses"][:, 0],
        "loss_last": result["loss_last"],
        "distance": result["distance"],
        "gate_open": result["gate_open"],
        "fell_back": result["fell_back"],
        "milliseconds": result["milliseconds"],
        "gate_milliseconds": result["gate_milliseconds"],
    }
    values = {name: column.numpy() for name, column in columns.items()}
    return pd.DataFrame(identity(block, images) | values)


def steps_rows(
    steps: Sequence[int],
) -> Callable[[Mapping[str, Tensor], Block, ImageSet], "pd.DataFrame"]:
    """Return a function that tabulates a block along these steps, one row per (image, step)."""

    def rows(result: Mapping[str, Tensor], block: Block, images: ImageSet) -> "pd.DataFrame":
        import pandas as pd

        tables, last = [], result["losses"].shape[1] - 1
        for index, step in enumerate(steps):
            columns = identity(block, images) | {
                "step": step,
                "source_prediction": result["source_prediction"].numpy(),
                "prediction": result["predictions_at"][:, index].numpy(),
                "loss": result["losses"][:, min(step, last)].numpy(),
                "milliseconds": result["milliseconds_at"][:, index].numpy(),
            }
            tables.append(pd.DataFrame(columns))
        return pd.concat(tables, ignore_index=True)

    return rows


def identity(block: Block, images: ImageSet) -> dict[str, Any]:
    """Give the columns that name a block's images and its shift, and the labels.

    The labels are first read here; the computation never sees them.
    """
    shown = block.shift.of(images)
    return {
        "image_id": [shown.image_ids[index] for index in block.images],
        "shift": block.shift.name,
        "corruption": block.shift.corruption,
        "severity": block.shift.severity,
        "label": np.asarray(shown.labels)[block.images],
    }
