"""Adapt every network to the shifted test images, one by one or along streams, by every run."""

from collections.abc import Sequence

from tttlab.config.params import Params
from tttlab.workflow import command
from tttlab.workflow.keys import adapting_key
from tttlab.workflow.ledger import Ledger
from tttlab.workflow.pieces import list_pieces


def run(params: Params, names: Sequence[str]) -> None:
    """Write outputs/adapted/<run>/<model>/<seed>.parquet and .json.

    For the first seed it also writes <seed>.steps.parquet.
    """
    pieces, ledger = list_pieces(params, names), Ledger("adapt")
    # Every process of the stage looks here. None computes before all have met.
    if missing := ledger.missing({piece: adapting_key(params, piece, ledger) for piece in pieces}):
        from tttlab.tracking.recorder import recorder

        with recorder(wanted=not command.RANK):
            from tttlab.workflow.adaptations import adapt_pieces  # seconds of imports
            from tttlab.workflow.processes import open_processes

            fabric = open_processes(params)
            adapt_pieces(params, missing, fabric, ledger)
        if not fabric.is_global_zero:
            return
    if not names and not command.RANK:
        ledger.keep_only([str(piece) for piece in pieces])


if __name__ == "__main__":
    command.main(run, __doc__, "runs")
