"""Alignment of gradients as a stage."""

import pandas as pd
import torch

from tttlab.arc import building
from tttlab.arc.alignment import cosines
from tttlab.arc.results import read_answers, read_tasks
from tttlab.arc.settings import Settings
from tttlab.workflow import places


def align(settings: Settings) -> None:
    """Write ``aligned.csv``: task, cosine with its own answers, cosine with another task's."""
    tasks, answers = read_tasks(places.OUTPUTS), read_answers(places.OUTPUTS)
    tasks = tasks[: settings.alignment]
    auxiliaries = building.draw(settings, tasks, settings.auxiliary.test_time)
    trained = building.load(settings, places.OUTPUTS / "trained")
    rows = []
    if tasks:
        network = building.for_new_task(settings, trained, len(auxiliaries[0]))
        torch.set_num_threads(1)  # small operations gain nothing from more
        found = cosines(
            network,
            tasks,
            [answers[task.name] for task in tasks],
            auxiliaries,
            settings.tasks.largest,
            settings.seed,
        )
        rows = [(task.name, *pair) for task, pair in zip(tasks, found, strict=True)]
    table = pd.DataFrame(rows, columns=["task", "own", "other"])
    table.to_csv(places.OUTPUTS / "aligned.csv", index=False, float_format="%.6g")
