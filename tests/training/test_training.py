import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers import trainings
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.inner_loop import Augmentation
from tttlab.data.pixels import as_images
from tttlab.networks.network import Network, add_probe
from tttlab.seeding import torch_generator
from tttlab.training.loaders import Changes, Views, open_loader
from tttlab.training.losses import joint_loss
from tttlab.training.optimisers import Recipe
from tttlab.training.probing import classification, encode, knn_accuracy
from tttlab.training.recipes import (
    betas,
    finetune,
    last_values,
    pretrain,
    refit_head,
    ssl_views,
)
from tttlab.training.trainer import Task, Trainer

RECIPE = Recipe(epochs=2, batch_size=8, lr=1e-2)
GENTLE = Augmentation(min_scale=0.8, flip=False, jitter=0.1)
EACH = pytest.mark.parametrize("settings", trainings.OF_EACH.values(), ids=trainings.OF_EACH)


def tune(network: Network, objective, mode: str, recipe: Recipe = RECIPE, **settings) -> tuple:
    return finetune(
        trainings.trainer(),
        network,
        objective,
        trainings.image_set(),
        trainings.image_set(9, 1),
        recipe,
        mode=mode,
        augmentation=trainings.VIEWS,
        objective_augmentation=trainings.VIEWS,
        **settings,
    )


def changed(network: Network, before: Network) -> set[str]:
    """Name the parts of a network with a parameter or buffer that differs."""
    state, old = network.state_dict(), before.state_dict()
    return {name.partition(".")[0] for name in state if not torch.equal(state[name], old[name])}


@pytest.mark.slow
def test_meta_learned_fine_tuning_takes_the_inner_step_and_trains_every_part():
    objective_losses = {}
    for lr in (0.0, 0.5):
        network, objective = trainings.build(trainings.OF_EACH["simsiam"])
        before, inner = copy.deepcopy(network), {"lr": lr, "steps": 1, "pairs": 2}
        (_, row, _), refit = tune(network, objective, "meta", inner=inner, objective_weight=0.1)
        assert changed(network, before) == {"encoder", "classifier", "head"}
        total = row["classification_loss"] + 0.1 * row["objective_loss"]
        assert row["loss"] == pytest.approx(total)
        assert not refit
        objective_losses[lr] = row["objective_loss"]
    # The objective is measured after a step on the same views.
    assert objective_losses[0.5] < objective_losses[0.0] - 0.01


def test_a_probe_reads_the_tokens_of_a_frozen_encoder():
    network, objective = trainings.build(trainings.MAE)
    add_probe(network, depth=2, heads=4, seed=0)
    before = copy.deepcopy(network)
    rows, _ = tune(network, objective, "linear", Recipe(epochs=8, batch_size=8, lr=1e-2))
    assert changed(network, before) == {"probe", "classifier", "head"}  # the decoder is refitted
    assert rows[-1]["loss"] < rows[1]["loss"] - 0.1
    images = as_images(torch.from_numpy(trainings.image_set(3).pixels))
    with torch.no_grad():
        tokens = network.encoder.forward_features(network.normalise(images))
        features = network.probe.norm(network.probe.blocks(tokens)).mean(1)
        torch.testing.assert_close(network(images).features, features)
        torch.testing.assert_close(network(images).logits, network.classifier(features))
    names = [name.partition(".")[0] for name in select_parameters(network, "encoder")]
    assert set(names) == {"encoder"}  # test-time training adapts only the encoder, as published


