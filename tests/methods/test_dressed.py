"""Dressed: whose statistics normalise, what the steps are taken along, and what is measured."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.helpers import networks
from tttlab.adaptation.adapter import adapt
from tttlab.config.inner_loop import Augmentation, InnerLoop
from tttlab.data.dressing import appearance
from tttlab.errors import UserError
from tttlab.methods.dressed import Dressed
from tttlab.methods.none import NoAdaptation
from tttlab.networks.network import Bound
from tttlab.seeding import torch_generator

STILL = InnerLoop(steps=0)


def measured(kind: str, method: Dressed):
    """Give a network in double precision with what the method measures, and 40 source images."""
    network, _ = networks.source_statistics(kind, torch.float64)
    images = networks.images(40, seed=7).double()
    return network, method.source_statistics(network, [images[:25], images[25:]]), images


def test_what_is_natural_is_measured_on_all_source_images():
    method = Dressed(num_images=4, bank=10)
    network, statistics, images = measured("resnet", method)
    for name, values in appearance(images)._asdict().items():
        for of, expected in (("center", values.mean(0)), ("scale", values.std(0))):
            torch.testing.assert_close(statistics[f"dressing.{name}_{of}"], expected)
    bank = statistics["dressing.images"]
    assert len(bank) == 10
    assert all((image == images).flatten(1).all(1).any() for image in bank)
    torch.testing.assert_close(
        statistics["dressing.probabilities"], network(bank).logits.softmax(-1).detach()
    )
    assert statistics["dressing.range"].tolist() == [bank.min(), bank.max()]


def test_one_source_image_is_told_to_be_too_few():
    network, _ = networks.source_statistics("resnet", torch.float64)
    with pytest.raises(UserError, match="expected at least two source images, found 1"):
        Dressed().source_statistics(network, [networks.images(1, seed=7).double()])


@pytest.mark.parametrize("tolerance", [0.0, 1e9])
def test_an_image_is_normalised_by_the_dressed_images(tolerance):
    """Against BatchNorm's own training mode on them, whose variance is the unbiased one."""
    method = Dressed(num_images=6, bank=10, tolerance=tolerance)
    network, statistics, _ = measured("resnet", method)
    image = (networks.images(1, seed=3) * 0.3 + 0.6).double()
    found = adapt(network, image, method, STILL, statistics=statistics, image_ids=["a"])
    generators = [torch_generator(0, "views", "a", 0)]
    views = {name: part[0] for name, part in method.views(network, image, generators).items()}
    images, _ = method.dress(views, statistics)
    slow = copy.deepcopy(network)
    layers = [layer for layer in slow.modules() if isinstance(layer, nn.BatchNorm2d)]
    counts = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _layer, inputs: counts.append(inputs[0].numel() / inputs[0].shape[1])
        )
        for layer in layers
    ]
    for layer in layers:
        layer.momentum = 1.0
    slow.train()
    slow(images)
    slow.eval()
    for layer, handle, count in zip(layers, handles, counts, strict=True):
        layer.running_var *= (count - 1) / count
        handle.remove()
    torch.testing.assert_close(found.logits, slow(image).logits.detach(), atol=1e-8, rtol=1e-8)
    assert (found.logits - found.source_logits).abs().max() > 1e-3


def test_a_share_of_one_is_the_images_own_statistics():
    method = Dressed(num_images=6, bank=10, share=1.0)
    network, statistics, _ = measured("resnet", method)
    images = (networks.images(3, seed=3) * 0.3 + 0.6).double()
    found = adapt(network, images, method, STILL, statistics=statistics)
    own = adapt(network, images, NoAdaptation(), InnerLoop(steps=0, normalisation="image"))
    torch.testing.assert_close(found.logits, own.logits, atol=1e-9, rtol=1e-9)
    half = adapt(network, images, replace(method, share=0.5), STILL, statistics=statistics)
    none = adapt(network, images, replace(method, share=0.0), STILL, statistics=statistics)
    assert (half.logits - found.logits).abs().max() > 1e-3
    assert (half.logits - none.logits).abs().max() > 1e-3


def test_where_nothing_is_strange_there_is_nothing_to_learn():
    """Without BatchNorm the undressed images' predictions are the targets: loss and gain are 0."""
    method = Dressed(num_images=6, bank=10, tolerance=1e9)
    network, statistics, _ = measured("groupnorm", method)
    image = networks.images(2, seed=3).double()
    loop = InnerLoop(steps=2, lr=0.1)
    found = adapt(network, image, method, loop, statistics=statistics)
    torch.testing.assert_close(found.losses, torch.zeros_like(found.losses), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.logits, found.source_logits, atol=1e-9, rtol=1e-9)


def test_the_loss_is_the_divergence_from_what_is_said_of_the_undressed_images():
    method = Dressed(num_images=6, bank=10, tolerance=0.0)
    network, statistics, _ = measured("groupnorm", method)
    image = (networks.images(1, seed=3) * 0.3 + 0.6).double()
    views = method.views(network, image, [torch_generator(0, "views")])
    views = {name: part[0] for name, part in views.items()}
    images, targets = method.dress(views, statistics)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(targets),
        torch.distributions.Categorical(logits=network(images).logits),
    ).mean()
    loss, _ = method.loss(Bound(network, {}), views, statistics, ())
    torch.testing.assert_close(loss, expected)
    assert loss > 1e-4


@pytest.mark.parametrize(("start", "expected"), [(0.0, [0, 1, 2]), (0.95, [9, 0, 1])])
def test_the_images_follow_each_other_in_the_bank(start, expected):
    method = Dressed(num_images=3, bank=10, tolerance=1e9)
    _, statistics, _ = measured("resnet", method)
    views = {"looks": networks.images(1, seed=3).double()}
    views["start"] = torch.tensor([start]).double()
    views["noise"] = torch.zeros(3, *views["looks"].shape[1:]).double()
    images, targets = method.dress(views, statistics)
    torch.testing.assert_close(images, statistics["dressing.images"][expected])
    assert torch.equal(targets, statistics["dressing.probabilities"][expected])


def test_the_prediction_is_the_mean_over_views_of_the_image():
    """A view of strength zero is the image; with real ones the answer is another."""
    method = Dressed(num_images=6, bank=10)
    network, statistics, _ = measured("resnet", method)
    images = (networks.images(2, seed=3) * 0.3 + 0.6).double()
    still = Augmentation(min_scale=1.0, flip=False, jitter=0.0)
    found = {
        name: adapt(network, images, other, STILL, statistics=statistics).logits.softmax(-1)
        for name, other in {
            "none": method,
            "same": replace(method, num_views=3, augmentation=still),
            "views": replace(method, num_views=3, augmentation=Augmentation(flip=True)),
        }.items()
    }
    torch.testing.assert_close(found["same"], found["none"], atol=1e-9, rtol=1e-9)
    assert (found["views"] - found["none"]).abs().max() > 1e-4


def test_another_policy_of_normalisation_is_refused():
    method = Dressed(num_images=4, bank=10)
    network, statistics, images = measured("resnet", method)
    loop = InnerLoop(steps=1, normalisation="mixed")
    with pytest.raises(UserError, match="normalisation: mixed does not go with Dressed"):
        adapt(network, images[:2], method, loop, statistics=statistics)
