"""IT3: the loss by hand, what is frozen, what labels do to a network, and what a prediction given back does."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import networks, trainings
from tests.methods.test_backbones import BACKBONES
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.inner_loop import InnerLoop
from tttlab.adaptation.online import adapt_stream
from tttlab.data.pixels import as_images
from tttlab.errors import UserError
from tttlab.methods.it3 import IT3Training, distance
from tttlab.networks.building import build_encoder
from tttlab.networks.checkpoints import build_network, load, save
from tttlab.networks.network import Bound, Network, pooled_features
from tttlab.networks.stages import stage_maps, stage_places
from tttlab.objectives.it3 import IT3
from tttlab.training.optimisers import Recipe
from tttlab.training.recipes import finetune, joint_loss

DISTANCES = ("js", "ag", "l2")
KINDS = pytest.mark.parametrize("kind", ["it3", "it3_vit"])


def shifted(count: int = 3) -> torch.Tensor:
    return networks.images(count, seed=50).double() * 0.4 + 0.6


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def in_numpy(p: np.ndarray, q: np.ndarray, kind: str) -> float:
    """The distances from probabilities, one class at a time."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        if kind == "js":
            total += a * math.log(a / m) / 2 + b * math.log(b / m) / 2
        elif kind == "ag":
            total += m * math.log(m / math.sqrt(a * b))
        else:
            total += (a - b) ** 2
    return total


