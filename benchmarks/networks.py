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

from tttlab.config.params import Params, read_params
from tttlab.errors import UserError, one_line
from tttlab.evaluation import networks
from tttlab.evaluation.predictions import read_predictions
from tttlab.evaluation.results import CONTROL
from tttlab.workflow import places


@one_line()
def main() -> None:
    """Compare all networks of the last execution."""
    params = read_params(Path("params.yaml"))
    arguments = read_arguments(params)
    reference = read(arguments.reference, arguments.reference_run)
    rows = [
        {"model": model, "run": run, **compare(read(model, run), reference)}
        for model, run in params.pairs
        if run in arguments.runs
    ]
    table = pd.DataFrame(rows)
    table.to_csv(places.OUTPUTS / "networks.csv", index=False)
    print(table.to_string(index=False, float_format="%.1f"))


def read_arguments(params: Params) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: it names a network or a run that the settings do not have.
    """
    models, runs = list(params.models), list(params.adapt.runs)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    parser.add_argument(
        "--reference",
        default=models[0],
        help="the network to compare with; default: the first",
    )
    parser.add_argument("--runs", nargs="+", default=[CONTROL], help="of the networks")
    parser.add_argument("--reference-run", default=CONTROL, help="of the network to compare with")
    arguments = parser.parse_args()
    expect("--reference", arguments.reference, models)
    for run in arguments.runs:
        expect("--runs", run, runs)
    of_reference = [run for model, run in params.pairs if model == arguments.reference]
    expect("--reference-run", arguments.reference_run, of_reference)
    return arguments


def expect(option: str, found: str, known: list[str]) -> None:
    """Refuse a name that is not known."""
    if found not in known:
        raise UserError(f"{option}: expected one of {', '.join(known)}, found {found}")


def read(model: str, run: str) -> pd.DataFrame:
    """Read what a run of the last execution predicted."""
    return read_predictions(places.OUTPUTS / "predictions" / model / f"{run}.parquet")


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
