"""Every policy against batch normalisation written out, with statistics chosen by hand."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

from tests.helpers import networks
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.inner_loop import over_images
from tttlab.adaptation.normalisation import (
    natural_variation,
    normalised,
    target_moments,
    transport,
)
from tttlab.config.inner_loop import InnerLoop, Normalisation
from tttlab.methods.none import NoAdaptation
from tttlab.networks.network import evaluating
from tttlab.networks.source_statistics import LayerMoments, layer_statistics
from tttlab.networks.taps import Moments, batch_moments, batch_norm_layers, record


class OneLayer(nn.Module):
    """A network with a BatchNorm layer in its encoder, and no other layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.norm = nn.BatchNorm2d(3)
        generator = torch.Generator().manual_seed(0)
        lowest = {"weight": 0.5, "bias": -1.0, "running_mean": -0.5, "running_var": 0.5}
        for name, low in lowest.items():
            values = low + torch.rand(3, generator=generator, dtype=torch.float64)
            getattr(self.encoder.norm, name).data = values

    def forward(self, images):
        return self.encoder.norm(images)


@pytest.fixture
def layer():
    return OneLayer().eval()


@pytest.fixture
def image():
    generator = torch.Generator().manual_seed(1)
    return 1 + 2 * torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=generator)


def batch_norm(image, mean, variance, norm):
    shape = (1, -1, 1, 1)
    scaled = (image - mean.view(shape)) / variance.view(shape).sqrt()
    return scaled * norm.weight.view(shape) + norm.bias.view(shape)


def apply(layer, image, policy, statistics=None):
    with normalised(layer, policy, statistics or {}), torch.no_grad():
        return layer(image)


def test_source_uses_the_running_statistics(layer, image):
    norm = layer.encoder.norm
    assert torch.equal(apply(layer, image, Normalisation("source")), layer(image))
    expected = batch_norm(image, norm.running_mean, norm.running_var + norm.eps, norm)
    torch.testing.assert_close(layer(image), expected)


def test_image_is_batch_norm_in_training_mode_on_one_image(layer, image):
    norm, result = layer.encoder.norm, apply(layer, image, Normalisation("image"))
    expected = nn.functional.batch_norm(image, None, None, norm.weight, norm.bias, True, 0.0, 1e-5)
    torch.testing.assert_close(result, expected)


@pytest.fixture
def faint(layer):
    """An image of variance 4e-4, and in the layer the epsilon of timm's ``tf_efficientnet_*``."""
    layer.encoder.norm.eps = 1e-3
    noise = torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean, std = noise.mean((2, 3), keepdim=True), noise.std((2, 3), correction=0, keepdim=True)
    return 0.02 * ((noise - mean) / std) + 0.5


def test_an_images_variance_has_the_layers_own_epsilon(layer, faint):
    """Against PyTorch's own layer in training mode on this one image."""
    norm = copy.deepcopy(layer.encoder.norm).train()
    for policy in (Normalisation("image"), Normalisation("mixed", prior=1.0)):
        result = apply(layer, faint, policy)
        torch.testing.assert_close(result, norm(faint).detach(), rtol=1e-9, atol=1e-9)


def test_shrinking_has_the_layers_own_epsilon(layer, faint):
    """It shifts the running log-variance by the deviation from source images of variance 1e-3."""
    norm, ratio = layer.encoder.norm, (4e-4 + 1e-3) / (1e-3 + 1e-3)
    statistics = dict.fromkeys(("mean_center", "mean_scale"), torch.full((3,), 0.5).double())
    statistics |= {"log_variance_center": torch.full((3,), math.log(1e-3 + 1e-3)).double()}
    statistics |= {"log_variance_scale": torch.full((3,), 1e-4).double()}
    statistics = {f"encoder.norm.input.{name}": value for name, value in statistics.items()}
    variance = (norm.running_var + 1e-3) * ratio ** (1 - 1 / (math.log(ratio) / 1e-4) ** 2)
    result = apply(layer, faint, Normalisation("shrink"), statistics)
    expected = batch_norm(faint, norm.running_mean, variance, norm)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_source_statistics_of_a_batch_norm_layers_input_have_its_epsilon_and_others_the_usual():
    network = copy.deepcopy(networks.source_statistics("resnet")[0])
    images = networks.images(9, seed=11).double()
    names = ["encoder.layer2.0.bn1", "encoder.layer2.0.bn1.input", "encoder.layer2"]
    network.encoder.layer2[0].bn1.eps = 1e-3
    statistics = layer_statistics(network, [images[:4], images[4:]], names)
    with record(network, names) as activations, torch.no_grad():
        network.eval()(images)
    for name, floor in zip(names, (1e-5, 1e-3, 1e-5), strict=True):
        variances = activations[name].flatten(2).var(2, correction=0)
        expected = (variances + floor).log().mean(0)
        torch.testing.assert_close(statistics[f"{name}.log_variance_center"], expected)


