"""Measure how far the target is from the source in every network, unadapted, without labels."""

from collections.abc import Sequence

from tttlab.config.params import Params
from tttlab.workflow import command
from tttlab.workflow.keys import distance_key
from tttlab.workflow.ledger import Ledger
from tttlab.workflow.pieces import list_networks


def run(params: Params, models: Sequence[str]) -> None:
    """Write outputs/distances/<model>/<seed>.csv: a row per reference, target and metric."""
    ledger = Ledger("distance")
    networks = list_networks(params, models)
    keys = {network: distance_key(params, network, ledger) for network in networks}
    if missing := ledger.missing(keys):
        from tttlab.workflow.distances import measure_networks  # seconds of imports

        measure_networks(params, missing, ledger)
    if not models:
        ledger.keep_only([str(network) for network in networks])


if __name__ == "__main__":
    command.main(run, __doc__, "models")
