"""Train the network offline, on the training tasks."""

from tttlab.arc.settings import Settings, read_settings
from tttlab.workflow import command
from tttlab.workflow.arc.keys import training_key
from tttlab.workflow.ledger import Ledger
from tttlab.workflow.order import ARC_SHARES


def run(settings: Settings) -> None:
    """Write outputs/trained: the network and its learning curve."""
    ledger = Ledger("train", "trained")
    # Every process of the stage looks here. None trains before all have met.
    for key in ledger.missing({"network": training_key(settings, ledger)}).values():
        from tttlab.workflow.arc.training import train_offline  # seconds of imports

        if files := train_offline(settings, key):
            ledger.enter("network", key, files)


if __name__ == "__main__":
    command.main(run, __doc__, read=read_settings, shares=ARC_SHARES)