@EACH
def test_joint_gradient_is_the_sum_of_both(settings):
    network, objective = trainings.build(settings)
    network = network.double().train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    views = {"classify": Views(1, trainings.VIEWS), **ssl_views(objective, trainings.VIEWS)}
    batch = next(iter(open_loader(trainings.image_set(), views, 8, seed=0)))

    class Doubling:  # gives the network its images in double precision
        head = network.head

        def __call__(self, images: Tensor, **options):
            return network(images.double(), **options)

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        parameters = {
            name: parameter
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        }
        values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {
            name: value for name, value in zip(parameters, values, strict=True) if value is not None
        }

    logits = network(as_images(batch["classify"][:, 0]).double()).logits
    losses = [
        torch.logsumexp(row, 0) - row[label]
        for row, label in zip(logits, batch["labels"], strict=True)
    ]
    supervised = gradients(sum(losses) / len(losses))
    labels = {"labels": batch["labels"]} if objective.labels else {}
    objective_views = as_images(batch["objective"])
    self_supervised = gradients(
        objective.loss(Doubling(), objective_views, torch_generator(1), **labels)
    )
    terms = joint_loss(objective, 0.3)(Doubling(), batch, torch_generator(1))
    joint = gradients(terms["loss"])
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert joint.keys() == supervised.keys() | self_supervised.keys() == trained
    for name, gradient in joint.items():
        zero = torch.zeros_like(gradient)
        expected = supervised.get(name, zero) + 0.3 * self_supervised.get(name, zero)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    for parts in (supervised, self_supervised):
        assert any(parts[name].abs().max() > 0 for name in parts if name.startswith("encoder."))
    total = (terms["classification_loss"] + 0.3 * terms["objective_loss"]).item()
    assert terms["loss"].item() == pytest.approx(total)


@EACH
def test_each_mode_changes_its_own_parts_only(settings):
    network, objective = trainings.build(settings)
    # The linear mode leaves the encoder unchanged; both it and the full mode refit the head.
    for mode, parts in (
        ("linear", {"classifier", "head"}),
        ("full", {"encoder", "classifier", "head"}),
        ("joint", {"encoder", "classifier", "head"}),
    ):
        trained = copy.deepcopy(network)
        _, refit = tune(trained, objective, mode)
        assert changed(trained, network) == parts, mode
        assert bool(refit) == (mode != "joint")
        assert not trained.training


@EACH
def test_refitting_trains_the_head_alone(settings):
    network, objective = trainings.build(settings)
    before = copy.deepcopy(network)
    rows = refit_head(
        trainings.trainer(), network, objective, trainings.image_set(), GENTLE, RECIPE
    )
    assert changed(network, before) == {"head"}
    assert min(row["loss"] for row in rows[2:]) < rows[1]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(trainings.OF_EACH.keys() - {"it3"}))  # IT3 needs labels
def test_pretraining_trains_all_but_the_classifier_and_lowers_its_loss(name):
    network, objective = trainings.build(trainings.OF_EACH[name])
    before = copy.deepcopy(network)
    images = trainings.image_set()
    recipe = Recipe(epochs=14, batch_size=8, lr=1e-2)
    rows = pretrain(
        trainings.trainer(), network, objective, images, (images, images), GENTLE, recipe
    )
    assert changed(network, before) == {"encoder", "head"}
    first, last = (sum(row["loss"] for row in part) for part in (rows[1:4], rows[-3:]))
    # Random squares have no upright position: their turns can only be memorised.
    assert first - last > abs(first) * (0.05 if name == "rotation" else 0.1)
    assert [row["epoch"] for row in rows if "knn_accuracy" in row] == [0, 2, 4, 6, 8, 10, 12, 14]


def test_classes_that_colour_tells_are_learned():
    network, objective = trainings.build(trainings.MAE)
    rows, _ = tune(network, objective, "joint", Recipe(epochs=8, batch_size=8, lr=3e-3))
    assert last_values(rows)["validation_accuracy"] == 1.0


def test_a_network_without_objective_is_fine_tuned_and_has_no_head_to_refit():
    network, objective = trainings.build(trainings.SIMCLR | {"objective": {"name": "none"}})
    images = trainings.image_set()
    trainer, probe, recipe = trainings.trainer(), (images, images), Recipe(epochs=0)
    rows = pretrain(trainer, network, objective, images, probe, trainings.VIEWS, recipe)
    assert [row["epoch"] for row in rows] == [0]
    rows, refit = tune(network, objective, "full")
    assert (len(rows), refit) == (3, [])


