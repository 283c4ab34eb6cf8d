"""Compare predictions with and without test-time training: outputs/metrics.json, outputs/tables, outputs/predictions."""

import json
import shutil
from typing import TYPE_CHECKING

import pipeline
from tttlab.params import Params

if TYPE_CHECKING:
    import pandas as pd


def run(params: Params) -> None:
    """Read the predictions of every model and run of params.yaml, never of what the folder happens to hold."""
    import pandas as pd

    from tttlab import metrics

    groups = {"by_shift": metrics.by_shift, "by_corruption": metrics.by_corruption, "by_severity": metrics.by_severity}
    tables = {name: [] for name in ("summary", *groups)}
    summary = {}
    for model in params.models:
        for name in params.adapt.runs:
            found = pipeline.OUTPUTS / "adapted" / name / f"{model}.parquet"
            predictions = metrics.read_predictions(found)
            (pipeline.OUTPUTS / "predictions" / model).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, pipeline.OUTPUTS / "predictions" / model / f"{name}.parquet")
            summary[f"{model}/{name}"] = metrics.summarise(predictions, params.seed)
            for table, group in groups.items():
                tables[table].append(_named(group(predictions, params.seed), model, name))
            shifted = tables["by_shift"][-1].query("shift != 'clean'")
            flips = shifted[["wrong_to_right", "right_to_wrong", "changed"]].sum()
            tables["summary"].append(_named(pd.DataFrame([summary[f"{model}/{name}"] | flips.to_dict()]), model, name))

    folder = pipeline.OUTPUTS / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for name, parts in tables.items():
        pd.concat(parts).to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    text = json.dumps({"runs": summary}, indent=2, allow_nan=False)
    (pipeline.OUTPUTS / "metrics.json").write_text(text + "\n", encoding="utf-8")
    print(f"compared {len(summary)} runs, with and without adaptation; tables are in {folder}")
    if any(entry["accuracy_source"] is None for entry in summary.values()):
        print("the shifted test images have no labels: accuracy and gain are unknown, changed predictions are counted")


def _named(table: "pd.DataFrame", model: str, name: str) -> "pd.DataFrame":
    """Put the model's and the run's names in front."""
    table.insert(0, "model", model)
    table.insert(1, "run", name)
    return table


if __name__ == "__main__":
    pipeline.main(run, __doc__)
