"""Division of the tasks into jobs, and what a job gives."""

import torch

from tests.arc.tiny import SIDE, auxiliaries, network, random_task
from tttlab.adaptation.adapter import adapt
from tttlab.arc.demonstrations import Demonstrations, as_array
from tttlab.arc.readout import GridReadout
from tttlab.arc.solving import Solver, list_jobs, solve
from tttlab.config.inner_loop import Annealed
from tttlab.runtime.group_size import Groups

TASKS = [random_task(seed, 2 + seed % 3, 1 + seed % 2) for seed in range(9)]


def test_every_task_is_in_one_job_of_equally_many_questions():
    jobs = list_jobs(TASKS, 2)
    names = sorted(task.name for job in jobs for task in job.tasks)
    assert names == sorted(task.name for task in TASKS)
    assert all(len(job.tasks) <= 2 for job in jobs)
    assert all(len({len(task.questions) for task in job.tasks}) == 1 for job in jobs)
    assert len({job.name for job in jobs}) == len(jobs) == 5


def test_jobs_are_the_longest_first_and_do_not_depend_on_the_tasks_order():
    jobs = list_jobs(TASKS, 2)
    assert jobs == list_jobs(TASKS[::-1], 2)
    longest = [
        max(pair.input.size for task in job.tasks for pair in task.demonstrations)
        for job in jobs
        if len(job.tasks[0].questions) == 1
    ]
    assert longest == sorted(longest, reverse=True)


def test_a_job_gives_what_the_adapter_gives():
    tasks, drawn, net = TASKS[0:4:2], auxiliaries(), network(3)
    loop = Annealed(steps=2, optimizer="adam", lr=1e-2, trainable="all")
    solver = Solver(
        lambda _names: net, {task.name: drawn for task in tasks}, loop, [0, 2], 3, 2, SIDE, seed=4
    )
    (job,) = list_jobs(tasks, 4)
    found = solve(solver, job, Groups(1))
    assert found["grids"].shape == (2, 2, 1, 3, 2, SIDE, SIDE)
    assert found["grids"].dtype == torch.int8
    for number, task in enumerate(job.tasks):
        array = torch.from_numpy(as_array(task, drawn, len(task.demonstrations), 1, SIDE))[None]
        alone = adapt(
            net,
            array,
            Demonstrations(net.canvas, 3, 1),
            loop,
            image_ids=[task.name],
            seed=4,
            record=[0, 2],
            readout=GridReadout(net.canvas, 1, SIDE, 2),
        )
        torch.testing.assert_close(found["losses"][number], alone.losses[0])
        assert torch.equal(found["grids"][number].flatten(1, 3), alone.logits_at[0].to(torch.int8))
