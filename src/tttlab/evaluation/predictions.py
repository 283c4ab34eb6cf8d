"""The table of predictions of one run on one model: read it and score its rows."""

from pathlib import Path
from typing import TYPE_CHECKING

from tttlab.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "image_id",
    "seed",
    "shift",
    "corruption",
    "severity",
    "label",
    "source_prediction",
    "untrained_prediction",
    "adapted_prediction",
    "source_confidence",
    "adapted_confidence",
    "loss_first",
    "loss_last",
    "distance",
    "gate_open",
    "fell_back",
    "milliseconds",
    "gate_milliseconds",
)
GAINS = {  # name: (side after, side before)
    "gain": ("adapted", "source"),
    "training_gain": ("adapted", "untrained"),
    "gated_gain": ("gated", "source"),
}


def read_predictions(path: Path) -> "pd.DataFrame":
    """Read the predictions of one run on one model: a row per (image, shift, training seed).

    Raises:
        UserError: The file is missing, lacks columns, or has an image twice under a shift and seed.
    """
    import pandas as pd

    if not path.is_file():
        raise UserError(
            f"{path}: expected the predictions of a run that params.yaml lists, "
            "found no file; run `make repro`"
        )
    predictions = pd.read_parquet(path)
    if missing := [column for column in COLUMNS if column not in predictions.columns]:
        raise UserError(
            f"{path}: expected the columns of a predictions table, "
            f"found none named {', '.join(missing)}; run `make repro` again"
        )
    twice = predictions.duplicated(["image_id", "shift", "seed"])
    if twice.any():
        row = predictions[twice].iloc[0]
        raise UserError(
            f"{path}: expected every image once per shift and training seed, "
            f"found {row['image_id']} twice under {row['shift']} with seed {row['seed']}; "
            "remove the file and run `make repro`"
        )
    return predictions


def add_correctness(predictions: "pd.DataFrame") -> "pd.DataFrame":
    """Add correctness, gains and flips to every row.

    They are NaN without a label. Those of the side untrained are NaN for a run that does not train,
    those of the side gated for a run without a gate.
    """
    label, labeled = predictions["label"], predictions["label"] >= 0
    adapted, source = predictions["adapted_prediction"], predictions["source_prediction"]
    table = predictions.assign(gated_prediction=adapted.where(predictions["gate_open"], source))
    known = {
        "source": labeled,
        "adapted": labeled,
        "untrained": labeled & predictions["loss_first"].notna().any(),
        "gated": labeled & has_gate(predictions),
    }
    for side, known_rows in known.items():
        correct = (table[f"{side}_prediction"] == label).astype(float)
        table[f"accuracy_{side}"] = correct.where(known_rows)
    for name, (after, before) in GAINS.items():
        table[name] = table[f"accuracy_{after}"] - table[f"accuracy_{before}"]
    for prefix, name in (("", "gain"), ("gated_", "gated_gain")):
        unknown = table[name].isna()
        table[f"{prefix}wrong_to_right"] = (table[name] > 0).astype(float).mask(unknown)
        table[f"{prefix}right_to_wrong"] = (table[name] < 0).astype(float).mask(unknown)
    adapting = predictions["gate_open"] * predictions["milliseconds"]
    return table.assign(
        changed=source != adapted,
        open=predictions["gate_open"].astype(float),
        gated_milliseconds=predictions["gate_milliseconds"] + adapting,
    )


def has_gate(predictions: "pd.DataFrame") -> bool:
    """Tell whether the run has a gate, which takes time to decide which images to adapt to."""
    return bool((predictions["gate_milliseconds"] > 0).any())
