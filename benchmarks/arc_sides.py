"""Test-time training on ARC's tasks by ours and by a loop over tasks; only the training is timed.

All sides draw the same demonstrations at the same places and take the same steps.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.predicting import Readout
from tttlab.arc import building
from tttlab.arc.auxiliary import Auxiliary
from tttlab.arc.canvas import UNASKED, Canvas, Tokens, sizes
from tttlab.arc.demonstrations import Demonstrations, as_array, draw_pairs
from tttlab.arc.network import CanvasTransformer
from tttlab.arc.settings import Settings
from tttlab.arc.solving import Job
from tttlab.arc.tasks import ArcTask
from tttlab.config.inner_loop import Annealed
from tttlab.runtime.group_size import Groups
from tttlab.runtime.parallel import in_order
from tttlab.seeding import torch_generator


@dataclass(frozen=True)
class Case:
    """What every side does.

    Attributes:
        network: the network that every task starts from.
        jobs: the tasks, as ours computes them together.
        auxiliaries: A auxiliary tasks by the task's name.
        loop: settings of the steps.
        pairs: demonstrations in a step.
        side: most cells along a side of a grid.
        seed: of all random streams.
        device: where to compute.
    """

    network: CanvasTransformer
    jobs: Sequence[Job]
    auxiliaries: Mapping[str, Sequence[Auxiliary]]
    loop: Annealed
    pairs: int
    side: int
    seed: int
    device: torch.device

    @property
    def tasks(self) -> list[ArcTask]:
        """All tasks, in the order of the jobs."""
        return [task for job in self.jobs for task in job.tasks]

    @property
    def short(self) -> "Case":
        """The case with two steps."""
        return replace(self, loop=replace(self.loop, steps=2, warmup=min(1, self.loop.warmup)))


def make_case(settings: Settings, jobs: Sequence[Job], steps: int, device: torch.device) -> Case:
    """Make the case of the run ``all``, with fewer steps and random weights: speed is the same."""
    run, tasks = settings.adapt.run("all"), [task for job in jobs for task in job.tasks]
    drawn = building.draw(settings, tasks, settings.auxiliary.test_time)
    loop = Annealed(
        steps=steps,
        optimizer="adam",
        lr=run.lr,
        warmup=min(run.warmup, steps - 1),
        clip=run.clip,
        trainable="all",
    )
    return Case(
        building.build(settings, len(drawn[0])).to(device),
        jobs,
        dict(zip((task.name for task in tasks), drawn, strict=True)),
        loop,
        run.pairs,
        settings.tasks.largest,
        settings.seed,
        device,
    )


@dataclass(frozen=True)
class NoPrediction(Readout):
    """Predicts nothing, so that the training alone is timed."""

    classifies: ClassVar[bool] = False

    def network(self, model: nn.Module) -> nn.Module:
        """Return the network as it is."""
        return model

    def looks(self, tasks: Tensor, loop: Annealed, generators: Sequence[torch.Generator]) -> Any:
        """Look at nothing: ``(B, 1)``."""
        return torch.zeros(len(tasks), 1, device=tasks.device)

    def read(self, net: Any, looks: Any, method: Any, views: Any, statistics: Any) -> Tensor:
        """Predict nothing: ``(1,)``."""
        return looks


def ours(case: Case, groups: Groups, workers: int) -> dict[str, Tensor]:
    """Train on all tasks as the pipeline does, in processes with one thread each.

    Returns:
        by task the losses ``(S + 1,)`` before every step and after the last.
    """
    done = in_order(partial(adapt_job, case, groups), case.jobs, workers)
    return {name: losses for of_job in done for name, losses in of_job.items()}


def adapt_job(case: Case, groups: Groups, job: Job) -> dict[str, Tensor]:
    """Train on a job's tasks, several at once; what `tttlab.arc.solving.solve` does to train."""
    questions = len(job.tasks[0].questions)
    places = max(len(task.demonstrations) for task in job.tasks)
    arrays = [
        as_array(task, case.auxiliaries[task.name], places, questions, case.side)
        for task in job.tasks
    ]
    names = [task.name for task in job.tasks]
    result = adapt(
        case.network,
        torch.from_numpy(np.stack(arrays)).to(case.device),
        Demonstrations(case.network.canvas, case.pairs, questions),
        case.loop,
        image_ids=names,
        seed=case.seed,
        images_per_step=groups.of("arc", places, questions),
        readout=NoPrediction(),
    )
    return dict(zip(names, result.losses, strict=True))


def one_by_one(case: Case, whole: bool) -> dict[str, Tensor]:
    """Train on one task after the other, as published code does it.

    Args:
        case: what to do.
        whole: whether the network computes all tokens of the canvas, as published, or leaves out
            those without input and target.

    Returns:
        by task the losses ``(S,)`` before every step.
    """
    return {task.name: train_alone(case, task, whole) for task in case.tasks}


def train_alone(case: Case, task: ArcTask, whole: bool) -> Tensor:
    """Train a copy of the network on one task; returns the losses ``(S,)``."""
    model, loop = copy.deepcopy(case.network), case.loop
    optimizer = torch.optim.AdamW(model.parameters(), lr=loop.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: loop.rate(n + 1) / loop.lr)
    auxiliaries, places = case.auxiliaries[task.name], len(task.demonstrations)
    shown = replace(task, questions=())
    array = torch.from_numpy(as_array(shown, auxiliaries, places, 0, case.side)).to(case.device)
    losses = []
    for step in range(loop.steps):
        generator = torch_generator(case.seed, "views", task.name, step)
        draws = torch.rand(case.pairs, 5, generator=generator).to(case.device)
        auxiliary = (draws[:, 0] * len(auxiliaries)).long()
        grids = array[auxiliary, (draws[:, 1] * places).long()]
        draw = draw_whole if whole else draw_pairs
        tokens, targets = draw(model.canvas, grids, auxiliary, draws)
        loss = F.cross_entropy(
            model(tokens).flatten(0, -2), targets.flatten(), ignore_index=UNASKED
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), loop.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def draw_whole(
    canvas: Canvas, grids: Tensor, auxiliary: Tensor, draws: Tensor
) -> tuple[Tokens, Tensor]:
    """Draw pairs as `draw_pairs` does, but keep every token of the canvas."""
    heights, widths = sizes(grids)
    placement = canvas.draw_placement(heights.amax(1), widths.amax(1), draws[:, -3:])
    tokens, _ = canvas.tokenise(canvas.draw_inputs(grids[:, 0], placement), auxiliary)
    return tokens, canvas.patches(canvas.draw_targets(grids[:, 1], placement))
