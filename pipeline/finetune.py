"""Train every model's classifier on the labeled images; keep its self-supervised head."""

from collections.abc import Sequence

from tttlab.config.params import Params
from tttlab.workflow import command
from tttlab.workflow.ledger import Ledger
from tttlab.workflow.pieces import list_networks
from tttlab.workflow.training_keys import finetuning_key


def run(params: Params, models: Sequence[str]) -> None:
    """Write outputs/finetuned/<model>/<seed>: the source networks and their learning curves."""
    networks, ledger = list_networks(params, models), Ledger("finetune")
    keys = {network: finetuning_key(params, network, ledger) for network in networks}
    if missing := ledger.missing(keys):
        from tttlab.workflow.finetuning import finetune_network  # seconds of imports
        from tttlab.workflow.trainings import train_networks

        train_networks(params, missing, ledger, finetune_network)
    if not models and not command.RANK:
        ledger.keep_only([str(network) for network in networks])


if __name__ == "__main__":
    command.main(run, __doc__, "models")
