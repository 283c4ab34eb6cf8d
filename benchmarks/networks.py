"""The networks of an execution beside one of them, without adapting any.

``python -m benchmarks.networks --reference attention`` reads the predictions of the last execution
(``outputs/predictions``), prints a row per network, and writes ``outputs/networks.csv``: accuracy
on clean and on shifted images, and by how much it differs from the reference's, with the interval
that the report gives to every gain (docs/statistics.md). Two networks of one seed have nothing in
common but the images and their order: the interval takes both trainings as chance.
"""

import argparse
from pathlib import Path

import pandas as pd

from tttlab.config.params import read_params
from tttlab.errors import UserError
from tttlab.evaluation.intervals import gain_interval
from tttlab.evaluation.predictions import read_predictions
from tttlab.evaluation.results import CONTROL
from tttlab.workflow import places

PARTS = ("clean", "shifted")


def main() -> None:
    """Compare all networks of the last execution."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    parser.add_argument("--reference", help="the network to compare with; default: the first")
    arguments = parser.parse_args()
    models = list(read_params(Path("params.yaml")).models)
    reference = arguments.reference or models[0]
    if reference not in models:
        raise UserError(f"--reference: expected one of {', '.join(models)}, found {reference}")
    folder = places.OUTPUTS / "predictions"
    tables = {name: read_predictions(folder / name / f"{CONTROL}.parquet") for name in models}
    rows = pd.DataFrame([compare(name, tables[name], tables[reference]) for name in models])
    rows.to_csv(places.OUTPUTS / "networks.csv", index=False)
    print(rows.to_string(index=False, float_format="%.1f"))


def compare(name: str, of_network: pd.DataFrame, of_reference: pd.DataFrame) -> dict:
    """Compare one network with the reference, on the same images, shifts and seeds.

    Returns:
        by part, ``clean`` and ``shifted``: accuracy in per cent; ``<part>_gain`` over the reference
        in points, with the ends ``_low`` and ``_high`` of its 95 % interval.

    Raises:
        UserError: the two tables are not of the same images, shifts and seeds.
    """
    keys = ["image_id", "shift", "seed", "label"]
    paired = of_network.merge(of_reference, on=keys, suffixes=("", "_reference"))
    if not len(paired) == len(of_network) == len(of_reference):
        raise UserError(
            f"{name}: expected the same images, shifts and seeds as of the reference, "
            f"found {len(paired)} of {len(of_network)}; run `make repro`"
        )
    row: dict = {"model": name}
    for part in PARTS:
        chosen = paired[(paired["shift"] == "clean") == (part == "clean")]
        chosen = chosen[chosen["label"] >= 0]
        own, other = (
            (chosen[f"source_prediction{of}"] == chosen["label"]).to_numpy(float)
            for of in ("", "_reference")
        )
        images, seeds = chosen["image_id"].to_numpy(), chosen["seed"].to_numpy()
        one_group = chosen["label"].to_numpy() * 0
        ((low, high),) = gain_interval(own - other, images, seeds, one_group, num_groups=1)
        if (chosen["source_prediction"] == chosen["source_prediction_reference"]).all():
            low = high = 0.0  # as in a report: nothing is left to chance
        row[part] = 100 * own.mean()
        values = {"gain": (own - other).mean(), "low": low, "high": high}
        row |= {f"{part}_{key}": 100 * value for key, value in values.items()}
    return row


if __name__ == "__main__":
    main()
