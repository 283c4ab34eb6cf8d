"""The networks of an execution beside one of them, as they are or adapted by a run.

``python -m benchmarks.networks --reference attention`` reads the predictions of the last execution
(``outputs/predictions``), prints a row per network, and writes ``outputs/networks.csv``: accuracy
on clean and on shifted images, and by how much it differs from the reference's, with the interval
that the report gives to every gain (docs/statistics.md). Two networks of one seed have nothing in
common but the images and their order: the interval takes both trainings as chance.

``--runs none step`` gives a row per network and run, ``--reference-run views`` lets the reference
be adapted, too.
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
from tttlab.workflow.pieces import Pair, list_pairs


@one_line()
def main() -> None:
    """Compare all networks of the last execution."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    parser.add_argument("--reference", help="the network to compare with; default: the first")
    parser.add_argument("--runs", nargs="+", default=[CONTROL], help="of the networks")
    parser.add_argument("--reference-run", default=CONTROL, help="of the network to compare with")
    arguments = parser.parse_args()
    params = read_params(Path("params.yaml"))
    pairs = list_pairs(params, arguments.runs)
    beside = Pair(arguments.reference_run, arguments.reference or next(iter(params.models)))
    params.run_settings(*beside)  # tells what does not exist
    if beside not in list_pairs(params):
        raise UserError(f"{beside}: expected a run of this model, found one of other models only")
    reference = read(beside)
    rows = pd.DataFrame([pair._asdict() | compare(read(pair), reference) for pair in pairs])
    rows.to_csv(places.OUTPUTS / "networks.csv", index=False)
    print(rows.to_string(index=False, float_format="%.1f"))


def read(pair: Pair) -> pd.DataFrame:
    """Read what a run of the last execution predicted."""
    return read_predictions(places.OUTPUTS / "predictions" / pair.model / f"{pair.run}.parquet")


def compare(of_network: pd.DataFrame, of_reference: pd.DataFrame) -> dict[str, float]:
    """Compare the adapted predictions of one network with the reference's.

    Returns:
        by part, ``clean`` and ``shifted``: accuracy in per cent; ``<part>_gain`` over the reference
        in points, with the ends ``_low`` and ``_high`` of its 95 % interval.

    Raises:
        UserError: the two tables are not of the same images, shifts and seeds.
    """
    row = {}
    for part in ("clean", "shifted"):
        tables = (
            table[(table["shift"] == "clean") == (part == "clean")]
            for table in (of_network, of_reference)
        )
        found = networks.difference(*tables)
        row[part] = 100 * found["accuracy_other"]
        for key, end in (("gain", ""), ("low", "_low"), ("high", "_high")):
            row[f"{part}_{key}"] = 100 * found[f"lead{end}"]
    return row


if __name__ == "__main__":
    main()
