"""Compare predictions with and without test-time training: metrics, tables, predictions."""

import json
import shutil
from typing import TYPE_CHECKING

from tttlab.config.params import Params
from tttlab.workflow import command, places

if TYPE_CHECKING:
    import pandas as pd


def run(params: Params) -> None:
    """Write outputs/metrics.json, tables, predictions, runs, only for the runs of params.yaml."""
    import pandas as pd

    from tttlab.evaluation import controls, diagnosis, metrics, networks
    from tttlab.evaluation.adapted import read_adapted
    from tttlab.evaluation.results import name_shifts, read_table
    from tttlab.workflow.leftovers import tidy

    tidy()  # DVC has recorded the last `adapt`
    kinds = {
        "by_shift": metrics.by_shift,
        "by_corruption": metrics.by_corruption,
        "by_severity": metrics.by_severity,
        "reliability": metrics.reliability,
    }
    entries, tables = {}, {name: [] for name in ("summary", *kinds, *diagnosis.TABLES)}
    about, kept = {name: {} for name in params.adapt.runs}, places.OUTPUTS / "predictions"
    for model, name in params.pairs:
        folder = places.OUTPUTS / "adapted" / name / model
        predictions, about[name][model] = read_adapted(folder, params.seeds)
        (kept / model).mkdir(parents=True, exist_ok=True)
        predictions.to_parquet(kept / model / f"{name}.parquet")
        entries[f"{model}/{name}"] = metrics.summarise(predictions)
        for table, kind in kinds.items():
            tables[table].append(_named(kind(predictions), model, name))
        steps = folder / f"{params.seeds[0]}.steps.parquet"
        aligned = places.OUTPUTS / "aligned" / name / f"{model}.parquet"
        for table, rows in diagnosis.make_tables(predictions, steps, aligned, params.seed).items():
            tables[table].append(_named(rows, model, name))
    controls.add(entries, about, params.pairs, kept)
    for model, name in params.pairs:
        row = pd.DataFrame([metrics.flatten(entries[f"{model}/{name}"])])
        tables["summary"].append(_named(row, model, name))
    tables["distances"] = [
        read_table(places.OUTPUTS / "distances" / model / f"{seed}.csv")
        for model in params.models
        for seed in params.seeds
    ]
    tables["networks"] = [pd.DataFrame(networks.rows(about, params.pairs, kept))]
    folder = places.OUTPUTS / "tables"
    shutil.rmtree(folder, ignore_errors=True)  # outdated tables must not stay
    folder.mkdir(parents=True)
    for name, parts in tables.items():
        if any(len(part) for part in parts):
            pd.concat(parts).to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    (places.OUTPUTS / "runs").mkdir(exist_ok=True)
    for name, models in about.items():
        file = places.OUTPUTS / "runs" / f"{name}.json"
        file.write_text(json.dumps(models, indent=2) + "\n", encoding="utf-8")
    text = json.dumps({"runs": entries}, indent=2, allow_nan=False)
    (places.OUTPUTS / "metrics.json").write_text(text + "\n", encoding="utf-8")
    print(f"compared {len(entries)} runs, with and without adaptation; tables are in {folder}")
    if any(entry["accuracy_source"] is None for entry in entries.values()):
        print("the shifted test images have no labels: changed predictions are counted, not gains")
    elif unlabeled := name_shifts(pd.concat(tables["by_shift"]), labeled=False):
        print(f"no labels, so that only changed predictions are counted: {', '.join(unlabeled)}")


def _named(table: "pd.DataFrame", model: str, name: str) -> "pd.DataFrame":
    table.insert(0, "model", model)
    table.insert(1, "run", name)
    return table


if __name__ == "__main__":
    command.main(run, __doc__)
