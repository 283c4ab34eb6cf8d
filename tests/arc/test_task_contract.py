"""What the adapter promises of images holds for tasks: each is trained as if it were alone."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from tests.arc.tiny import CANVAS, SIDE, auxiliaries, network, random_task
from tests.helpers.contract import SEED, trained_on_one
from tttlab.adaptation.adapter import adapt
from tttlab.arc.demonstrations import Demonstrations, as_array
from tttlab.arc.readout import GridReadout
from tttlab.config.inner_loop import Annealed, InnerLoop
from tttlab.seeding import torch_generator

AUXILIARIES = auxiliaries()
QUESTIONS, PLACEMENTS = 2, 2
TASKS = [random_task(seed, 2 + seed, QUESTIONS) for seed in range(3)]
NAMES = [task.name for task in TASKS]
METHOD = Demonstrations(CANVAS, pairs=3, questions=QUESTIONS)
READOUT = GridReadout(CANVAS, QUESTIONS, SIDE, PLACEMENTS, together=5)
LOOPS = [
    Annealed(steps=3, optimizer="adam", lr=1e-2, warmup=1, clip=1.0, trainable="all"),
    Annealed(steps=2, optimizer="adam", lr=1e-2, trainable=("auxiliary",)),
    InnerLoop(steps=2, lr=1e-1, momentum=0.9, trainable=("blocks.1", "head")),
]


def arrays(tasks=TASKS) -> torch.Tensor:
    """Put tasks into arrays with room for four demonstrations."""
    made = [as_array(task, AUXILIARIES, 4, QUESTIONS, SIDE) for task in tasks]
    return torch.from_numpy(np.stack(made))


def solve(tasks=None, names=NAMES, loop=LOOPS[0], method=METHOD, **options: Any):
    tasks = arrays() if tasks is None else tasks
    net = network(len(AUXILIARIES))
    return adapt(net, tasks, method, loop, image_ids=names, readout=READOUT, **options)


def looks_of_one(task: torch.Tensor, name: str) -> Any:
    looks = READOUT.looks(task[None], InnerLoop(), [torch_generator(SEED, "average", name)])
    return tree_map(lambda part: part[0], looks)


@pytest.mark.parametrize("loop", LOOPS, ids=repr)
def test_vectorised_equals_one_task_at_a_time(loop):
    together = solve(loop=loop, seed=SEED)
    for number, (task, name) in enumerate(zip(arrays(), NAMES, strict=True)):
        net, drawn = trained_on_one(network(len(AUXILIARIES)), task, METHOD, loop, {}, name)
        with torch.no_grad():
            loss, _ = METHOD.loss(net, drawn[-1], {}, ())
            grids = READOUT.read(net, looks_of_one(task, name), METHOD, drawn[-1], {})
        torch.testing.assert_close(together.losses[number, -1], loss, atol=1e-9, rtol=1e-9)
        assert torch.equal(together.logits[number], grids)
    assert not together.fell_back.any()
    assert together.losses[:, -1].sub(together.losses[:, 0]).abs().min() > 1e-6


def test_a_prediction_is_a_grid_for_every_view():
    result = solve(record=[0, 2])
    views = QUESTIONS * len(AUXILIARIES) * PLACEMENTS
    assert result.logits.shape == (len(TASKS), views, SIDE, SIDE)
    assert result.logits_at.shape == (len(TASKS), 2, views, SIDE, SIDE)
    assert torch.equal(result.logits_at[:, 0], result.source_logits)
    assert set(result.logits.unique().tolist()) <= set(range(-1, 10))


@pytest.mark.parametrize("together", [1, 2])
def test_no_result_depends_on_how_many_tasks_are_worked_on_at_once(together):
    expected, found = solve(), solve(images_per_step=together)
    torch.testing.assert_close(found.losses, expected.losses, atol=1e-9, rtol=1e-9)
    assert torch.equal(found.logits, expected.logits)


def test_no_task_depends_on_another():
    others = arrays([TASKS[0], random_task(8, 4, QUESTIONS), random_task(9, 2, QUESTIONS)])
    expected, found = solve(), solve(others, [NAMES[0], "another", "a third"])
    torch.testing.assert_close(found.losses[0], expected.losses[0], atol=1e-9, rtol=1e-9)
    assert torch.equal(found.logits[0], expected.logits[0])
    assert not torch.equal(found.losses[1], expected.losses[1])


def test_what_stands_in_place_of_the_answers_is_not_read():
    spoilt = arrays()
    spoilt[:, :, -QUESTIONS:, 1] = torch.randint(0, 10, spoilt[:, :, -QUESTIONS:, 1].shape).to(
        spoilt
    )
    expected, found = solve(record=[0, 2]), solve(spoilt, record=[0, 2])
    assert torch.equal(found.logits_at, expected.logits_at)
    assert torch.equal(found.losses, expected.losses)


class Poisoned(Demonstrations):
    """Its loss is not a number for a task whose outputs show a 9."""

    def loss(self, net, views, statistics, state):
        loss, state = super().loss(net, views, statistics, state)
        poison = torch.where((views["targets"] == 9).any(), float("nan"), 0.0)
        return loss + poison, state


def test_a_task_that_fails_falls_back_alone():
    tasks = arrays()
    tasks[tasks == 9] = 8
    healthy = solve(tasks)
    tasks[1] = torch.where(tasks[1] == 8, 9, tasks[1])
    assert (tasks[1] == 9).any()
    method = Poisoned(CANVAS, pairs=12, questions=QUESTIONS)
    result = solve(tasks, method=method)
    assert result.fell_back.tolist() == [False, True, False]
    assert torch.equal(result.logits[1], result.source_logits[1])
    assert healthy.losses.isfinite().all()


def test_outputs_that_are_not_finite_are_no_grids():
    net = network(len(AUXILIARIES))
    net.head.bias.data[0] = float("nan")
    result = adapt(
        net, arrays(), METHOD, replace(LOOPS[0], steps=0), image_ids=NAMES, readout=READOUT
    )
    assert result.logits.isnan().all()
    assert result.fell_back.all()


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine():
    loop = Annealed(steps=6, lr=0.1, warmup=2)
    rates = [loop.rate(step) for step in range(1, 7)]
    falling = [0.05 * (1 + math.cos(math.pi * part / 4)) for part in range(4)]
    assert rates == pytest.approx([0.05, 0.1, *falling])
    assert [InnerLoop(lr=0.1).rate(step) for step in (1, 5)] == [0.1, 0.1]
