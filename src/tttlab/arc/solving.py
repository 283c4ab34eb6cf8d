"""Adapting to tasks, a few at a time, each with weights of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tttlab.adaptation.adapter import adapt
from tttlab.arc.auxiliary import Auxiliary
from tttlab.arc.demonstrations import Demonstrations, as_array
from tttlab.arc.network import CanvasTransformer
from tttlab.arc.readout import GridReadout
from tttlab.arc.tasks import ArcTask
from tttlab.config.inner_loop import InnerLoop
from tttlab.runtime.group_size import Groups

# Tasks that are computed and saved as one piece. A CPU gains little from more at once, and smaller
# pieces of tasks of one size need less padding; a GPU is filled by many.
TOGETHER = {"cpu": 4, "cuda": 32}


@dataclass(frozen=True)
class Solver:
    """What is done to every task.

    Attributes:
        network: makes the network for tasks by name; all tasks of a job start from the same one.
        auxiliaries: by task, in the order of the network's tokens.
        loop: settings of the steps.
        record: numbers of steps after which to predict.
        pairs: demonstrations in a step.
        placements: how often each question is drawn under each auxiliary task.
        side: cells along a side, at most.
        seed: of all random streams.
    """

    network: Callable[[Sequence[str]], CanvasTransformer]
    auxiliaries: Mapping[str, Sequence[Auxiliary]]
    loop: InnerLoop
    record: Sequence[int]
    pairs: int
    placements: int
    side: int
    seed: int


class Job(NamedTuple):
    """Tasks with equally many questions, which are computed and saved together.

    Attributes:
        name: under which the results are saved; another division of the tasks has other names.
        tasks: of about the same size.
    """

    name: str
    tasks: tuple[ArcTask, ...]


def list_jobs(tasks: Sequence[ArcTask], together: int) -> list[Job]:
    """Group tasks of about the same size, so that little is computed on padding.

    Args:
        tasks: all tasks.
        together: most tasks of a job.

    Returns:
        jobs, the longest first, so that processes that share them end at about the same time.
    """

    def length(task: ArcTask) -> int:
        return max(max(pair.input.size, pair.output.size) for pair in task.demonstrations)

    ordered = sorted(
        tasks, key=lambda task: (len(task.questions), length(task), task.name), reverse=True
    )
    jobs: list[list[ArcTask]] = []
    for task in ordered:
        last = jobs[-1] if jobs else []
        if last and len(last) < together and len(last[0].questions) == len(task.questions):
            last.append(task)
        else:
            jobs.append([task])
    return [Job(f"job-{number}-of-{len(jobs)}", tuple(job)) for number, job in enumerate(jobs)]


def solve(
    solver: Solver, job: Job, groups: Groups, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Adapt to the tasks of a job, each on its own.

    Returns:
        by name, for T tasks, R recorded numbers of steps, Q questions, A auxiliary tasks:
        ``grids (T, R, Q, A, placements, G, G)`` int8 as the views show them, ``losses``
        ``(T, steps + 1)``, ``fell_back (T,)`` and ``milliseconds (T, R)``.
    """
    names = [task.name for task in job.tasks]
    questions = len(job.tasks[0].questions)
    demonstrations = max(len(task.demonstrations) for task in job.tasks)
    array = np.stack(
        [
            as_array(task, solver.auxiliaries[task.name], demonstrations, questions, solver.side)
            for task in job.tasks
        ]
    )
    network = solver.network(names).to(device)
    readout = GridReadout(network.canvas, questions, solver.side, solver.placements)
    result = adapt(
        network,
        torch.from_numpy(array).to(device),
        Demonstrations(network.canvas, solver.pairs, questions),
        solver.loop,
        image_ids=names,
        seed=solver.seed,
        record=solver.record,
        images_per_step=groups.of("arc", demonstrations, questions),
        readout=readout,
    )
    shape = (questions, array.shape[1], solver.placements)
    return {
        "grids": result.logits_at.to(torch.int8).unflatten(2, shape),
        "losses": result.losses,
        "fell_back": result.fell_back,
        "milliseconds": result.milliseconds_at,
    }
