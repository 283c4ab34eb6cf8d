"""Choose the tasks of ARC, invent others, and put the answers aside."""

from tttlab.arc.settings import Settings, read_settings
from tttlab.workflow import command
from tttlab.workflow.arc.preparing import write_tasks
from tttlab.workflow.order import ARC_SHARES


def run(settings: Settings) -> None:
    """Write outputs/tasks/{training,invented,evaluation,answers}.json."""
    write_tasks(settings)


if __name__ == "__main__":
    command.main(run, __doc__, read=read_settings, shares=ARC_SHARES)
