"""Building networks: stems, normalisation, and errors that say what to do."""

import pytest
import torch
from torch import nn

from tests.helpers import networks
from tttlab.errors import UserError
from tttlab.networks.building import build_encoder
from tttlab.networks.network import Bound, Network, evaluating, parameter_paths
from tttlab.networks.source_statistics import projection_bank

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 12]}


@pytest.mark.parametrize(("stem", "side"), [("small", 32), ("stride2", 16), ("original", 8)])
@pytest.mark.parametrize("deep", [{}, {"stem_type": "deep", "stem_width": 4}])
def test_the_stem_decides_the_resolution_of_the_first_stage(stem, side, deep):
    encoder = build_encoder("resnet18", 32, stem=stem, options=SMALL | deep).eval()
    shapes = {}
    encoder.layer1.register_forward_hook(
        lambda _module, inputs, _output: shapes.update(side=inputs[0].shape[-1])
    )
    with torch.no_grad():
        encoder(torch.zeros(1, 3, 32, 32))
    assert shapes["side"] == side
    assert isinstance(encoder.maxpool, nn.Identity) == (stem != "original")


def test_small_vision_transformers_take_four_pixel_patches():
    for options, num_patches in (({"depth": 1}, 64), ({"depth": 1, "patch_size": 8}, 16)):
        encoder = build_encoder("vit_tiny_patch16_224", 32, options=options)
        assert encoder.patch_embed.num_patches == num_patches


def test_the_bank_holds_the_projections_of_the_first_images():
    network, _ = networks.source_statistics("resnet")
    images = networks.images(20, seed=7).double()
    for batches in ([images], [images[:4], images[4:8], images[8:]]):
        bank = projection_bank(network, batches, 6)["bank"]
        with torch.no_grad():
            torch.testing.assert_close(bank, network(images[:6]).projections)


def test_the_networks_own_mean_and_deviation_are_applied_inside():
    network, _ = networks.source_statistics("resnet", torch.float32)
    assert network.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    images = networks.images(2)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        features = network.encoder((images - mean) / std)
        torch.testing.assert_close(network(images).features, features)
        torch.testing.assert_close(network(images).logits, network.classifier(features))


def test_bound_uses_the_given_parameters_and_leaves_the_networks_own():
    network, _ = networks.source_statistics("vit", torch.float32)
    images, bias = networks.images(2), network.classifier.bias.detach().clone()
    with torch.no_grad():
        moved = Bound(network, {"classifier.bias": bias + 1})(images).logits
        torch.testing.assert_close(moved, network(images).logits + 1)
    assert torch.equal(network.classifier.bias, bias)


def test_bound_tells_what_is_trained_and_what_the_source_has():
    network, _ = networks.source_statistics("vit", torch.float32)
    source = dict(network.named_parameters())
    net = Bound(network, {"classifier.bias": source["classifier.bias"].detach() + 1})
    assert list(net.trained) == ["classifier.bias"]
    assert net.source.keys() == source.keys()
    assert all(
        torch.equal(value, source[name]) and not value.requires_grad
        for name, value in net.source.items()
    )
    teacher = net.rebound({name: 0 * value for name, value in net.trained.items()})
    assert not teacher.trained["classifier.bias"].any()
    # The teacher is a copy: the bound network itself has not changed.
    assert torch.equal(net.trained["classifier.bias"], source["classifier.bias"] + 1)
    reset, images = net.rebound(net.source), networks.images(2)
    assert list(reset.trained) == ["classifier.bias"]
    with torch.no_grad():
        torch.testing.assert_close(reset(images).logits, network(images).logits, rtol=0, atol=0)
        torch.testing.assert_close(net(images).logits, network(images).logits + 1)
    assert not reset(images).logits.requires_grad


class Shared(nn.Module):
    """One layer under two names, and one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.again = self.first
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight

    def forward(self, x):
        return self.tied(self.again(self.first(x)))


def test_what_stands_in_several_places_is_replaced_in_all_and_put_back_into_all():
    module, x = Shared(), torch.rand(2, 4)
    before = list(module.parameters())
    assert list(parameter_paths(module).values()) == ["first.weight", "first.weight", "tied.bias"]
    weight = torch.rand(4, 4)
    output = Bound(module, {"first.weight": weight})(x)
    expected = x @ weight.T @ weight.T @ weight.T + module.tied.bias
    torch.testing.assert_close(output, expected)
    assert [id(value) for value in module.parameters()] == [id(value) for value in before]
    assert module.tied.weight is module.again.weight is before[0]


def test_evaluating_restores_every_modules_mode():
    network = networks.resnet()
    network.train()
    network.encoder.layer2.eval()
    modes = [module.training for module in network.modules()]
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == modes


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("resnet81", {}, r"backbone 'resnet81' is unknown to timm .*did you mean 'resnet"),
        (
            "resnet18.a1_in2k",
            {},
            r"timm .* has no weights 'resnet18.a1_in2k'; did you mean 'resnet18.a1_in1k'",
        ),
        ("test_vit.r160_in2k", {}, r"has no weights 'test_vit.r160_in2k'; "),
        ("resnet18", {"layrs": [1]}, r"timm cannot build backbone 'resnet18' with .*layrs"),
        (
            "mobilenetv3_small_050",
            {},
            r"knows ResNet-like and patch networks, found MobileNetV3; set stem: original",
        ),
    ],
)
def test_errors_say_what_to_do(backbone, options, message):
    with pytest.raises(UserError, match=message):
        build_encoder(backbone, 32, options=options)


def test_a_network_without_a_head_classifies():
    encoder = build_encoder("resnet18", 16, options=SMALL)
    outputs = Network(encoder, 3).eval()(networks.images(2))
    assert outputs.logits.shape == (2, 3)
    assert outputs.projections is None


@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny_patch16_224"])
def test_a_pretrained_first_layer_is_not_thrown_away(backbone):
    with pytest.raises(
        UserError,
        match=f"stem 'small' would replace the first layer of '{backbone}', whose weights are pre",
    ):
        build_encoder(backbone, 32, pretrained=True)


def test_images_are_a_whole_number_of_patches():
    with pytest.raises(
        UserError, match=r"data\.image_size: expected a multiple of the patches' 4 pixels, found 30"
    ):
        build_encoder("vit_tiny_patch16_224", 30)
