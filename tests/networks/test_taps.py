"""Moments against NumPy loops, and taps against a forward pass done by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import vmap

from tests.helpers import networks
from tttlab.errors import UserError
from tttlab.networks.taps import (
    VARIANCE_FLOOR,
    batch_moments,
    batch_norm_layers,
    image_moments,
    record,
    stage_layers,
)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.idle, self.pair = nn.Linear(3, 3), nn.Linear(3, 3), Pair()

    def forward(self, x):
        return self.pair(self.inner(x))[0]


def loop_moments(activation: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and log-variance per channel of (V, C, H, W), one number at a time."""
    means, logs = [], []
    for channel in range(activation.shape[1]):
        values = [float(v) for view in activation for v in view[channel].ravel()]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        means.append(mean)
        logs.append(np.log(variance + VARIANCE_FLOOR))
    return means, logs


@pytest.mark.parametrize("views", [1, 3])
def test_image_moments_equal_a_loop(views):
    activation = torch.randn(
        views, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    mean, log_variance = image_moments(activation)
    expected = loop_moments(activation.numpy())
    np.testing.assert_allclose(mean, expected[0], atol=1e-12)
    np.testing.assert_allclose(log_variance, expected[1], atol=1e-12)


def test_tokens_are_positions():
    tokens = torch.randn(2, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = loop_moments(tokens.transpose(1, 2)[..., None].numpy())
    np.testing.assert_allclose(image_moments(tokens).mean, expected[0], atol=1e-12)
    np.testing.assert_allclose(image_moments(tokens).log_variance, expected[1], atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (5, 7, 4)])
def test_the_batch_estimator_is_the_image_estimator_on_each_image(shape):
    activation = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    single_moments = vmap(lambda image: image_moments(image[None]))(activation)
    for batched, single in zip(batch_moments(activation), single_moments, strict=True):
        torch.testing.assert_close(batched, single, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("floor", [VARIANCE_FLOOR, 1e-3])
def test_a_constant_channel_has_the_floor_as_variance(floor):
    torch.testing.assert_close(
        image_moments(torch.ones(1, 2, 4, 4), floor).log_variance, torch.full((2,), floor).log()
    )
    torch.testing.assert_close(
        batch_moments(torch.ones(3, 5, 2), floor).log_variance, torch.full((3, 2), floor).log()
    )


def test_tokens_that_stand_below_each_other_are_the_positions_of_their_images():
    """LeViT flattens tokens so for its BatchNorm1d; a single row has no variance."""
    tokens = torch.randn(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(batch_moments(tokens.flatten(0, 1), count=3), batch_moments(tokens))
    torch.testing.assert_close(image_moments(tokens[0]), image_moments(tokens[:1]))
    features = batch_moments(tokens[:, 0])
    assert torch.equal(features.mean, tokens[:, 0])
    torch.testing.assert_close(
        features.log_variance, torch.full((3, 2), VARIANCE_FLOOR).double().log()
    )


def test_a_layer_that_is_not_reached_and_one_that_gives_no_tensor_are_named():
    network = Odd()
    with record(network, ["idle", "inner"]) as activations:
        network(torch.rand(2, 3))
    with pytest.raises(UserError, match="layer idle took no part in the forward pass"):
        activations["idle"]
    with (
        record(network, ["pair"]),
        pytest.raises(UserError, match="layer pair: expected one activation, found tuple"),
    ):
        network(torch.rand(2, 3))


def test_record_collects_inputs_and_outputs_and_leaves_no_hook():
    network, _ = networks.source_statistics("resnet")
    images = networks.images(2).double()
    layer = batch_norm_layers(network)[-1]
    with record(network, [layer, f"{layer}.input"]) as activations, torch.no_grad():
        network(images)
        by_hand = network.get_submodule(layer)(activations[f"{layer}.input"])
    torch.testing.assert_close(activations[layer], by_hand)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in network.modules()
    )


def test_layers_are_named_for_every_kind_of_backbone():
    resnet, vit = networks.source_statistics("resnet")[0], networks.source_statistics("vit")[0]
    assert stage_layers(vit) == ["encoder.blocks.0", "encoder.blocks.1"]
    assert stage_layers(resnet)[-1] == "encoder.layer4"
    assert batch_norm_layers(vit) == []
    assert "encoder.layer1.0.bn1" in batch_norm_layers(resnet)
    assert not any(name.startswith("head") for name in batch_norm_layers(resnet))


def test_layers_that_work_in_place_do_not_reach_what_was_recorded():
    network, _ = networks.source_statistics("resnet")
    images, names = networks.images(2).double(), ["encoder.bn1", "encoder.layer1.0.bn2"]
    inputs = [f"{name}.input" for name in names]
    with record(network, [*names, *inputs]) as activations, torch.no_grad():
        network(images)
    for name in names:
        norm = network.get_submodule(name)
        expected = torch.nn.functional.batch_norm(
            activations[f"{name}.input"],
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
        )
        torch.testing.assert_close(activations[name], expected)
        assert activations[name].min() < 0  # the in-place ReLU did not change the record
