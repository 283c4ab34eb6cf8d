"""Show the comparison, and tasks as people know them, on one page and in MLflow."""

from tttlab.arc.settings import Settings, read_settings
from tttlab.workflow import command
from tttlab.workflow.arc.evaluating import report_runs
from tttlab.workflow.order import ARC_SHARES


def run(settings: Settings) -> None:
    """Write outputs/report.html."""
    report_runs(settings)


if __name__ == "__main__":
    command.main(run, __doc__, read=read_settings, shares=ARC_SHARES)
