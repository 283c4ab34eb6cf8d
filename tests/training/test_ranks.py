"""Several processes against one: the same batches, gradients, weights."""

import copy
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tests.helpers import networks, trainings
from tests.helpers.processes import on_ranks, start
from tttlab.errors import UserError
from tttlab.objectives.clust3 import ClusT3
from tttlab.objectives.mae import MAE
from tttlab.objectives.simclr import SimCLR
from tttlab.runtime.ranks import Alone, Share, open_fabric
from tttlab.runtime.resuming import Work
from tttlab.seeding import torch_generator
from tttlab.training.optimisers import Recipe
from tttlab.training.recipes import finetune, pretrain
from tttlab.training.trainer import synchronise_batchnorm

pytestmark = pytest.mark.slow

# With 22 images there are batches of 8, 7 and 7.
RECIPE = Recipe(epochs=2, batch_size=9, optimizer="sgd", lr=0.05, weight_decay=0.01)
GROUPNORM = trainings.SIMCLR | {
    "backbone_options": trainings.SIMCLR["backbone_options"]
    | {"channels": [8, 8, 8, 8], "norm_layer": "groupnorm1"}
}
ROTATION = GROUPNORM | {"objective": trainings.ROTATION["objective"]}
CLUST3 = GROUPNORM | {"objective": trainings.CLUST3["objective"]}
# Without dropout, whose noise differs between ranks; with a norm that only classification uses.
VIT = trainings.MAE | {
    "backbone_options": trainings.MAE["backbone_options"]
    | {"proj_drop_rate": 0.0, "fc_norm": True, "global_pool": "avg"}
}


@pytest.mark.parametrize(("whole", "ranks"), [(8, 2), (7, 2), (7, 3), (5, 4), (3, 3), (1, 1)])
def test_shares_hold_every_image_once_and_their_weights_make_the_whole_mean(whole, ranks):
    shares = [Share(whole, rank, ranks) for rank in range(ranks)]
    parts = [list(range(whole))[share.own] for share in shares]
    assert [image for part in parts for image in part] == list(range(whole))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    values = np.random.default_rng(0).normal(size=whole)
    means = [values[share.own].mean() * share.weight for share in shares]
    assert np.mean(means) == pytest.approx(values.mean())


