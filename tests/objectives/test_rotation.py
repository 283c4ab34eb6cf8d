"""Rotation: turns against NumPy's, the loss by hand, trained parameters, and a whole training."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import networks, trainings
from tttlab.adaptation.adapter import adapt
from tttlab.config.inner_loop import Augmentation, InnerLoop
from tttlab.data.image_sets import ImageSet
from tttlab.data.pixels import as_images
from tttlab.data.views import random_views
from tttlab.errors import UserError
from tttlab.methods.rotation import RotationTraining
from tttlab.objectives.rotation import Rotation, rotate
from tttlab.seeding import torch_generator
from tttlab.training.optimisers import Recipe
from tttlab.training.recipes import pretrain


def test_images_are_turned_as_numpy_turns_them():
    images = networks.images(8, seed=1).view(2, 4, 3, 16, 16)
    labels = torch.tensor([[0, 1, 2, 3], [3, 3, 1, 0]])
    turned = rotate(images, labels)
    for index in np.ndindex(2, 4):
        expected = np.rot90(images[index].permute(1, 2, 0).numpy(), labels[index])
        np.testing.assert_array_equal(turned[index].permute(1, 2, 0), expected)
    assert not torch.equal(rotate(images, 0 * labels + 1), rotate(images, 0 * labels + 3))


def test_every_view_is_turned_once_by_its_images_own_stream():
    method, images = RotationTraining(num_views=40), networks.images(2, seed=2)
    views = method.views(nn.Identity(), images, [torch_generator(0, "a"), torch_generator(0, "b")])
    alone = method.views(nn.Identity(), images[1:], [torch_generator(0, "b")])
    assert torch.equal(views["images"][1], alone["images"][0])
    assert torch.equal(views["labels"][1], alone["labels"][0])
    generators = [torch_generator(0, "a"), torch_generator(0, "b")]
    upright_views = random_views(images, generators, 40, method.augmentation)
    assert torch.equal(rotate(views["images"], -views["labels"] % 4), upright_views)
    counts = views["labels"].flatten().bincount(minlength=4)
    assert counts.sum() == 80
    assert counts.min() > 8  # of 20 expected


def by_hand(network, images):
    """Logits of the branch in a four-stage ResNet that shares two of them."""
    encoder, head = network.encoder, network.head
    x = encoder.bn1(encoder.conv1((images - network.mean) / network.std))
    x = encoder.maxpool(encoder.act1(x))
    x = head.branch.stages(encoder.layer2(encoder.layer1(x)))
    return x.mean((2, 3)) @ head.classifier.weight.T + head.classifier.bias


def test_the_losses_equal_a_loop_over_single_turned_images():
    network, _ = networks.source_statistics("rotation")
    images = networks.images(3, seed=3).double()
    expected = []
    with torch.no_grad():
        for image in images.permute(0, 2, 3, 1).numpy():
            for turns in range(4):
                turned = torch.from_numpy(np.rot90(image, turns).copy()).permute(2, 0, 1)
                logits = by_hand(network, turned[None])[0].numpy()
                expected.append(np.log(np.exp(logits).sum()) - logits[turns])
        loss = Rotation().loss(network, images[:, None], torch.Generator())
        assert loss.item() == pytest.approx(np.mean(expected), rel=1e-12)
        first_image = images[:1].expand(2, -1, -1, -1)
        for turns in ([0, 1], [3, 3]):
            labels = torch.tensor(turns)
            views = {"images": rotate(first_image, labels), "labels": labels}
            loss, _ = RotationTraining().loss(network, views, {}, ())
            assert loss.item() == pytest.approx(np.mean([expected[n] for n in turns]), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "shared", "later"),
    [
        ("rotation", ("conv1", "bn1", "layer1", "layer2"), ("layer3", "layer4")),
        (
            "rotation_vit",
            ("cls_token", "pos_embed", "patch_embed", "blocks.0"),
            ("blocks.1", "norm"),
        ),
    ],
)
def test_shared_stages_and_branch_learn_and_nothing_else(kind, shared, later):
    network = copy.deepcopy(networks.source_statistics(kind)[0])
    views = networks.images(4, seed=4).double()[:, None]
    Rotation().loss(network, views, torch.Generator()).backward()
    for name, parameter in network.named_parameters():
        encoder_name = name.removeprefix("encoder.")
        if name.startswith("classifier.") or encoder_name.startswith(later):
            assert parameter.grad is None, name
        elif name.startswith("head.") or encoder_name.startswith(shared):
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_one_image_has_a_gradient_and_its_prediction_moves_through_the_shared_stages_alone():
    network, _ = networks.source_statistics("rotation")
    images, method = networks.images(3, seed=5).double() * 0.4 + 0.6, RotationTraining(num_views=4)
    for trainable, moves in (("all", True), ("encoder", True), ("head", False)):
        result = adapt(network, images, method, InnerLoop(steps=1, lr=0.1, trainable=trainable))
        changes = (result.logits - result.source_logits).abs().amax(1)
        assert (changes > 1e-4).all() == moves, trainable
        assert (result.losses[:, 0] > 0).all()


def upright(count: int, seed: int) -> ImageSet:
    """Pictures that are bright above and dark below."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(0, 12, (count, 16, 16, 3))
    pixels = (np.linspace(220, 40, 16)[None, :, None, None] + noise).clip(0, 255).astype(np.uint8)
    names = tuple(f"{seed}-{number}" for number in range(count))
    return ImageSet(pixels, np.arange(count) % 3, names, tuple("abc"))


def rotation_accuracy(network, images: ImageSet) -> float:
    """Accuracy over all four turns."""
    views = as_images(torch.from_numpy(images.pixels))[:, None].expand(-1, 4, -1, -1, -1)
    labels = torch.arange(4).expand(len(views), -1)
    with torch.no_grad():
        logits = network(rotate(views, labels).flatten(0, 1), branch=True).branch
    return (logits.argmax(-1) == labels.flatten()).float().mean().item()


def test_training_learns_how_upright_images_were_turned():
    network, objective = trainings.build(trainings.ROTATION)
    train, test = upright(48, 0), upright(24, 1)
    assert rotation_accuracy(network, test) < 0.6
    recipe = Recipe(epochs=12, batch_size=12, lr=1e-2)
    pretrain(
        trainings.trainer(),
        network,
        objective,
        train,
        (train, test),
        Augmentation(0.8, True, 0.2),
        recipe,
    )
    assert rotation_accuracy(network, test) > 0.95


def test_half_of_the_stages_are_shared_unless_a_number_says_otherwise():
    resnet, vit = networks.resnet().encoder, networks.vit().encoder
    assert [Rotation(shared).head(resnet).shared for shared in (None, 1, 4)] == [2, 1, 4]
    assert Rotation().head(vit).shared == 1
    for wrong in (0, 5):
        with pytest.raises(
            UserError, match=rf"shared_stages: expected null or 1 to 4, .* ResNet, found {wrong}"
        ):
            Rotation(wrong).head(resnet)


def test_a_network_without_the_branch_is_refused():
    network, _ = networks.source_statistics("clust3")
    with pytest.raises(UserError, match="needs a network with the head of objective rotation"):
        adapt(network, networks.images(1).double(), RotationTraining())