@pytest.mark.parametrize("prior", [0.0, 0.3, 1.0])
def test_mixed_is_the_weighted_mean_of_both_statistics(layer, image, prior):
    norm = layer.encoder.norm
    mean = (1 - prior) * norm.running_mean + prior * image.mean((0, 2, 3))
    of_image = image.var((0, 2, 3), correction=0) + 1e-5
    variance = (1 - prior) * (norm.running_var + 1e-5) + prior * of_image
    result = apply(layer, image, Normalisation("mixed", prior=prior))
    torch.testing.assert_close(result, batch_norm(image, mean, variance, norm))


def test_shrink_is_james_steins_positive_part(layer, image):
    norm = layer.encoder.norm
    center = Moments(torch.tensor([0.0, 0.5, 1.0]).double(), torch.tensor([0.1, 0.2, 0.3]).double())
    scale = Moments(torch.tensor([0.5, 0.4, 0.3]).double(), torch.tensor([0.9, 0.6, 0.3]).double())
    statistics = {
        f"encoder.norm.input.{name}_{part}": value
        for part, moments in (("center", center), ("scale", scale))
        for name, value in zip(("mean", "log_variance"), moments, strict=True)
    }
    moments = Moments(image.mean((0, 2, 3)), (image.var((0, 2, 3), correction=0) + 1e-5).log())
    factors = []
    for m, c, s in zip(moments, center, scale, strict=True):
        distance = sum(((m[k] - c[k]) / s[k]) ** 2 for k in range(3)) / 3
        factors.append(max(0.0, 1 - 1.5 / float(distance)))
    assert all(0 < factor < 1 for factor in factors)
    mean = norm.running_mean + factors[0] * (moments.mean - center.mean)
    deviation = moments.log_variance - center.log_variance
    log_variance = (norm.running_var + norm.eps).log() + factors[1] * deviation
    result = apply(layer, image, Normalisation("shrink", threshold=1.5), statistics)
    torch.testing.assert_close(result, batch_norm(image, mean, log_variance.exp(), norm))


def test_shrink_leaves_a_typical_source_image_alone():
    typical = Moments(torch.zeros(4), torch.zeros(4))
    policy, ones = Normalisation("shrink"), Moments(torch.ones(4), torch.ones(4))
    near = Moments(torch.full((4,), 0.9), torch.full((4,), -0.9))
    assert not torch.cat(target_moments(policy, near, typical, typical, ones)).any()
    strange = Moments(torch.full((4,), 10.0), torch.zeros(4))
    far = target_moments(policy, strange, typical, typical, ones)
    torch.testing.assert_close(far.mean, torch.full((4,), 10 * (1 - 1 / 100)))


def test_shrink_leaves_alone_what_never_varies_between_source_images():
    typical, policy = Moments(torch.zeros(4), torch.zeros(4)), Normalisation("shrink")
    scale = Moments(torch.tensor([1.0, 2.0, 1.0, 0.0]), torch.zeros(4))
    strange = Moments(torch.tensor([10.0, 20.0, 10.0, 3.0]), torch.full((4,), 5.0))
    moved = target_moments(policy, strange, typical, typical, scale)
    expected = (1 - 1 / 100) * torch.tensor([10.0, 20.0, 10.0, 0.0])
    torch.testing.assert_close(moved.mean, expected)
    assert not moved.log_variance.any()


@pytest.mark.parametrize("average", [0, 4])
def test_a_stage_of_one_position_keeps_its_variance_whatever_views_are_averaged(average):
    """The variance of one image is zero there, always, and that of its views is not."""
    torch.manual_seed(0)
    options = {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16)}
    network = timm.create_model("resnet18", num_classes=3, **options).double().eval()
    images = networks.images(20, seed=3).double()
    statistics = layer_statistics(network, [images])
    scales = statistics["encoder.layer4.0.bn2.input.log_variance_scale"]
    assert scales.max() < 1e-6
    loop = InnerLoop(normalisation="shrink", threshold=1e6, average=average)
    plain = InnerLoop(average=average)
    shrunk, source = (
        adapt(network, images[:4], NoAdaptation(), settings, statistics=statistics).logits
        for settings in (loop, plain)
    )
    torch.testing.assert_close(shrunk, source)


