"""The TTT layers against autograd, a loop in NumPy, and what must hold of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap

from tests.mixers import inner_models
from tttlab.config.mixers import InnerTraining
from tttlab.errors import UserError
from tttlab.mixers.descent import (
    batch_of_step,
    centre,
    descend,
    losses_along,
    mean_losses,
    token_losses,
)
from tttlab.mixers.linear_attention import LinearAttention
from tttlab.mixers.ttt_conv import TTTConv
from tttlab.mixers.ttt_linear import TTTLinear
from tttlab.mixers.ttt_mlp import TTTMLP

IMAGES, HEADS, WIDTH, GRID = 3, 2, 4, (3, 5)
LENGTH = GRID[0] * GRID[1]
LAYERS = {
    "linear": lambda inner, grid=GRID: TTTLinear(HEADS, WIDTH, inner),
    "mlp": lambda inner, grid=GRID: TTTMLP(HEADS, WIDTH, inner),
    "conv": lambda inner, grid=GRID: TTTConv(HEADS, WIDTH, grid, inner),
}
IN_NUMPY = {
    "linear": inner_models.Linear(),
    "mlp": inner_models.MLP(),
    "conv": inner_models.Conv(*GRID),
}
BOTH = pytest.mark.parametrize("inner_norm", [True, False], ids=["norm", "plain"])
EACH = pytest.mark.parametrize("name", LAYERS)


def tokens(count: int = 3, length: int = LENGTH, images: int = IMAGES, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    shape = (images, HEADS, length, WIDTH)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def build(name: str, grid=GRID, **settings):
    """Make a layer in double precision, with weights that are large enough to matter."""
    layer = LAYERS[name](InnerTraining(**settings), grid).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in layer.parameters():
            value += 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return layer


def plain(**more) -> InnerTraining:
    """Leave out all that a linear map does not need to be linear attention."""
    given = {"learned_init": False, "inner_norm": False, "inner_bias": False}
    return InnerTraining(**given, scale_gradient=False, **more)


@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_one_step_from_zero_is_linear_attention(lr):
    """By an einsum over all pairs of tokens, and by the layer of that name."""
    keys, values, queries = tokens()
    outputs = TTTLinear(HEADS, WIDTH, plain(inner_lr=lr)).double()(keys, values, queries)
    pairs = torch.einsum("nhid,nhjd,nhje->nhie", queries, keys, values) / LENGTH
    torch.testing.assert_close(outputs, lr * pairs, rtol=1e-10, atol=1e-10)
    attention = LinearAttention("identity")(keys, values, queries)
    torch.testing.assert_close(attention, pairs, rtol=1e-10, atol=1e-10)


def test_with_positive_features_linear_attention_is_a_mean_of_the_values():
    keys, values, queries = (part.numpy() for part in tokens())
    outputs = LinearAttention("elu")(*map(torch.from_numpy, (keys, values, queries))).numpy()
    keys, queries = (np.where(part > 0, part + 1, np.exp(part)) for part in (keys, queries))
    for image, head, place in np.ndindex(IMAGES, HEADS, LENGTH):
        weights = keys[image, head] @ queries[image, head, place]
        assert weights.min() > 0
        expected = np.average(values[image, head], axis=0, weights=weights)
        np.testing.assert_allclose(outputs[image, head, place], expected, rtol=1e-10)


@EACH
@BOTH
@pytest.mark.parametrize("inner_bias", [True, False])
@pytest.mark.parametrize("batch", [slice(0, LENGTH), slice(4, 9)], ids=["all", "some"])
def test_gradients_written_by_hand_are_those_of_autograd(name, inner_norm, inner_bias, batch):
    layer = build(name, inner_norm=inner_norm, inner_bias=inner_bias)
    keys, targets, _ = tokens()
    if inner_norm:
        targets = centre(targets)
    weights = {
        key: value.detach().expand(IMAGES, *value.shape) for key, value in layer.initial().items()
    }

    def loss(weights):
        outputs = layer.model(weights, keys)[..., batch, :]
        return token_losses(outputs, targets[..., batch, :], inner_norm).sum()

    expected = grad(loss)(weights)
    found = layer.gradients(layer.initial(), keys, targets, batch)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.abs().max() > 1e-2
        torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", [True, False])
def test_the_loss_is_half_the_squared_distance_of_what_is_normalised(norm):
    layer = build("linear", inner_norm=norm)
    keys, targets, _ = (part.numpy() for part in tokens())
    weights = {key: value.detach().numpy() for key, value in layer.initial().items()}
    found = mean_losses(layer, layer.initial(), *map(torch.from_numpy, (keys, targets)))
    for image, head in np.ndindex(IMAGES, HEADS):
        outputs = keys[image, head] @ weights["weight"][head] + weights["bias"][head]
        if norm:
            deviations = np.sqrt(outputs.var(1, keepdims=True) + inner_models.EPSILON)
            outputs = (outputs - outputs.mean(1, keepdims=True)) / deviations
        expected = ((outputs - targets[image, head]) ** 2).sum(1).mean() / 2
        assert found[image, head].item() == pytest.approx(expected, rel=1e-10)


# 15 tokens in batches of 4: the last has three, and the fifth step begins anew.
SCHEDULES = {
    "one step": ({}, [range(LENGTH)]),
    "three steps": ({"inner_steps": 3, "inner_lr": 0.4}, 3 * [range(LENGTH)]),
    "batches": (
        {"inner_steps": 5, "inner_batch": 4, "inner_lr": 0.4},
        [range(4), range(4, 8), range(8, 12), range(12, 15), range(4)],
    ),
    "plain gradient": (
        {"inner_steps": 2, "inner_lr": 0.05, "scale_gradient": False},
        2 * [range(LENGTH)],
    ),
}


@EACH
@BOTH
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_answers_are_those_of_a_loop_in_numpy(name, inner_norm, schedule):
    settings, batches = SCHEDULES[schedule]
    layer = build(name, inner_norm=inner_norm, **settings)
    keys, targets, queries = tokens()
    start = {key: value.detach().numpy() for key, value in layer.initial().items()}

    def answer(image: int, head: int) -> np.ndarray:
        return inner_models.answers(
            IN_NUMPY[name],
            {key: value[head] for key, value in start.items()},
            *(part[image, head].numpy() for part in (keys, targets, queries)),
            norm=inner_norm,
            lr=layer.inner.inner_lr,
            batches=[list(batch) for batch in batches],
            scaled=layer.inner.scale_gradient,
        )

    expected = inner_models.of_every_head(answer, tuple(keys.shape))
    found = layer(keys, targets, queries).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    untrained = layer.model(layer.initial(), queries).detach().numpy()
    assert np.abs(found - untrained).max() > 1e-2


def test_batches_go_through_the_tokens_in_order_and_begin_anew():
    batches = [batch_of_step(step, 10, 4) for step in range(4)]
    assert batches == [slice(0, 4), slice(4, 8), slice(8, 10), slice(0, 4)]
    assert batch_of_step(3, 10, None) == batch_of_step(3, 10, 10) == slice(0, 10)
    assert batch_of_step(3, 10, 12) == slice(0, 10)


@pytest.mark.parametrize("name", ["linear", "mlp", "elu", "identity"])
def test_a_permutation_of_the_tokens_permutes_the_answers(name):
    layer = LinearAttention(name) if name in ("elu", "identity") else build(name, inner_steps=2)
    parts = tokens()
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(5))
    permuted = layer(*(part[..., order, :] for part in parts))
    expected = layer(*parts)[..., order, :]
    torch.testing.assert_close(permuted, expected, rtol=1e-10, atol=1e-10)


def test_the_convolution_knows_the_places_of_its_tokens():
    layer, parts = build("conv"), tokens()
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(5))
    permuted = layer(*(part[..., order, :] for part in parts))
    assert (permuted - layer(*parts)[..., order, :]).abs().max() > 1e-2


@EACH
@BOTH
def test_the_outer_gradients_are_those_of_finite_differences(name, inner_norm):
    """By tokens and initial weights, through two inner steps; and once more through these."""
    grid = (2, 2)
    layer = build(name, grid, inner_norm=inner_norm, inner_steps=2, inner_batch=3)
    parts = [part.requires_grad_() for part in tokens(length=4, images=1)]
    names = [key for key, _ in layer.named_parameters()]

    def outputs(keys, targets, queries, *values):
        weights = dict(zip(names, values, strict=True))
        return functional_call(layer, weights, (keys, targets, queries))

    inputs = (*parts, *layer.parameters())
    assert torch.autograd.gradcheck(outputs, inputs, atol=1e-6)
    assert torch.autograd.gradgradcheck(outputs, inputs, atol=1e-5, fast_mode=True)


def test_a_gradient_of_zero_has_finite_outer_gradients():
    """Its norm has no derivative there."""
    layer = build("linear", learned_init=False, inner_norm=False)
    parts = [torch.zeros_like(part).requires_grad_() for part in tokens()]
    gradients = torch.autograd.grad(layer(*parts).sum(), parts, materialize_grads=True)
    assert all(value.isfinite().all() for value in gradients)


@EACH
def test_images_with_weights_of_their_own_together_are_as_one_at_a_time(name):
    layer = build(name, inner_steps=2, inner_batch=8)
    views = [part.unflatten(0, (IMAGES, 2)) for part in tokens(images=2 * IMAGES)]
    generator = torch.Generator().manual_seed(3)
    own = {
        key: value.detach() + 0.1 * torch.randn((IMAGES, *value.shape), generator=generator)
        for key, value in layer.named_parameters()
    }

    def loss(weights, *parts):
        return functional_call(layer, weights, parts).square().sum()

    together = vmap(grad(loss))(own, *views)
    for image in range(IMAGES):
        weights = {key: value[image].clone().requires_grad_() for key, value in own.items()}
        alone = loss(weights, *(part[image] for part in views))
        gradients = torch.autograd.grad(alone, list(weights.values()))
        for key, expected in zip(weights, gradients, strict=True):
            torch.testing.assert_close(together[key][image], expected, rtol=1e-9, atol=1e-9)


@EACH
def test_images_do_not_meet(name):
    layer, parts = build(name, inner_steps=2), tokens()
    alone = torch.cat([layer(*(part[row : row + 1] for part in parts)) for row in range(IMAGES)])
    torch.testing.assert_close(layer(*parts), alone, rtol=1e-10, atol=1e-10)


@EACH
def test_no_step_is_longer_than_the_learning_rate(name):
    """However large the targets are: so that the inner training is stable at 1."""
    layer = build(name, inner_norm=False)
    keys, targets, _ = tokens()
    for scale in (1e-6, 1.0, 1e6):
        moved = descend(layer, keys, targets * scale)
        change = torch.cat(
            [(moved[key] - value).flatten(2) for key, value in layer.initial().items()], dim=-1
        )
        lengths = change.norm(dim=-1)
        assert lengths.max() < 1
        assert lengths.min() > (0.999 if scale == 1e6 else 0.01)


@EACH
def test_losses_along_the_steps_are_those_of_shorter_trainings(name):
    layer = build(name, inner_lr=0.2)
    keys, targets, _ = tokens()
    losses = losses_along(layer, keys, targets, 3)
    assert losses.shape == (4, IMAGES, HEADS)
    for steps in range(1, 4):
        layer.inner = replace(layer.inner, inner_steps=steps)
        trained = descend(layer, keys, targets)
        torch.testing.assert_close(losses[steps], mean_losses(layer, trained, keys, targets))
    assert (losses[0] - mean_losses(layer, layer.initial(), keys, targets)).abs().max() == 0


def test_an_mlp_does_not_start_from_zero():
    with pytest.raises(UserError, match=r"^mixer\.learned_init: ttt_mlp needs true, .* false$"):
        TTTMLP(HEADS, WIDTH, InnerTraining(learned_init=False))


def test_the_convolution_needs_all_tokens():
    parts = [part[..., 1:, :] for part in tokens()]
    with pytest.raises(UserError, match="needs the whole grid of 3 × 5 patches, found 14 of them"):
        build("conv")(*parts)
