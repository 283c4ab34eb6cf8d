"""Dressed: whose statistics normalise, what the steps are taken along, and what is measured."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.helpers import networks
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.moment_matching import matching_layers, moments_matched
from tttlab.config.inner_loop import Augmentation, InnerLoop
from tttlab.data.dressing import appearance
from tttlab.errors import UserError
from tttlab.methods.dressed import Dressed, undressed
from tttlab.networks.network import Bound
from tttlab.networks.taps import batch_norm_layers, image_moments, record
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


def matched_slowly(network, layer_of, images, undressed, looks):
    """The slow way: layer by layer, by BatchNorm's own formula with changed running statistics.

    What a layer makes of the dressed ``images`` should be what it makes of the undressed ones.
    """
    slow = copy.deepcopy(network)
    for name in layer_of:
        layer = slow.get_submodule(name)
        seen = []
        for network_of, batch in ((network, undressed), (slow, images)):
            handle = network_of.get_submodule(name).register_forward_pre_hook(
                lambda _layer, inputs, seen=seen: seen.append(inputs[0].transpose(0, 1).flatten(1))
            )
            network_of(batch)
            handle.remove()
        (wanted_var, wanted), (found_var, found) = (
            torch.var_mean(activation, 1, correction=0) for activation in seen
        )
        ratio = ((found_var + layer.eps) / (wanted_var + layer.eps)).sqrt()
        layer.running_mean += found - wanted + (ratio - 1) * (layer.running_mean - wanted)
        layer.running_var = (layer.running_var + layer.eps) * ratio**2 - layer.eps
    return slow(looks).logits


def test_what_dressing_did_to_activations_is_undone_in_the_test_images():
    method = Dressed(num_images=6, bank=10, tolerance=0.0)
    network, statistics, _ = measured("resnet", method)
    image = (networks.images(1, seed=3) * 0.3 + 0.6).double()
    found = adapt(network, image, method, STILL, statistics=statistics, image_ids=["a"])
    generators = [torch_generator(0, "views", "a", 0)]
    views = {name: part[0] for name, part in method.views(network, image, generators).items()}
    images, chosen = method.dress(views, statistics)
    undressed = statistics["dressing.images"][chosen]
    with torch.no_grad():
        slow = matched_slowly(network, batch_norm_layers(network), images, undressed, image)
    torch.testing.assert_close(found.logits, slow, atol=1e-8, rtol=1e-8)
    assert (found.logits - found.source_logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["resnet", "groupnorm", "vit"])
def test_where_nothing_was_done_nothing_is_undone(kind):
    """However few the images: they are compared with themselves."""
    method = Dressed(num_images=2, bank=10, tolerance=1e9)
    network, statistics, _ = measured(kind, method)
    images = (networks.images(3, seed=3) * 0.3 + 0.6).double()
    found = adapt(network, images, method, STILL, statistics=statistics)
    torch.testing.assert_close(found.logits, found.source_logits, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("kind", ["groupnorm", "vit"])
def test_without_batch_norm_stages_are_matched(kind):
    """After a stage the dressed images' moments are those of the undressed; the image follows."""
    method = Dressed(num_images=6, bank=10, tolerance=0.0)
    network, statistics, _ = measured(kind, method)
    image = (networks.images(1, seed=3) * 0.3 + 0.6).double()
    views = method.views(network, image, [torch_generator(0, "views", "a", 0)])
    images, chosen = method.dress({name: part[0] for name, part in views.items()}, statistics)
    layers = matching_layers(network)
    wanted = undressed(network, statistics, chosen)
    last = layers[-1]
    with (
        torch.no_grad(),
        moments_matched(network, wanted) as found,
        record(network, [last]) as seen,
    ):
        network(images)
    mean, log_variance = image_moments(seen[last])
    torch.testing.assert_close(mean, wanted[last].mean, atol=1e-8, rtol=1e-8)
    # The floor of the variances is moved with them.
    torch.testing.assert_close(log_variance, wanted[last].log_variance, atol=1e-3, rtol=0)
    assert (found[layers[0]].mean - wanted[layers[0]].mean).abs().max() > 1e-3
    result = adapt(network, image, method, STILL, statistics=statistics, image_ids=["a"])
    with torch.no_grad(), moments_matched(network, wanted, found):
        expected = network(image).logits
    torch.testing.assert_close(result.logits, expected, atol=1e-8, rtol=1e-8)
    assert (result.logits - result.source_logits).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["resnet", "groupnorm"])
def test_where_nothing_is_strange_there_is_nothing_to_learn(kind):
    method = Dressed(num_images=6, bank=10, tolerance=1e9)
    network, statistics, _ = measured(kind, method)
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
    images, chosen = method.dress(views, statistics)
    with moments_matched(network, undressed(network, statistics, chosen)):
        logits = network(images).logits
    targets = network(statistics["dressing.images"][chosen]).logits.softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(targets),
        torch.distributions.Categorical(logits=logits),
    ).mean()
    loss, _ = method.loss(Bound(network, {}), views, statistics, ())
    torch.testing.assert_close(loss, expected)
    assert loss > 1e-4


def test_dressed_images_stay_within_the_range_of_source_images():
    method = Dressed(num_images=6, bank=10, tolerance=0.0)
    network, statistics, _ = measured("resnet", method)
    bright = networks.images(1, seed=3).double() + 0.6
    views = method.views(network, bright, [torch_generator(0, "views")])
    images, _ = method.dress({name: part[0] for name, part in views.items()}, statistics)
    lowest, highest = statistics["dressing.range"]
    assert images.min() >= lowest
    assert images.max() == highest  # so it would lie beyond


@pytest.mark.parametrize(("start", "expected"), [(0.0, [0, 1, 2]), (0.95, [9, 0, 1])])
def test_the_images_follow_each_other_in_the_bank(start, expected):
    method = Dressed(num_images=3, bank=10, tolerance=1e9)
    _, statistics, _ = measured("resnet", method)
    views = {"looks": networks.images(1, seed=3).double()}
    views["start"] = torch.tensor([start]).double()
    views["noise"] = torch.zeros(3, *views["looks"].shape[1:]).double()
    images, chosen = method.dress(views, statistics)
    assert chosen.tolist() == expected
    torch.testing.assert_close(images, statistics["dressing.images"][expected])


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
