import copy
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers import trainings
from tttlab.errors import UserError
from tttlab.runtime.resuming import Work
from tttlab.training.loaders import Views
from tttlab.training.losses import classification_loss, objective_loss
from tttlab.training.optimisers import Recipe
from tttlab.training.recipes import ssl_views
from tttlab.training.trainer import Task, training_only

RECIPE = Recipe(epochs=2, batch_size=8, lr=1e-2)


def assert_same_weights(left: torch.nn.Module, right: torch.nn.Module) -> None:
    left_state, right_state = left.state_dict(), right.state_dict()
    assert left_state.keys() == right_state.keys()
    for name, value in left_state.items():
        assert torch.equal(value, right_state[name]), name


def without_seconds(curves: list) -> list:
    return [
        [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        for rows in curves
    ]


def in_a_process(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess:
    script = Path(trainings.__file__)
    root = script.parents[2]
    path = [str(root / "src"), str(root)]
    code = (
        f"import sys, runpy; sys.path[:0] = {path}; "
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=False, timeout=timeout, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "task", "epoch"), [("mae", "pretrain", 2), ("simclr", "finetune", 3)]
)
def test_a_killed_training_goes_on_and_ends_with_the_same_numbers(kind, task, epoch, tmp_path):
    """SIGKILL ends the separate process after an epoch's steps, before they are saved."""
    settings, folder = {"simclr": trainings.SIMCLR, "mae": trainings.MAE}[kind], tmp_path / "work"
    assert in_a_process(folder, kind, task, epoch).returncode == -9
    assert (folder / "process.json").exists()

    with Work(folder) as work:
        # The rows include epoch 0, but not the killed epoch.
        assert len(work.load(task)["rows"]) == epoch
        resumed, curves = trainings.train(settings, work)
    uninterrupted, expected = trainings.train(settings)
    assert_same_weights(resumed, uninterrupted)
    assert without_seconds(curves) == without_seconds(expected)


def test_workers_change_no_weight():
    alone, objective = trainings.build(trainings.SIMCLR)
    with_workers, _ = trainings.build(trainings.SIMCLR)
    loss, views = objective_loss(objective), ssl_views(objective, trainings.VIEWS)
    task = Task("a", ("encoder", "head"), loss, views, RECIPE)
    trainings.trainer(workers=0).fit(alone, trainings.image_set(), task)
    trainings.trainer(workers=2).fit(with_workers, trainings.image_set(), task)
    assert_same_weights(alone, with_workers)


@pytest.mark.slow
def test_a_process_that_augments_and_is_killed_ends_the_training_with_one_line():
    """In a separate process: torch may report the loss a second time, at any later moment."""
    ended = in_a_process(timeout=60)
    assert ended.returncode == 1
    message = (
        r"UserError: a process that augments images was lost \(.*\): memory probably ran out; "
        r"lower machine\.workers;.*\n$"
    )
    assert re.search(message, ended.stderr)


def test_the_curve_holds_the_means_of_all_steps_and_their_learning_rate():
    network, _ = trainings.build(trainings.SIMCLR)
    losses, reports = [], []

    def loss(model, batch, generator):
        losses.append(float(len(losses)))
        zero = 0 * sum(parameter.sum() for parameter in model.classifier.parameters())
        return {"loss": zero + losses[-1], "half": torch.tensor(losses[-1] / 2)}

    def measure(epoch: int) -> dict:
        return {"measured": 10 * epoch}

    recipe = Recipe(epochs=2, batch_size=8, lr=0.5, warmup_epochs=2)
    task = Task("t", ("classifier",), loss, {}, recipe, measure=measure)
    trainer = trainings.trainer(report=lambda name, row: reports.append((name, row)))
    rows = trainer.fit(network, trainings.image_set(), task)
    assert rows[0] == {"epoch": 0, "measured": 0}
    assert [row.pop("seconds") > 0 for row in rows[1:]] == [True, True]
    assert rows[1] == {"epoch": 1, "loss": 1.0, "half": 0.5, "lr": 0.25, "measured": 10}
    assert rows[2] == {"epoch": 2, "loss": 4.0, "half": 2.0, "lr": 0.5, "measured": 20}
    assert reports == [("t", row) for row in rows]


def test_no_epochs_leave_the_network_as_it_is():
    network, objective = trainings.build(trainings.MAE)
    fresh, _ = trainings.build(trainings.MAE)
    loss, recipe = objective_loss(objective), Recipe(epochs=0)
    task = Task("t", ("encoder",), loss, {}, recipe, measure=lambda epoch: {"a": 1.0})
    assert trainings.trainer().fit(network, trainings.image_set(), task) == [{"epoch": 0, "a": 1.0}]
    assert_same_weights(network, fresh)


def test_a_loss_that_explodes_ends_the_training_with_advice():
    network, _ = trainings.build(trainings.SIMCLR)

    def loss(model, batch, generator):
        return {"loss": classification_loss(model, batch, generator)["loss"] * float("nan")}

    views = {"classify": Views(1, trainings.VIEWS)}
    task = Task("finetune", ("classifier",), loss, views, RECIPE)
    with pytest.raises(
        UserError,
        match=r"finetune: expected a finite loss, found nan in epoch 1; lower lr \(0.01\)",
    ):
        trainings.trainer().fit(network, trainings.image_set(), task)


def test_a_step_is_no_longer_than_its_clipped_gradient():
    network, _ = trainings.build(trainings.SIMCLR)
    before = copy.deepcopy(network.classifier)
    recipe = Recipe(epochs=1, batch_size=22, optimizer="sgd", lr=0.5, weight_decay=0.0, clip=1e-3)
    views = {"classify": Views(1, trainings.VIEWS)}
    task = Task("t", ("classifier",), classification_loss, views, recipe)
    trainings.trainer().fit(network, trainings.image_set(), task)
    moved = [
        (after - value).flatten()
        for after, value in zip(network.classifier.parameters(), before.parameters(), strict=True)
    ]
    assert torch.cat(moved).norm().item() == pytest.approx(0.5 * 1e-3, rel=1e-3)


def test_every_epoch_draws_masks_and_dropout_of_its_own_and_again_when_it_is_repeated():
    network, _ = trainings.build(trainings.SIMCLR)
    drawn = []

    def loss(model, batch, generator):
        drawn.append((torch.rand(1, generator=generator).item(), torch.rand(1).item()))
        return {"loss": classification_loss(model, batch, generator)["loss"]}

    views = {"classify": Views(1, trainings.VIEWS)}
    task = Task("t", ("classifier",), loss, views, replace(RECIPE, batch_size=22))
    for _ in range(2):
        trainings.trainer().fit(copy.deepcopy(network), trainings.image_set(), task)
    first, second = drawn[:2]
    assert drawn[2:] == [first, second]
    assert len({*first, *second}) == 4


def test_freezing_ends_with_the_block_and_never_thaws_what_was_frozen():
    network, _ = trainings.build(trainings.MAE)

    def frozen() -> set[str]:
        return {
            name for name, parameter in network.named_parameters() if not parameter.requires_grad
        }

    always_frozen = frozen()
    assert always_frozen == {"head.blocks.pos_embed"}
    names = {name for name, _ in network.named_parameters()}
    head = {name for name in names if name.startswith("head.")}
    with training_only(network, ("head",)):
        assert names - frozen() == head - always_frozen
    assert frozen() == always_frozen
