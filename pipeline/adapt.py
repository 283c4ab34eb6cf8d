"""Adapt every network to the shifted test images, one by one or along streams, by every run."""

from collections.abc import Sequence

from tttlab.config.params import Params
from tttlab.workflow import command


def run(params: Params, names: Sequence[str]) -> None:
    """Write outputs/adapted/<run>/<model>/<seed>.parquet and .json.

    For the first seed it also writes <seed>.steps.parquet.
    """
    from tttlab.workflow.adaptations import adapt_pieces
    from tttlab.workflow.ledger import Ledger
    from tttlab.workflow.pieces import list_pieces
    from tttlab.workflow.processes import open_processes

    pieces, ledger = list_pieces(params, names), Ledger("adapt")
    fabric = open_processes(params)
    adapt_pieces(params, pieces, fabric, ledger)
    if not names and fabric.is_global_zero:
        ledger.keep_only([str(piece) for piece in pieces])


if __name__ == "__main__":
    command.main(run, __doc__, "runs")