def gradients_of_share(fabric, objective, network, views):
    share = Share(len(views), fabric.global_rank, fabric.world_size)
    model = fabric.setup_module(network)
    loss = objective.loss(model, views[share.own], torch_generator(5), share)
    fabric.backward(loss * share.weight)
    mean = fabric.all_reduce(loss.detach() * share.weight)
    return mean, {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.fixture
def double():
    """Networks and views in double precision, in this process and in those that it forks."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def strip(network: nn.Module) -> None:
    """Remove BatchNorm, which would see half a batch, from the projection head."""
    if hasattr(network.head, "project"):
        layers = network.head.layers.layers
        kept = [layer for layer in layers if not isinstance(layer, nn.BatchNorm1d)]
        network.head.layers.layers = nn.Sequential(*kept)


@pytest.mark.parametrize("kind", ["groupnorm", "vit", "clust3_vit"])
def test_loss_and_gradient_of_two_ranks_are_those_of_one_process(kind, tmp_path):
    """In double precision, with seven images, so that the ranks' parts differ in size."""
    network, _ = networks.source_statistics(kind)
    network = copy.deepcopy(network)
    strip(network)
    objective = {
        "groupnorm": SimCLR(temperature=0.3),
        "vit": MAE(mask_ratio=0.5),
        "clust3_vit": ClusT3(),
    }[kind]
    views = networks.images(14, seed=3).double().view(7, 2, 3, 16, 16)[:, : objective.num_views]
    expected = objective.loss(network, views, torch_generator(5))
    expected.backward()
    expected_gradients = {
        name: parameter.grad.clone()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
    network.zero_grad()
    assert any(gradient.abs().max() > 1e-4 for gradient in expected_gradients.values())
    for loss, gradients in on_ranks(gradients_of_share, tmp_path, objective, network, views):
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12)


def train(fabric, settings, recipe=RECIPE, folder=None, die_in=None):
    """Pretrain and fine-tune, jointly and in full; return curves and weights.

    ``die_in``: (task, epoch) in which the rank kills itself.
    """
    torch.set_num_threads(1)
    network, objective = trainings.build(settings)
    strip(network)

    def watch(task: str, row: dict) -> None:
        if die_in == (task, row["epoch"]):  # this epoch is computed, but not yet saved
            os.kill(os.getpid(), signal.SIGKILL)

    work = Work(folder, owner=fabric.is_global_zero).__enter__() if folder else None
    fabric.barrier()
    trainer = replace(trainings.trainer(work), fabric=fabric, report=watch)
    images, test = trainings.image_set(), trainings.image_set(9, seed=1)
    probe = (images, test)
    curves = [pretrain(trainer, network, objective, images, probe, trainings.VIEWS, recipe)]
    trainer = replace(trainer, work=None)  # both modes would save under the same name
    for mode in ("joint", "full"):
        curves += finetune(
            trainer,
            network,
            objective,
            images,
            test,
            recipe,
            mode=mode,
            augmentation=trainings.VIEWS,
            objective_augmentation=trainings.VIEWS,
        )
    return curves, network.state_dict()


def assert_close(left: tuple, right: tuple) -> None:
    """Compare curves and weights of trainings in double precision.

    Validation losses are measured in single precision.
    """
    for left_rows, right_rows in zip(left[0], right[0], strict=True):
        for row, expected in zip(left_rows, right_rows, strict=True):
            assert row.keys() == expected.keys()
            for key in row.keys() - {"seconds"}:
                tolerance = 1e-6 if key == "validation_loss" else 1e-9
                assert row[key] == pytest.approx(expected[key], rel=tolerance), key
    for name, value in right[1].items():
        torch.testing.assert_close(left[1][name], value, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    "settings", [GROUPNORM, VIT, ROTATION, CLUST3], ids=["simclr", "mae", "rotation", "clust3"]
)
def test_all_trainings_of_two_ranks_end_as_one_process_ends(
    settings, double, monkeypatch, tmp_path
):
    """Pretraining, joint and full fine-tuning, and the head's refit, with three steps of each.

    In so few steps rounding errors do not grow.
    """
    monkeypatch.setattr("tttlab.training.recipes.REFIT_EPOCHS", 1)
    recipe = replace(RECIPE, epochs=1)
    alone = train(open_fabric("cpu", "32"), settings, recipe)
    # Pretraining, joint fine-tuning without a refit, full fine-tuning with one.
    assert [len(rows) for rows in alone[0]] == [2, 2, 0, 2, 2]
    first, second = on_ranks(train, tmp_path, settings, recipe)
    assert_close(first, alone)
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_a_killed_rank_ends_the_training_which_then_goes_on_with_the_same_numbers(double, tmp_path):
    codes = start(train, tmp_path / "killed", VIT, RECIPE, tmp_path / "work", ("pretrain", 2))
    assert codes == [-signal.SIGKILL, 1]
    assert len(Work(tmp_path / "work").load("pretrain")["rows"]) == 2  # epochs 0 and 1
    resumed, _ = on_ranks(train, tmp_path / "resumed", VIT, RECIPE, tmp_path / "work")
    assert_close(resumed, train(open_fabric("cpu", "32"), VIT))


def train_apart(fabric, folder):
    """Give every rank different unfinished work, as without a shared file system."""
    network, objective = trainings.build(VIT)
    work, images = Work(folder / str(fabric.global_rank), owner=False), trainings.image_set()
    work.folder.mkdir()
    if fabric.global_rank:
        rows = [{"epoch": 0}, {"epoch": 1}]
        state = {"network": network.state_dict(), "optimizer": {}, "rows": rows}
        work.save("pretrain", state)
    trainer = replace(trainings.trainer(work), fabric=fabric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "load_state_dict", lambda optimizer, state: None)
        with pytest.raises(UserError) as caught:
            pretrain(trainer, network, objective, images, (images, images), trainings.VIEWS, RECIPE)
    return str(caught.value)


def test_ranks_that_find_different_work_all_refuse_to_start(tmp_path):
    messages = on_ranks(train_apart, tmp_path / "run", tmp_path)
    assert "found other work on 1 of them; use a file system that all machines share" in messages[0]
    assert messages[0] == messages[1]


def test_batchnorm_on_cpus_is_warned_of_once_for_each_task(tmp_path):
    first, second = on_ranks(train_with_batchnorm, tmp_path)
    (messages, weights), (second_messages, second_weights) = first, second
    assert (len(messages), len(second_messages)) == (3, 0)
    assert messages[0].startswith(
        "pretrain: on CPUs each of the 2 processes normalises (BatchNorm) with its own images"
    )
    assert second_weights.keys() == weights.keys()
    parameters = [name for name in weights if "running" not in name and "tracked" not in name]
    assert all(torch.equal(weights[name], second_weights[name]) for name in parameters)


def train_with_batchnorm(fabric):
    messages = []

    def warn(text: str, *values: object) -> None:
        messages.append(text % values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tttlab.training.trainer.logger.warning", warn)
        _, weights = train(fabric, trainings.SIMCLR)
    return messages, weights


# One has plain BatchNorm, the other timm's with an activation.
@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_synchronised_batchnorm_keeps_names_and_predictions(backbone):
    network = timm.create_model(backbone, num_classes=3).eval()
    images, names = networks.images(2), list(network.state_dict())
    expected = network(images)
    for _ in range(2):  # once for every task
        synchronise_batchnorm(network)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in network.modules()) > 10
    assert list(network.state_dict()) == names
    torch.testing.assert_close(network(images), expected)


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"machine\.device"):
        open_fabric("cuda:99")
    assert isinstance(open_fabric("cpu", "auto"), Alone)  # which computes in float32
    assert open_fabric("cpu", "bf16")._precision.precision == "bf16-mixed"


def test_more_gpus_than_there_are_is_a_mistake(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"machine\.devices: expected at most 2 processes.*found 3"):
        open_fabric("cuda", devices=3)
    with pytest.raises(
        UserError,
        match="expected at most 1 processes, "
        r"one for each GPU of machine\.device 'cuda:1', found 2",
    ):
        open_fabric("cuda:1", devices=2)
