import math

import pytest
import torch

from tests.helpers import trainings
from tttlab.training.optimisers import Recipe, build_optimizer


def test_learning_rate_rises_linearly_and_falls_along_half_a_cosine():
    recipe = Recipe(epochs=10, lr=0.4, warmup_epochs=2)
    rates = [recipe.learning_rate(step, steps_per_epoch=5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.4 * (step + 1) / 10 for step in range(10)])
    assert rates[10:] == pytest.approx(
        [0.2 * (1 + math.cos(math.pi * step / 40)) for step in range(40)]
    )
    assert rates[-1] > 0


def test_warm_up_may_last_the_whole_training():
    recipe = Recipe(epochs=2, lr=1.0, warmup_epochs=2)
    assert [recipe.learning_rate(step, 2) for step in range(4)] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0]
    )


@pytest.mark.parametrize("settings", [trainings.SIMCLR, trainings.MAE], ids=["convnet", "vit"])
def test_only_weights_decay(settings):
    network, _ = trainings.build(settings)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = build_optimizer(network, Recipe(epochs=1, weight_decay=0.05)).param_groups
    by_decay = {0.0: set(), 0.05: set()}
    for group in groups:
        by_decay[group["weight_decay"]] |= {names[id(p)] for p in group["params"]}
    decayed, undecayed = by_decay[0.05], by_decay[0.0]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert decayed | undecayed == trained
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    assert decayed == {
        f"{name}.weight" for name, module in network.named_modules() if isinstance(module, kinds)
    }


def test_the_decay_rates_are_those_that_are_asked_for():
    network, _ = trainings.build(trainings.SIMCLR)
    groups = build_optimizer(network, Recipe(epochs=1), (0.9, 0.95)).param_groups
    assert {group["betas"] for group in groups} == {(0.9, 0.95)}


def test_frozen_parameters_get_no_optimiser_state():
    network, _ = trainings.build(trainings.SIMCLR)
    network.encoder.requires_grad_(False)
    groups = build_optimizer(network, Recipe(epochs=1, optimizer="sgd")).param_groups
    optimised = {id(parameter) for group in groups for parameter in group["params"]}
    assert not optimised & {id(parameter) for parameter in network.encoder.parameters()}
    assert {group["momentum"] for group in groups} == {0.9}