@pytest.mark.parametrize("kind", DISTANCES)
def test_distances_equal_a_loop_over_classes(kind):
    first, second = torch.randn(
        2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    pairs = zip(softmax(first.numpy()), softmax(second.numpy()), strict=True)
    expected = np.mean([in_numpy(p, q, kind) for p, q in pairs])
    assert distance(first, second, kind).item() == pytest.approx(expected, rel=1e-12)
    assert distance(second, first, kind).item() == pytest.approx(expected, rel=1e-12)
    assert distance(first, first + 3, kind).item() == pytest.approx(0, abs=1e-12)


def test_the_released_codes_divergence_is_ag_and_torchs_kl_is_the_other_way_round():
    """It calls ``F.kl_div(log p, m)``, which is KL(m‖p), and means Jensen–Shannon."""
    first, second = torch.randn(
        2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    p, q = first.softmax(-1), second.softmax(-1)
    m = (p + q) / 2
    released = (
        sum(nn.functional.kl_div(torch.log(each), m, reduction="batchmean") for each in (p, q)) / 2
    )
    assert distance(first, second, "ag").item() == pytest.approx(released.item(), rel=1e-12)


def test_opposite_certainties_are_log_2_apart_and_stay_differentiable():
    logits = (1e3 * torch.eye(2, 4, dtype=torch.float64)).split(1)
    for kind, expected in (("js", math.log(2)), ("l2", 2.0), ("ag", 500 - math.log(2))):
        first, second = (part.clone().requires_grad_() for part in logits)
        found = distance(first, second, kind)
        found.backward()
        assert found.item() == pytest.approx(expected, rel=1e-9)
        assert first.grad.isfinite().all()
        assert second.grad.isfinite().all()


class Plain(nn.Module):
    """A ResNet of `networks`, spelt out: its stages one by one, with what the label adds behind the second."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, images: torch.Tensor, probabilities: torch.Tensor | None = None
    ) -> torch.Tensor:
        encoder = self.network.encoder
        x = encoder.layer2(
            encoder.layer1(
                encoder.maxpool(
                    encoder.act1(encoder.bn1(encoder.conv1(self.network.normalise(images))))
                )
            )
        )
        if probabilities is not None:
            x = (
                x
                + ((probabilities - 1 / networks.CLASSES) @ self.network.head.embedding.weight.T)[
                    :, :, None, None
                ]
            )
        features = encoder.layer4(encoder.layer3(x)).mean((2, 3))
        return features @ self.network.classifier.weight.T + self.network.classifier.bias


def by_hand(
    network: Network, image: torch.Tensor, second: str, kind: str, steps: int, lr: float
) -> tuple[list[float], torch.Tensor]:
    """Adapt a deep copy to one image with plain autograd; → the loss before every step, and the logits after the last."""
    own, source = Plain(copy.deepcopy(network)), Plain(copy.deepcopy(network)).requires_grad_(False)
    encoder, losses = list(own.network.encoder.parameters()), []
    for _ in range(steps):
        p = own(image[None]).softmax(-1)
        q = (own if second == "adapted" else source)(image[None], p).softmax(-1)
        m = (p + q) / 2
        terms = {
            "js": (p * (p / m).log() + q * (q / m).log()) / 2,
            "ag": m * (m / (p * q).sqrt()).log(),
            "l2": (p - q) ** 2,
        }
        losses.append(terms[kind].sum())
        for parameter, slope in zip(encoder, torch.autograd.grad(losses[-1], encoder), strict=True):
            parameter.data -= lr * slope
    with torch.no_grad():
        return [loss.item() for loss in losses], own(image[None])[0]


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("second", ["source", "adapted"])
def test_losses_and_predictions_are_those_of_a_network_spelt_out(second, kind):
    network, _ = networks.source_statistics("it3")
    found = adapt(
        network, shifted(), IT3Training(second=second, distance=kind), InnerLoop(steps=3, lr=0.05)
    )
    for image, losses, logits, source in zip(
        shifted(), found.losses, found.logits, found.source_logits, strict=True
    ):
        expected, adapted = by_hand(network, image, second, kind, 3, 0.05)
        assert losses[:-1].tolist() == pytest.approx(expected, rel=1e-7)
        torch.testing.assert_close(logits, adapted, rtol=1e-7, atol=1e-9)
        assert (logits - source).abs().max() > 1e-4


def test_the_weights_of_the_second_application_decide_the_gradient():
    network, _ = networks.source_statistics("it3")
    one, other = (
        adapt(network, shifted(), IT3Training(second=way), InnerLoop(lr=0.05))
        for way in ("source", "adapted")
    )
    torch.testing.assert_close(one.losses[:, 0], other.losses[:, 0])
    assert (one.logits - other.logits).abs().max() > 1e-4


@KINDS
def test_the_frozen_application_and_the_head_get_no_gradient_and_all_that_classifies_does(kind):
    network = copy.deepcopy(networks.source_statistics(kind)[0])
    own = {
        name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()
    }
    IT3Training().loss(Bound(network, own), shifted(1), {}, ())[0].backward()
    assert all(
        parameter.grad is None for parameter in network.parameters()
    )  # the source network, that is F
    for name, value in own.items():
        if name.startswith("head."):  # the adapted network classifies without
            assert value.grad is None
        else:
            assert value.grad.any(), name
    IT3Training(second="adapted").loss(Bound(network, own), shifted(1), {}, ())[0].backward()
    assert own["head.embedding.weight"].grad.any()


def test_the_gradient_reaches_the_network_through_what_is_given_too():
    """Held fixed there, the prediction would only follow the second one."""
    network = copy.deepcopy(networks.source_statistics("it3")[0])
    source, weight = (
        copy.deepcopy(network).requires_grad_(False),
        network.encoder.layer1[0].conv1.weight,
    )

    def slope(given):
        logits = network(shifted(1)).logits
        again = source(shifted(1), given=given(logits)).logits
        return torch.autograd.grad(distance(logits, again, "js"), weight)[0]

    through = slope(lambda logits: logits.softmax(-1))
    (found,) = torch.autograd.grad(
        IT3Training().loss(Bound(network, dict(network.named_parameters())), shifted(1), {}, ())[0],
        weight,
    )
    torch.testing.assert_close(found, through)
    assert (
        through - slope(lambda logits: logits.detach().softmax(-1))
    ).norm() > 0.01 * through.norm()


@KINDS
def test_a_single_image_has_a_gradient_at_the_first_step(kind):
    network = copy.deepcopy(networks.source_statistics(kind)[0])
    for way in DISTANCES:
        loss, _ = IT3Training(distance=way).loss(
            Bound(network, dict(network.named_parameters())), shifted(1), {}, ()
        )
        first = (
            next(network.encoder.parameters())
            if kind == "it3"
            else network.encoder.patch_embed.proj.weight
        )
        assert torch.autograd.grad(loss, first)[0].norm() > 1e-6


@KINDS
def test_a_network_that_ignores_what_it_is_told_has_nothing_to_learn(kind):
    network = copy.deepcopy(networks.source_statistics(kind)[0])
    nn.init.zeros_(network.head.embedding.weight)
    found = adapt(network, shifted(), IT3Training(), InnerLoop(steps=2, lr=0.1))
    assert found.losses.abs().max() < 1e-12
    torch.testing.assert_close(found.logits, found.source_logits)


@KINDS
def test_the_neutral_label_is_no_label(kind):
    network, _ = networks.source_statistics(kind)
    with torch.no_grad():
        plain = network(shifted()).logits
        torch.testing.assert_close(
            network(shifted(), given=torch.full((3, 4), 0.25).double()).logits, plain
        )
        told = network(shifted(), given=torch.eye(3, 4).double()).logits
        assert (told - plain).abs().amax(1).min() > 1e-4
        assert torch.equal(network(shifted()).logits, plain)  # and nothing of it stays


def test_a_stream_goes_on_and_the_second_application_stays_the_sources():
    network, _ = networks.source_statistics("it3")
    images, loop = shifted(4), InnerLoop(steps=1, lr=0.1)
    found = adapt_stream(network, images, IT3Training(), loop, batch_size=2)
    own, source = Plain(copy.deepcopy(network)), Plain(copy.deepcopy(network)).requires_grad_(False)
    encoder, losses, logits = list(own.network.encoder.parameters()), [], []
    for part in images.split(2):
        first = own(part)
        losses.append(distance(first, source(part, first.softmax(-1)), "js"))
        for parameter, slope in zip(encoder, torch.autograd.grad(losses[-1], encoder), strict=True):
            parameter.data -= 0.1 * slope
        with torch.no_grad():
            logits.append(own(part))
    torch.testing.assert_close(found.logits, torch.cat(logits), rtol=1e-7, atol=1e-9)
    means = found.losses[:, 0].view(2, 2).mean(1)
    assert means.tolist() == pytest.approx([loss.item() for loss in losses], rel=1e-7)


def test_the_objective_is_the_cross_entropy_of_images_with_their_labels():
    network = copy.deepcopy(networks.source_statistics("it3")[0])
    images, labels = networks.images(4, seed=2).double(), torch.tensor([3, 0, 1, 3])
    loss = IT3().loss(network, images[:, None], torch.Generator(), labels=labels)
    rows = Plain(network)(images, torch.eye(4, dtype=torch.float64)[labels])
    expected = np.mean(
        [
            -math.log(softmax(row)[label])
            for row, label in zip(rows.detach().numpy(), labels, strict=True)
        ]
    )
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    loss.backward()
    assert all(
        value.grad.any()
        for name, value in network.named_parameters()
        if "head" in name or "classifier" in name
    )


def test_joint_training_adds_both_and_leaves_batchnorm_the_statistics_of_images_without_labels():
    network, objective = trainings.build(trainings.IT3)
    pixels = torch.from_numpy(trainings.image_set(6).pixels)[:, None]
    batch = {"classify": pixels, "objective": pixels, "labels": torch.arange(6) % trainings.CLASSES}
    plain = copy.deepcopy(network).train()
    expected = nn.functional.cross_entropy(plain(as_images(pixels[:, 0])).logits, batch["labels"])
    terms = joint_loss(objective, 0.5)(network.train(), batch, torch.Generator())
    assert terms["classification_loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms["loss"].item() == pytest.approx(
        (expected + 0.5 * terms["objective_loss"]).item(), rel=1e-6
    )
    assert not torch.equal(network.encoder.layer3[0].bn1.running_mean, torch.zeros(8))
    for name, buffer in plain.named_buffers():
        if "running" in name:
            torch.testing.assert_close(network.get_buffer(name), buffer, rtol=0, atol=0)
    assert {
        module.momentum for module in network.modules() if isinstance(module, nn.BatchNorm2d)
    } == {0.1}


def test_a_trained_network_agrees_with_its_label_and_trusts_it_more_than_a_shifted_image():
    network, objective = trainings.build(trainings.IT3)
    train, test = trainings.image_set(66), trainings.image_set(60, seed=1)
    finetune(
        trainings.trainer(),
        network,
        objective,
        train,
        test,
        Recipe(epochs=25, batch_size=11, lr=1e-2),
        mode="joint",
        objective_weight=1.0,
        augmentation=trainings.VIEWS,
        objective_augmentation=trainings.VIEWS,
    )
    images, labels = as_images(torch.from_numpy(test.pixels)), torch.from_numpy(test.labels)
    truth = nn.functional.one_hot(labels, trainings.CLASSES).float()
    grey = 0.2 * images + 0.8 * images.mean(1, keepdim=True)  # what tells the class fades

    def gaps(images):
        logits = network(images).logits
        again = network(images, given=logits.softmax(-1)).logits
        return torch.stack(
            [distance(*pair, "js") for pair in zip(logits.split(1), again.split(1), strict=True)]
        )

    with torch.no_grad():
        assert (network(images).logits.argmax(1) == labels).float().mean() > 0.9
        assert (network(images, given=truth).logits.argmax(1) == labels).float().mean() > 0.95
        told = network(grey, given=truth).logits.argmax(1) == labels
        assert told.float().mean() > (network(grey).logits.argmax(1) == labels).float().mean() + 0.1
        assert gaps(grey).mean() > 1.5 * gaps(images).mean()


def test_a_checkpoint_brings_the_head_back_and_other_classes_leave_it(tmp_path):
    network, _ = trainings.build(trainings.IT3)
    about = {"settings": trainings.IT3, "classes": ("a", "b", "c"), "image_size": trainings.SIZE}
    save(network, tmp_path, **about)
    images, given = torch.rand(3, 3, trainings.SIZE, trainings.SIZE), torch.eye(3)
    loaded, _ = load(tmp_path)
    assert torch.equal(loaded(images, given=given).logits, network(images, given=given).logits)
    other, _ = build_network(trainings.IT3 | {"weights": str(tmp_path)}, 5, trainings.SIZE, seed=0)
    assert other.head.embedding.in_features == 5
    assert torch.equal(other.encoder.conv1[0].weight, network.encoder.conv1[0].weight)


@pytest.mark.parametrize("family", BACKBONES)
def test_labels_come_in_at_every_place_behind_the_middle_of_any_backbone(family, monkeypatch):
    name, options, size = BACKBONES[family]
    torch.manual_seed(0)
    encoder = build_encoder(name, size, stem="original", options=options).double().eval()
    head, middle = IT3().head(encoder, 4).double(), math.ceil(len(stage_places(encoder)) / 2)
    images, given = torch.rand(2, 3, size, size, dtype=torch.float64), torch.eye(2, 4)
    with torch.no_grad():
        assert (
            head.features_given(encoder, images, given) - pooled_features(encoder, images)
        ).abs().amax(1).min() > 1e-6
        monkeypatch.setattr(
            "tttlab.objectives.it3.pooled_features", lambda *known: stage_maps(*known, [middle])[0]
        )
        change = (
            head.features_given(encoder, images, given) - stage_maps(encoder, images, [middle])[0]
        )
        added = head.embedding(given.double() - 0.25)
    torch.testing.assert_close(change, added[:, :, None, None].expand_as(change))


def test_labels_come_in_where_the_settings_say():
    encoder = networks.resnet().encoder
    assert [IT3(stage).head(encoder, 4).stage for stage in (None, 1, 4)] == [
        "layer2",
        "layer1",
        "layer4",
    ]
    assert IT3(4).head(encoder, 7).embedding.weight.shape == (12, 7)
    with pytest.raises(
        UserError,
        match=r"objective.stage: expected null or 1 to 4, the stages of this ResNet, found 5",
    ):
        IT3(stage=5).head(encoder, 4)


def test_a_stage_that_gives_no_single_activation_is_named():
    encoder = networks.resnet().encoder
    head = IT3().head(encoder, 4)
    encoder.layer2.register_forward_hook(lambda _module, _inputs, output: [output])
    encoder.layer3.register_forward_pre_hook(lambda _module, inputs: inputs[0][0])
    with pytest.raises(
        UserError, match="expected one activation from layer2 of this ResNet, found none"
    ):
        head.features_given(encoder, networks.images(2), torch.eye(2, 4))


def test_a_network_that_takes_no_labels_is_refused():
    network, _ = networks.source_statistics("resnet")
    with pytest.raises(UserError, match="needs a network with the head of objective it3"):
        adapt(network, networks.images(1).double(), IT3Training())