def test_transport_to_the_own_moments_gives_the_source_moments():
    generator = torch.Generator().manual_seed(4)
    activation = 3 + torch.randn(1, 6, 5, dtype=torch.float64, generator=generator)
    source = Moments(torch.arange(5.0).double(), torch.linspace(-1, 1, 5).double())
    moved = transport(activation, Normalisation("image"), source, source, source)
    torch.testing.assert_close(moved.mean((0, 1)), source.mean)
    variance = moved.var((0, 1), correction=0)
    torch.testing.assert_close(variance, source.log_variance.exp(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
@pytest.mark.parametrize("policy", ["image", "mixed", "shrink"])
def test_images_are_normalised_one_by_one_under_vmap(kind, policy):
    network, statistics = networks.source_statistics(kind)
    images = networks.images(3, seed=5).double() + 0.5
    policy = Normalisation(policy)
    with evaluating(network), normalised(network, policy, statistics), torch.no_grad():
        together = over_images(lambda image: network(image[None]).logits[0])(images)
        alone = torch.cat([network(image[None]).logits for image in images])
    torch.testing.assert_close(together, alone)
    with torch.no_grad():
        assert not torch.allclose(together, network(images).logits)


@pytest.mark.parametrize("kind", ["vit", "groupnorm", "resnet"])
@pytest.mark.parametrize("policy", ["image", "mixed", "shrink"])
def test_a_batch_of_all_source_images_is_left_alone(kind, policy):
    """Their moments together are those of the source: nothing deviates, whatever the policy."""
    network, _ = networks.source_statistics(kind)
    images = networks.images(24, seed=5).double()
    images = (
        images * torch.linspace(0.5, 1.5, 24).double()[:, None, None, None]
    )  # unlike each other
    statistics, policy = layer_statistics(network, [images]), Normalisation(policy)
    with evaluating(network), torch.no_grad():
        source = network(images).logits
        with normalised(network, policy, statistics, batch_size=len(images)):
            whole = network(images).logits
            alone = over_images(lambda image: network(image[None]).logits[0])(images)
        with normalised(network, policy, statistics):
            one_by_one = over_images(lambda image: network(image[None]).logits[0])(images)
    if kind == "resnet" and policy.normalisation != "shrink":
        # BatchNorm's source moments are its running ones, which these images need not have.
        assert not torch.allclose(whole, source)
    else:
        torch.testing.assert_close(whole, source, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(alone, one_by_one)  # under vmap an image is an image


@pytest.mark.parametrize("kind", ["vit", "groupnorm", "resnet"])
@pytest.mark.parametrize("policy", ["image", "mixed", "shrink"])
def test_a_batch_of_one_image_is_that_image(kind, policy):
    network, statistics = networks.source_statistics(kind)
    image, policy = networks.images(1, seed=5).double() + 0.5, Normalisation(policy)
    with evaluating(network), torch.no_grad():
        with normalised(network, policy, statistics, batch_size=1):
            as_batch = network(image).logits
        with normalised(network, policy, statistics):
            alone = network(image).logits
        assert not torch.allclose(alone, network(image).logits)
    torch.testing.assert_close(as_batch, alone)


def test_the_variance_within_a_batch_is_that_of_so_many_images():
    """Between n images drawn at random there is (1 - 1/n) of the variance between all."""
    generator = torch.Generator().manual_seed(3)
    means = 2 * torch.randn(400, 1, 1, 1, dtype=torch.float64, generator=generator)
    shape = 400, 1, 16, 16
    images = means + torch.randn(*shape, dtype=torch.float64, generator=generator)
    total = LayerMoments()
    total.add(batch_moments(images, 0.0, len(images)))
    statistics = {f"encoder.{name}": value for name, value in total.summary().items()}
    for count in (2, 5, 50):
        center, _ = natural_variation(statistics, "encoder", None, count)
        draws = [torch.randperm(400, generator=generator)[:count] for _ in range(4000)]
        within = torch.stack([images[draw].var(correction=0) for draw in draws])
        error = within.std().item() / 4000**0.5
        assert center.log_variance.exp().item() == pytest.approx(
            within.mean().item(), abs=5 * error
        )


def test_source_statistics_of_the_running_estimate_agree_with_what_batch_norm_learnt():
    """After many passes over the same images, the mean of their means is the running mean."""
    network = networks.resnet().double()
    images = networks.images(32, seed=9).double()
    network.train()
    with torch.no_grad():
        for _ in range(300):
            network(images)
    statistics = layer_statistics(network, [images[:20], images[20:]])
    first = batch_norm_layers(network)[0]
    norm = network.get_submodule(first)
    pooled = statistics[f"{first}.input.pooled_mean"]
    torch.testing.assert_close(pooled, norm.running_mean, atol=1e-6, rtol=1e-5)
    count = len(images) * 16 * 16
    pooled = statistics[f"{first}.input.pooled_variance"] * count / (count - 1)
    torch.testing.assert_close(pooled, norm.running_var, atol=2e-5, rtol=1e-4)


def test_natural_variation_is_the_spread_between_source_images():
    network, _ = networks.source_statistics("resnet")
    images = networks.images(12, seed=11).double()
    statistics = layer_statistics(network, [images], ["encoder.layer2"])
    with record(network, ["encoder.layer2"]) as activations, torch.no_grad():
        network.eval()(images)
    means = activations["encoder.layer2"].mean((2, 3))
    torch.testing.assert_close(statistics["encoder.layer2.mean_center"], means.mean(0))
    torch.testing.assert_close(statistics["encoder.layer2.mean_scale"], means.std(0))
