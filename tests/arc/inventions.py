"""Invented tasks for the tests of their rules."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tttlab.arc.invented.inventing import RULES, invent
from tttlab.arc.tasks import ArcTask

LARGEST, PAIRS = 10, 6
_TASKS = 4  # of every rule


def invented_by_rule() -> dict[str, list[ArcTask]]:
    """Invent several tasks of every rule, by its name."""
    tasks = invent(_TASKS * len(RULES), PAIRS, LARGEST, seed=3)
    return {rule.__name__: tasks[number :: len(RULES)] for number, rule in enumerate(RULES)}


def holds(
    invented: Mapping[str, Sequence[ArcTask]],
    name: str,
    statement: Callable[[np.ndarray, np.ndarray], bool],
) -> None:
    """Check a statement on every pair of a rule's tasks."""
    for task in invented[name]:
        for pair in task.demonstrations:
            assert statement(*pair), f"{task.name}\n{pair.input}\n{pair.output}"
