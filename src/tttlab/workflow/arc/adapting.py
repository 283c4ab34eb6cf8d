"""Adapting to the evaluation tasks as the runs say, resumable, each run with its own in MLflow."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from tttlab.arc import building
from tttlab.arc.auxiliary import Auxiliary
from tttlab.arc.network import CanvasTransformer
from tttlab.arc.offline import PairTrainer, gather, train
from tttlab.arc.results import read_tasks
from tttlab.arc.settings import Run, Settings
from tttlab.arc.solving import TOGETHER, Job, Solver, list_jobs, solve
from tttlab.arc.tasks import ArcTask
from tttlab.arc.votes import vote_rows, write_votes
from tttlab.config.inner_loop import Annealed
from tttlab.runtime.parallel import working
from tttlab.runtime.progress import open_bar
from tttlab.runtime.resuming import Work
from tttlab.tracking.runs import start_run
from tttlab.training.optimisers import Recipe
from tttlab.workflow import places
from tttlab.workflow.execution import parent_run
from tttlab.workflow.ledger import Ledger, written_whole
from tttlab.workflow.processes import machine_of, open_fabric, open_shared

if TYPE_CHECKING:
    from tttlab.runtime.ranks import Processes

TRAINABLE = {"all": "all", "tokens": ("auxiliary",)}


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        name: of the run.
        settings: its own.
        solver: what it does to every task.
        jobs: all tasks.
        work: where finished jobs are kept.
        milliseconds: a task's share of what was trained for all tasks together.
    """

    name: str
    settings: Run
    solver: Solver
    jobs: Sequence[Job]
    work: Work
    milliseconds: float = 0.0

    def missing(self) -> list[Job]:
        """List the jobs that are still to be done."""
        return [job for job in self.jobs if not self.work.has(job.name)]


def adapt_runs(settings: Settings, keys: Mapping[str, str], ledger: Ledger) -> None:
    """Compute runs, each with its key; one is written while the next is computed."""
    tasks = read_tasks(places.OUTPUTS)
    fabric = open_fabric(settings)
    with ExitStack() as stack:
        plans = []
        for name, key in keys.items():
            work = stack.enter_context(open_shared(fabric, f"arc adapt {name}", key))
            plans.append(plan(settings, name, tasks, work, fabric))
        machine = machine_of(settings, fabric)
        groups = machine.groups()

        def compute(item: tuple[Plan, Job]) -> int:
            of, job = item
            of.work.save(job.name, solve(of.solver, job, groups, machine.device))
            return len(job.tasks)

        def own(of: Plan) -> list[Job]:
            mine = {job.name for job in of.jobs[machine.rank :: machine.ranks]}
            return [job for job in of.missing() if job.name in mine]

        items = [(of, job) for of in plans for job in own(of)]
        counts = {of.name: len(own(of)) for of in plans}
        with working(compute, items, machine.workers, lambda item: item[0].name) as results:
            for of in plans:
                total = sum(len(job.tasks) for job in of.jobs) // machine.ranks
                hidden = not fabric.is_global_zero
                with open_bar(f"adapt {of.name}", total, "task", hidden=hidden) as bar:
                    for count in islice(results, counts[of.name]):
                        bar.update(count)
                fabric.barrier()
                if fabric.is_global_zero:
                    files = write(settings, of)
                    ledger.enter(of.name, keys[of.name], files)


def plan(
    settings: Settings, name: str, tasks: Sequence[ArcTask], work: Work, fabric: "Processes"
) -> Plan:
    """Make ready what a run does; a network for all tasks together is trained here."""
    run = settings.adapt.run(name)
    drawn = building.draw(settings, tasks, settings.auxiliary.test_time)
    auxiliaries = dict(zip((task.name for task in tasks), drawn, strict=True))
    count = len(drawn[0])
    if run.offline:
        trained = building.load(settings, places.OUTPUTS / "trained")
        network = building.for_new_task(settings, trained, count)
    else:
        network = building.build(settings, count)
    together, milliseconds = run.together and run.steps, 0.0
    if together:
        joint, milliseconds = train_together(settings, run, network, tasks, drawn, work, fabric)
        numbers = {task.name: number for number, task in enumerate(tasks)}
        of_tasks = partial(for_one, settings, joint, numbers, count)
    else:
        of_tasks = partial(shared, network)
    loop = Annealed(
        steps=0 if together else run.steps,
        optimizer="adam",
        lr=run.lr,
        warmup=0 if together else run.warmup,
        clip=run.clip,
        trainable=TRAINABLE.get(run.trainable, run.trainable),
    )
    record = [0] if together else settings.adapt.steps(name)
    largest = settings.tasks.largest
    solver = Solver(
        of_tasks, auxiliaries, loop, record, run.pairs, run.placements, largest, settings.seed
    )
    jobs = list_jobs(tasks, 1 if together else TOGETHER[fabric.device.type])
    return Plan(name, run, solver, jobs, work, milliseconds)