def test_mae_views_are_not_jittered_and_its_second_average_forgets_faster():
    _, simclr = trainings.build(trainings.SIMCLR)
    _, mae = trainings.build(trainings.MAE)
    _, rotation = trainings.build(trainings.ROTATION)
    _, simsiam = trainings.build(trainings.SIMSIAM)
    assert ssl_views(mae, trainings.VIEWS)["objective"].augmentation.jitter == 0
    assert ssl_views(simclr, trainings.VIEWS)["objective"] == Views(2, trainings.VIEWS)
    assert ssl_views(simsiam, trainings.VIEWS)["objective"] == Views(2, trainings.VIEWS)
    assert ssl_views(rotation, trainings.VIEWS)["objective"] == Views(1, trainings.VIEWS)
    assert (betas(mae), betas(simclr), betas(None)) == ((0.9, 0.95), (0.9, 0.999), (0.9, 0.999))


@pytest.fixture
def fitted(monkeypatch) -> list[Task]:
    """What would be trained, in order; nothing is."""
    tasks = []
    monkeypatch.setattr(Trainer, "fit", lambda _self, _network, _images, task: tasks.append(task))
    return tasks


def test_each_training_gets_its_own_augmentation_and_decay_rates(fitted):
    network, objective = trainings.build(trainings.MAE)
    arguments = trainings.trainer(), network, objective, trainings.image_set()
    options = {"augmentation": GENTLE, "objective_augmentation": trainings.VIEWS}
    for mode in ("joint", "full"):
        finetune(*arguments, trainings.image_set(9, 1), RECIPE, mode=mode, **options)
    pretrain(*arguments, (trainings.image_set(),) * 2, trainings.VIEWS, RECIPE)
    joint, full, refit, pretraining = fitted
    assert joint.views["classify"] == full.views["classify"] == Views(1, GENTLE)
    for task in (joint, refit, pretraining):
        assert task.views["objective"] == ssl_views(objective, trainings.VIEWS)["objective"]
        assert task.betas == (0.9, 0.95)
    assert full.betas == (0.9, 0.999)


def test_changes_pairs_and_a_refit_without_warm_up(fitted):
    network, objective = trainings.build(trainings.SIMSIAM)
    recipe, changes = Recipe(epochs=9, batch_size=8, warmup_epochs=3), Changes(0.25, 0.5)
    inner = {"lr": 0.1, "steps": 1, "pairs": 3}
    for mode in ("full", "meta"):
        tune(network, objective, mode, recipe, inner=inner, changes=changes)
    full, refit, meta = fitted
    assert full.changes == meta.changes == changes
    assert (full.recipe, meta.recipe) == (recipe, recipe)
    assert refit.recipe == replace(recipe, epochs=5, warmup_epochs=0)
    assert meta.views["objective"] == Views(3 * objective.num_views, trainings.VIEWS)


def test_what_is_recorded_is_measured_on_the_images_that_it_says(fitted):
    network, objective = trainings.build(trainings.SIMCLR)
    images, held_out = trainings.image_set(), trainings.image_set(9, 1)
    tune(network, objective, "joint")
    pretrain(
        trainings.trainer(),
        network,
        objective,
        images,
        (images.take(range(4)), held_out),
        GENTLE,
        RECIPE,
    )
    finetuning, pretraining = fitted
    few, all_of_them, validation = (
        encode(network, each) for each in (images.take(range(4)), images, held_out)
    )
    assert finetuning.measure(1) == classification(validation) != classification(all_of_them)
    right, exchanged = knn_accuracy(few, validation), knn_accuracy(validation, few)
    assert pretraining.measure(2) == {"knn_accuracy": right}
    assert right != exchanged


def test_last_values_take_the_latest_of_each():
    rows = [
        {"epoch": 0, "knn": 0.1},
        {"epoch": 1, "loss": 3.0, "knn": 0.2, "seconds": 2.0},
        {"epoch": 2, "seconds": 3.0},
    ]
    assert last_values(rows) == {"epoch": 2, "knn": 0.2, "loss": 3.0, "seconds": 5.0}
