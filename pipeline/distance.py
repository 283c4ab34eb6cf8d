"""Measure how far the target is from the source in every network, unadapted, without labels."""

from collections.abc import Sequence

from tttlab.config.params import Params
from tttlab.workflow import command


def run(params: Params, models: Sequence[str]) -> None:
    """Write outputs/distances/<model>/<seed>.csv: a row per reference, target and metric."""
    from tttlab.workflow.distances import Network, measure_networks
    from tttlab.workflow.ledger import Ledger

    ledger = Ledger("distance")
    networks = [Network(model, seed) for model in models or params.models for seed in params.seeds]
    measure_networks(params, networks, ledger)
    if not models:
        ledger.keep_only([str(network) for network in networks])


if __name__ == "__main__":
    command.main(run, __doc__, "models")
