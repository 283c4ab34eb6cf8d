"""The table of predictions of one run on one model: reading it, and what a label makes of each row."""

from pathlib import Path

import pandas as pd

from tttlab.errors import UserError

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
GAINS = {  # what is compared with what
    "gain": ("adapted", "source"),
    "training_gain": ("adapted", "untrained"),
    "gated_gain": ("gated", "source"),
}


def read_predictions(path: Path) -> pd.DataFrame:
    """Read the predictions of one run on one model: a row per (image, shift, training seed).

    Raises:
        UserError: The file is missing, lacks columns, or holds an image twice under one shift and seed.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: expected the predictions of a run that params.yaml lists, found no file; run `adapt`"
        )
    predictions = pd.read_parquet(path)
    if missing := [column for column in COLUMNS if column not in predictions.columns]:
        raise UserError(
            f"{path}: expected the columns of a predictions table, found none named {', '.join(missing)}; run `adapt` again"
        )
    twice = predictions.duplicated(["image_id", "shift", "seed"])
    if twice.any():
        row = predictions[twice].iloc[0]
        raise UserError(
            f"{path}: expected every image once per shift and training seed, found {row['image_id']} twice under "
            f"{row['shift']} with seed {row['seed']}; remove the file and run `adapt`"
        )
    return predictions


def score(predictions: pd.DataFrame) -> pd.DataFrame:
    """Add correctness, gains and flips per row; NaN without a label, for a run that does not train, and without a gate."""
    label, known = predictions["label"], predictions["label"] >= 0
    adapted, source = predictions["adapted_prediction"], predictions["source_prediction"]
    table = predictions.assign(gated_prediction=adapted.where(predictions["gate_open"], source))
    told = {
        "source": known,
        "adapted": known,
        "untrained": known & predictions["loss_first"].notna().any(),
    }
    told["gated"] = known & has_gate(predictions)
    for side, where in told.items():
        table[f"accuracy_{side}"] = (
            (table[f"{side}_prediction"] == label).astype(float).where(where)
        )
    for name, (after, before) in GAINS.items():
        table[name] = table[f"accuracy_{after}"] - table[f"accuracy_{before}"]
    for prefix, name in (("", "gain"), ("gated_", "gated_gain")):
        unknown = table[name].isna()
        table[f"{prefix}wrong_to_right"] = (table[name] > 0).astype(float).mask(unknown)
        table[f"{prefix}right_to_wrong"] = (table[name] < 0).astype(float).mask(unknown)
    gate_time = (
        predictions["gate_milliseconds"] + predictions["gate_open"] * predictions["milliseconds"]
    )
    return table.assign(
        changed=source != adapted,
        open=predictions["gate_open"].astype(float),
        gated_milliseconds=gate_time,
    )


def has_gate(predictions: pd.DataFrame) -> bool:
    """Tell whether the run judges, before adapting, which images to adapt to: measuring that takes time."""
    return bool((predictions["gate_milliseconds"] > 0).any())
