"""The tasks on disk: questions in one file, their answers in another that only `evaluate` reads."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tttlab.arc.settings import Settings
from tttlab.arc.tasks import ArcTask, Collection, Pair, load
from tttlab.errors import UserError
from tttlab.seeding import numpy_generator
from tttlab.workflow import places

TRAINING, INVENTED = "training.json", "invented.json"
EVALUATION, ANSWERS = "evaluation.json", "answers.json"


def folder() -> Path:
    """Give the folder of the tasks."""
    return places.OUTPUTS / "tasks"


def check_trainable(settings: Settings) -> None:
    """Look the parameters that runs name up in the network, before it is trained.

    Raises:
        UserError: the network has none of such a name.
    """
    runs = {name: settings.adapt.run(name) for name in settings.adapt.runs}
    named = {name: run for name, run in runs.items() if not isinstance(run.trainable, str)}
    if not named:
        return
    from tttlab.adaptation.trainable import select_parameters  # seconds of imports
    from tttlab.arc.building import build

    network = build(settings, 1)
    for name, run in named.items():
        try:
            select_parameters(network, run.trainable)
        except UserError as error:
            raise UserError(f"adapt.runs.{name}.{error}") from error


def write_tasks(settings: Settings) -> None:
    """Choose the tasks, invent others, and write them.

    Raises:
        UserError: no task fits, or a run names parameters that the network does not have.
    """
    from tttlab.arc.invented.inventing import invent  # SciPy; the other stages import the names

    check_trainable(settings)
    chosen, invented = settings.tasks, settings.invented
    training = fitting(load(chosen.training, "training"), chosen.largest)
    evaluation = fitting(load(chosen.evaluation, "evaluation"), chosen.largest)
    tasks = list(evaluation.tasks)
    if chosen.count is not None:
        if chosen.count > len(tasks):
            raise UserError(
                f"tasks.count: expected at most {len(tasks)}, the evaluation tasks whose grids fit "
                f"{chosen.largest} × {chosen.largest}, found {chosen.count}"
            )
        generator = numpy_generator(settings.seed, "tasks")
        numbers = np.sort(generator.choice(len(tasks), chosen.count, replace=False))
        tasks = [tasks[number] for number in numbers]
    folder().mkdir(parents=True, exist_ok=True)
    # The training tasks' questions are answered in public: they are demonstrations like the others.
    complete = [answered(task, training.answers[task.name]) for task in training.tasks]
    write(folder() / TRAINING, complete)
    own = invent(invented.tasks, invented.pairs, chosen.largest, settings.seed)
    write(folder() / INVENTED, own)
    write(folder() / EVALUATION, tasks)
    answers = {
        task.name: [grid.tolist() for grid in evaluation.answers[task.name]] for task in tasks
    }
    (folder() / ANSWERS).write_text(json.dumps(answers) + "\n", encoding="utf-8")
    print(
        f"{len(complete)} training tasks, {len(own)} invented ones, {len(tasks)} evaluation tasks"
    )


def answered(task: ArcTask, answers: Sequence[np.ndarray]) -> ArcTask:
    """Make demonstrations of a task's questions and their answers."""
    pairs = [Pair(*pair) for pair in zip(task.questions, answers, strict=True)]
    return ArcTask(task.name, (*task.demonstrations, *pairs), ())


def fitting(collection: Collection, largest: int) -> Collection:
    """Keep the tasks of which every grid, answers included, has at most ``largest`` cells a side.

    Raises:
        UserError: none does.
    """

    def side(task: ArcTask) -> int:
        answers = collection.answers[task.name]
        return max(task.longest_side, *(length for grid in answers for length in grid.shape))

    tasks = tuple(task for task in collection.tasks if side(task) <= largest)
    if not tasks:
        raise UserError(f"tasks.largest: no task has grids of at most {largest} cells a side")
    return Collection(tasks, collection.answers)


def write(file: Path, tasks: Sequence[ArcTask]) -> None:
    """Write tasks in ARC's own form, without answers."""
    content = {
        task.name: {
            "train": [
                {"input": pair.input.tolist(), "output": pair.output.tolist()}
                for pair in task.demonstrations
            ],
            "test": [{"input": grid.tolist()} for grid in task.questions],
        }
        for task in tasks
    }
    file.write_text(json.dumps(content) + "\n", encoding="utf-8")
