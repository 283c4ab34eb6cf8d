"""Train on the demonstrations of every evaluation task, by every run, and answer its questions."""

from collections.abc import Sequence

from tttlab.arc.settings import Settings, read_settings
from tttlab.workflow import command
from tttlab.workflow.arc.keys import adapting_key, list_runs
from tttlab.workflow.ledger import Ledger
from tttlab.workflow.order import ARC_SHARES


def run(settings: Settings, names: Sequence[str]) -> None:
    """Write outputs/adapted/<run>: the votes for answers, loss and cost, and the settings."""
    runs, ledger = list_runs(settings, names), Ledger("adapt")
    # Every process of the stage looks here. None computes before all have met.
    if missing := ledger.missing({name: adapting_key(settings, name, ledger) for name in runs}):
        from tttlab.workflow.arc.adapting import adapt_runs  # seconds of imports

        adapt_runs(settings, missing, ledger)
    if not names and not command.RANK:
        ledger.keep_only(runs)


if __name__ == "__main__":
    command.main(run, __doc__, "runs", read=read_settings, shares=ARC_SHARES)
