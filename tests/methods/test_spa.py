"""SPA: what the poorer views lack, and what is learnt from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers import networks
from tttlab.data.deteriorating import faded, white_noise, without_low_frequencies
from tttlab.methods.spa import SPA
from tttlab.networks.network import Bound
from tttlab.seeding import torch_generator


def streams(count: int):
    return [torch_generator(0, "views", number) for number in range(count)]


def images(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.rand(count, 3, height, width, generator=generator).double()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (30, 21)])
def test_only_low_frequencies_are_hidden_and_each_wholly(height, width):
    """Against the full spectrum: a frequency is there or gone, together with its mirror image."""
    whole = images(40, height, width)
    hidden = without_low_frequencies(whole, streams(40), 0.3)
    before, after = (np.fft.fft2(each.numpy()) for each in (whole, hidden))
    ratio = after / before
    np.testing.assert_allclose(ratio.imag, 0, atol=1e-9)
    is_low = (np.abs(np.fft.fftfreq(height) * height) <= round(0.1 * height))[:, None] & (
        np.abs(np.fft.fftfreq(width) * width) <= round(0.1 * width)
    )
    np.testing.assert_allclose(ratio.real[:, :, ~is_low], 1, atol=1e-9)
    low = ratio.real[:, :, is_low]
    assert np.minimum(np.abs(low), np.abs(low - 1)).max() < 1e-9
    assert 0.25 < 1 - low.mean() < 0.35
    zero = ratio.real[:, :, 0, 0]
    assert 0 < zero.mean() < 1


def test_nothing_is_hidden_and_nothing_fades_at_share_zero():
    whole = images(3)
    for view in (
        without_low_frequencies(whole, streams(3), 0.0),
        faded(whole, streams(3), 0.0, 0.5),
    ):
        torch.testing.assert_close(view, whole)


def test_a_faded_image_is_its_share_and_noise_about_its_mean_colour():
    whole = images(64)
    noise = (faded(whole, streams(64), 0.4, 0.5) - 0.6 * whole) / 0.4
    means = whole.mean((-2, -1))
    assert (noise.mean((-2, -1)) - means).abs().max() < 5 * 0.5 / 32
    assert noise.std((-2, -1)).mean().item() == pytest.approx(0.5, rel=0.02)


def test_noise_is_white_other_in_every_image_and_an_images_own():
    whole = images(200)
    noise = white_noise(whole, streams(200))
    power = torch.fft.rfft2(noise, norm="ortho").abs().square().mean((0, 1))
    assert power.min() > 0.5
    assert power.max() < 1.6
    together = noise[:20].flatten(1)
    alike = (together @ together.T / together.shape[1]).fill_diagonal_(0).abs()
    assert alike.max() < 0.2
    torch.testing.assert_close(white_noise(whole[5:6], streams(200)[5:6]), noise[5:6])


def test_the_loss_is_the_divergence_from_the_images_own_prediction_where_it_is_surer():
    network, _ = networks.source_statistics("groupnorm", torch.float64)
    method = SPA()
    shown = networks.images(6, seed=2).double()
    views = method.views(network, shown, streams(6))
    kinds = set()
    for view in views:
        logits = network(view).logits
        target, poorer = logits[0], logits[1:]
        expected = 0.0
        for other in poorer:
            less_sure = bool(other.softmax(-1).max() < target.softmax(-1).max())
            kinds.add(less_sure)
            if less_sure:
                expected = expected + torch.distributions.kl_divergence(
                    torch.distributions.Categorical(logits=target),
                    torch.distributions.Categorical(logits=other),
                )
        loss, _ = method.loss(Bound(network, {}), view, {}, ())
        torch.testing.assert_close(loss, torch.as_tensor(expected, dtype=torch.float64))
        every, _ = replace(method, selective=False).loss(Bound(network, {}), view, {}, ())
        assert every >= loss
    assert kinds == {True, False}


def test_the_target_is_held_fixed():
    """The gradient is that of the views' own predictions alone."""
    network, _ = networks.source_statistics("groupnorm", torch.float64)
    view = SPA().views(network, networks.images(1, seed=2).double(), streams(1))[0]
    weight = network.classifier.weight.detach().clone().requires_grad_()
    net = Bound(network, {"classifier.weight": weight})
    (found,) = torch.autograd.grad(SPA().loss(net, view, {}, ())[0], weight)
    outputs = network(view)
    target = outputs.logits[0].softmax(-1).detach()
    probabilities = outputs.logits[1:].softmax(-1).detach()
    less_sure = (probabilities.amax(-1) < target.amax()).double()
    expected = ((probabilities - target) * less_sure[:, None]).T @ outputs.features[1:].detach()
    torch.testing.assert_close(found, expected)
