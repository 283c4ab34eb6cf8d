"""Compare the gradients of demonstrations and answers; analysis only, for it reads answers."""

from tttlab.arc.settings import Settings, read_settings
from tttlab.workflow import command
from tttlab.workflow.order import ARC_SHARES


def run(settings: Settings) -> None:
    """Write outputs/aligned.csv: a row per task."""
    from tttlab.workflow.arc.aligning import align  # seconds of imports

    align(settings)


if __name__ == "__main__":
    command.main(run, __doc__, read=read_settings, shares=ARC_SHARES)
