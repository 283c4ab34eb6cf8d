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
from tttlab.errors import UserError, one_line
from tttlab.evaluation import networks
from tttlab.evaluation.predictions import read_predictions
from tttlab.evaluation.results import CONTROL
from tttlab.workflow import places


@one_line()
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
    row: dict = {"model": name}
    for part in ("clean", "shifted"):
        tables = (
            networks.as_it_is(table[(table["shift"] == "clean") == (part == "clean")])
            for table in (of_network, of_reference)
        )
        found = networks.difference(*tables)
        row[part] = 100 * found["accuracy_other"]
        for key, end in (("gain", ""), ("low", "_low"), ("high", "_high")):
            row[f"{part}_{key}"] = 100 * found[f"lead{end}"]
    return row


if __name__ == "__main__":
    main()
