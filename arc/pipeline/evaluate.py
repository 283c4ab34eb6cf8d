"""Compare the answers with the right ones: solved tasks, with intervals, and runs by pairs."""

from tttlab.arc.settings import Settings, read_settings
from tttlab.workflow import command
from tttlab.workflow.arc.evaluating import evaluate_runs
from tttlab.workflow.order import ARC_SHARES


def run(settings: Settings) -> None:
    """Write outputs/metrics.json and outputs/tables."""
    evaluate_runs(settings)


if __name__ == "__main__":
    command.main(run, __doc__, read=read_settings, shares=ARC_SHARES)