def shared(network: CanvasTransformer, _names: Sequence[str]) -> CanvasTransformer:
    """Give all tasks the same network to start from."""
    return network


def for_one(
    settings: Settings,
    joint: CanvasTransformer,
    numbers: Mapping[str, int],
    count: int,
    names: Sequence[str],
) -> CanvasTransformer:
    """Give one task the joint network with this task's tokens."""
    (name,) = names
    start = numbers[name] * count
    return building.with_tokens(settings, joint, joint.auxiliary.weight[start : start + count])


def train_together(
    settings: Settings,
    run: Run,
    network: CanvasTransformer,
    tasks: Sequence[ArcTask],
    drawn: Sequence[Sequence[Auxiliary]],
    work: Work,
    fabric: "Processes",
) -> tuple[CanvasTransformer, float]:
    """Train one network on the demonstrations of all tasks, on as many pairs as all have alone.

    Returns:
        the network, and each task's share of the milliseconds.
    """
    pairs = gather(tasks, drawn, settings.tasks.largest)
    tokens = network.auxiliary.weight.detach().repeat(len(tasks), 1)
    joint = building.with_tokens(settings, network, tokens)
    epochs = max(1, round(len(tasks) * run.steps * run.pairs / len(pairs)))
    recipe = Recipe(epochs, settings.train.batch_size, lr=run.lr, weight_decay=0.0, clip=run.clip)
    trainer = PairTrainer(fabric, settings.seed, work=work, title="arc", canvas=joint.canvas)
    rows = train(trainer, joint, pairs, recipe, "joint")
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    return joint.to("cpu"), 1e3 * seconds / len(tasks)


def write(settings: Settings, of: Plan) -> list[Path]:
    """Write a run's votes, its tasks and its description, and log it to MLflow."""
    votes, rows = [], []
    for job in of.jobs:
        result = of.work.load(job.name)
        votes += job_votes(of, job, result)
        rows += job_rows(of, job, result)
    target = places.OUTPUTS / "adapted" / of.name
    table = pd.DataFrame(rows)
    shown = {"run": of.name, **of.settings.model_dump(mode="json"), "seed": settings.seed}
    last = table[table["steps"] == table["steps"].max()]
    with start_run(
        places.ROOT,
        stage="arc adapt",
        name=f"arc adapt {of.name}",
        params=shown,
        parent=parent_run(settings),
        tags={"run": of.name},
        resume_key=of.work.id,
    ) as tracked:
        curve = table.groupby("steps")["loss"].mean()
        tracked.log_series("loss/demonstrations", curve.tolist(), curve.index.tolist())
        seconds = last["milliseconds"].mean() / 1e3
        tracked.log_metrics({"cost/seconds_per_task": seconds})
        target.mkdir(parents=True, exist_ok=True)
        with written_whole(target / "votes.parquet") as partial_file:
            write_votes(votes, partial_file)
        with written_whole(target / "tasks.parquet") as partial_file:
            table.to_parquet(partial_file, index=False)
        about = {"mlflow_run_id": tracked.id, "settings": shown}
        with written_whole(target / "about.json") as partial_file:
            partial_file.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return [target / name for name in ("votes.parquet", "tasks.parquet", "about.json")]


def job_votes(of: Plan, job: Job, result: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Count the votes of a job's tasks after every recorded number of steps."""
    rows = []
    for task, grids in zip(job.tasks, result["grids"].numpy(), strict=True):
        for steps, of_steps in zip(steps_of(of), grids, strict=True):
            rows += vote_rows(task.name, steps, of_steps, of.solver.auxiliaries[task.name])
    return rows


def job_rows(of: Plan, job: Job, result: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Tabulate loss and cost of a job's tasks after every recorded number of steps."""
    losses = result["losses"]
    return [
        {
            "task": task.name,
            "steps": steps,
            "loss": float(losses[number, min(steps, losses.shape[1] - 1)]),
            "milliseconds": of.milliseconds + float(result["milliseconds"][number, column]),
            "fell_back": bool(result["fell_back"][number]),
        }
        for number, task in enumerate(job.tasks)
        for column, steps in enumerate(steps_of(of))
    ]


def steps_of(of: Plan) -> Sequence[int]:
    """List the numbers of steps whose predictions a run has; those of a joint network are all."""
    return [of.settings.steps] if of.settings.together else of.solver.record
