"""IT3: the loss by hand, frozen parameters, the effect of labels and of a prediction fed back."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import networks, trainings
from tests.methods.test_backbones import BACKBONES
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.online import adapt_stream
from tttlab.config.inner_loop import InnerLoop
from tttlab.data.pixels import as_images
from tttlab.errors import UserError
from tttlab.methods.it3 import IT3Training, distance
from tttlab.networks.building import build_encoder
from tttlab.networks.checkpoints import build_network, load, save
from tttlab.networks.network import Bound, Network, pooled_features
from tttlab.networks.stages import find_stage_indices, stage_maps
from tttlab.objectives.it3 import IT3
from tttlab.training.losses import joint_loss
from tttlab.training.optimisers import Recipe
from tttlab.training.recipes import finetune

DISTANCES = ("js", "ag", "l2")
KINDS = pytest.mark.parametrize("kind", ["it3", "it3_vit"])


def shifted(count: int = 3) -> torch.Tensor:
    return networks.images(count, seed=50).double() * 0.4 + 0.6


def random_logits(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 4, dtype=torch.float64, generator=generator)


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
    first, second = random_logits(seed=0)
    pairs = zip(softmax(first.numpy()), softmax(second.numpy()), strict=True)
    expected = np.mean([in_numpy(p, q, kind) for p, q in pairs])
    assert distance(first, second, kind).item() == pytest.approx(expected, rel=1e-12)
    assert distance(second, first, kind).item() == pytest.approx(expected, rel=1e-12)
    assert distance(first, first + 3, kind).item() == pytest.approx(0, abs=1e-12)


def test_the_released_codes_divergence_is_ag_and_torchs_kl_is_the_other_way_round():
    """It calls ``F.kl_div(log p, m)``, which is KL(m‖p), for Jensen–Shannon."""
    first, second = random_logits(seed=1)
    p, q = first.softmax(-1), second.softmax(-1)
    m = (p + q) / 2
    from_p = nn.functional.kl_div(p.log(), m, reduction="batchmean")
    from_q = nn.functional.kl_div(q.log(), m, reduction="batchmean")
    released = (from_p + from_q).item() / 2
    assert distance(first, second, "ag").item() == pytest.approx(released, rel=1e-12)


def test_opposite_certainties_are_log_2_apart_and_stay_differentiable():
    logits = (1e3 * torch.eye(2, 4, dtype=torch.float64)).split(1)
    for kind, expected in (("js", math.log(2)), ("l2", 2.0), ("ag", 500 - math.log(2))):
        first, second = (part.clone().requires_grad_() for part in logits)
        value = distance(first, second, kind)
        value.backward()
        assert value.item() == pytest.approx(expected, rel=1e-9)
        assert first.grad.isfinite().all()
        assert second.grad.isfinite().all()


class Plain(nn.Module):
    """A ResNet of `networks`, stage by stage, with the label's contribution after the second."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, images: torch.Tensor, probabilities: torch.Tensor | None = None
    ) -> torch.Tensor:
        encoder = self.network.encoder
        x = encoder.bn1(encoder.conv1(self.network.normalise(images)))
        x = encoder.layer1(encoder.maxpool(encoder.act1(x)))
        x = encoder.layer2(x)
        if probabilities is not None:
            weight = self.network.head.embedding.weight
            x = x + ((probabilities - 1 / networks.CLASSES) @ weight.T)[:, :, None, None]
        features = encoder.layer4(encoder.layer3(x)).mean((2, 3))
        return features @ self.network.classifier.weight.T + self.network.classifier.bias


def plain_copies(network: Network) -> tuple[Plain, Plain]:
    """A copy to adapt, and a frozen one."""
    frozen = Plain(copy.deepcopy(network)).requires_grad_(False)
    return Plain(copy.deepcopy(network)), frozen


def descend(loss: torch.Tensor, parameters: list[nn.Parameter], lr: float) -> None:
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.data -= lr * gradient


def by_hand(
    network: Network, image: torch.Tensor, second: str, kind: str, steps: int, lr: float
) -> tuple[list[float], torch.Tensor]:
    """Adapt a copy to one image with plain autograd: the loss before each step, the last logits."""
    adapted, source = plain_copies(network)
    encoder, losses = list(adapted.network.encoder.parameters()), []
    for _ in range(steps):
        p = adapted(image[None]).softmax(-1)
        q = (adapted if second == "adapted" else source)(image[None], p).softmax(-1)
        m = (p + q) / 2
        terms = {
            "js": (p * (p / m).log() + q * (q / m).log()) / 2,
            "ag": m * (m / (p * q).sqrt()).log(),
            "l2": (p - q) ** 2,
        }
        losses.append(terms[kind].sum())
        descend(losses[-1], encoder, lr)
    with torch.no_grad():
        return [loss.item() for loss in losses], adapted(image[None])[0]


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("second", ["source", "adapted"])
def test_losses_and_predictions_are_those_of_a_network_spelt_out(second, kind):
    network, _ = networks.source_statistics("it3")
    method = IT3Training(second=second, distance=kind)
    result = adapt(network, shifted(), method, InnerLoop(steps=3, lr=0.05))
    assert len(result.logits) == len(shifted())
    for index, image in enumerate(shifted()):
        losses, logits = by_hand(network, image, second, kind, 3, 0.05)
        assert result.losses[index, :-1].tolist() == pytest.approx(losses, rel=1e-7)
        torch.testing.assert_close(result.logits[index], logits, rtol=1e-7, atol=1e-9)
        assert (result.logits[index] - result.source_logits[index]).abs().max() > 1e-4


def test_the_weights_of_the_second_application_decide_the_gradient():
    network, _ = networks.source_statistics("it3")
    by_source, by_adapted = (
        adapt(network, shifted(), IT3Training(second=weights), InnerLoop(lr=0.05))
        for weights in ("source", "adapted")
    )
    torch.testing.assert_close(by_source.losses[:, 0], by_adapted.losses[:, 0])
    assert (by_source.logits - by_adapted.logits).abs().max() > 1e-4


@KINDS
def test_the_frozen_application_and_the_head_get_no_gradient_and_all_that_classifies_does(kind):
    network = copy.deepcopy(networks.source_statistics(kind)[0])
    parameters = {
        name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()
    }
    IT3Training().loss(Bound(network, parameters), shifted(1), {}, ())[0].backward()
    # The source network is the paper's frozen F.
    assert all(parameter.grad is None for parameter in network.parameters())
    for name, value in parameters.items():
        if name.startswith("head."):  # the adapted network classifies without the head
            assert value.grad is None
        else:
            assert value.grad.any(), name
    method = IT3Training(second="adapted")
    method.loss(Bound(network, parameters), shifted(1), {}, ())[0].backward()
    assert parameters["head.embedding.weight"].grad.any()


def test_the_gradient_reaches_the_network_through_what_is_given_too():
    """If it were detached there, the prediction would only follow the second one."""
    network = copy.deepcopy(networks.source_statistics("it3")[0])
    source = copy.deepcopy(network).requires_grad_(False)
    weight = network.encoder.layer1[0].conv1.weight

    def gradient(given):
        logits = network(shifted(1)).logits
        second_logits = source(shifted(1), given=given(logits)).logits
        return torch.autograd.grad(distance(logits, second_logits, "js"), weight)[0]

    attached = gradient(lambda logits: logits.softmax(-1))
    detached = gradient(lambda logits: logits.detach().softmax(-1))
    bound = Bound(network, dict(network.named_parameters()))
    loss, _ = IT3Training().loss(bound, shifted(1), {}, ())
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], attached)
    assert (attached - detached).norm() > 0.01 * attached.norm()


@KINDS
def test_a_single_image_has_a_gradient_at_the_first_step(kind):
    network = copy.deepcopy(networks.source_statistics(kind)[0])
    weights = {"it3": "encoder.conv1.0.weight", "it3_vit": "encoder.patch_embed.proj.weight"}
    first_weight = network.get_parameter(weights[kind])
    bound = Bound(network, dict(network.named_parameters()))
    for name in DISTANCES:
        loss, _ = IT3Training(distance=name).loss(bound, shifted(1), {}, ())
        assert torch.autograd.grad(loss, first_weight)[0].norm() > 1e-6


@KINDS
def test_a_network_that_ignores_what_it_is_told_has_nothing_to_learn(kind):
    network = copy.deepcopy(networks.source_statistics(kind)[0])
    nn.init.zeros_(network.head.embedding.weight)
    result = adapt(network, shifted(), IT3Training(), InnerLoop(steps=2, lr=0.1))
    assert result.losses.abs().max() < 1e-12
    torch.testing.assert_close(result.logits, result.source_logits)


@KINDS
def test_the_neutral_label_is_no_label(kind):
    network, _ = networks.source_statistics(kind)
    with torch.no_grad():
        plain = network(shifted()).logits
        neutral = network(shifted(), given=torch.full((3, 4), 0.25).double()).logits
        torch.testing.assert_close(neutral, plain)
        given = network(shifted(), given=torch.eye(3, 4).double()).logits
        assert (given - plain).abs().amax(1).min() > 1e-4
        assert torch.equal(network(shifted()).logits, plain)  # labels have no lasting effect


def test_a_stream_goes_on_and_the_second_application_stays_the_sources():
    network, _ = networks.source_statistics("it3")
    images, loop = shifted(4), InnerLoop(steps=1, lr=0.1)
    result = adapt_stream(network, images, IT3Training(), loop, batch_size=2)
    adapted, source = plain_copies(network)
    encoder, losses, logits = list(adapted.network.encoder.parameters()), [], []
    for batch in images.split(2):
        first = adapted(batch)
        losses.append(distance(first, source(batch, first.softmax(-1)), "js"))
        descend(losses[-1], encoder, 0.1)
        with torch.no_grad():
            logits.append(adapted(batch))
    torch.testing.assert_close(result.logits, torch.cat(logits), rtol=1e-7, atol=1e-9)
    means = result.losses[:, 0].view(2, 2).mean(1)
    assert means.tolist() == pytest.approx([loss.item() for loss in losses], rel=1e-7)


def test_the_objective_is_the_cross_entropy_of_images_with_their_labels():
    network = copy.deepcopy(networks.source_statistics("it3")[0])
    images, labels = networks.images(4, seed=2).double(), torch.tensor([3, 0, 1, 3])
    loss = IT3().loss(network, images[:, None], torch.Generator(), labels=labels)
    logits = Plain(network)(images, torch.eye(4, dtype=torch.float64)[labels]).detach().numpy()
    losses = [-math.log(softmax(row)[label]) for row, label in zip(logits, labels, strict=True)]
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-9)
    loss.backward()
    for name, value in network.named_parameters():
        if "head" in name or "classifier" in name:
            assert value.grad.any(), name


def test_joint_training_adds_both_and_leaves_batchnorm_the_statistics_of_images_without_labels():
    network, objective = trainings.build(trainings.IT3)
    pixels = torch.from_numpy(trainings.image_set(6).pixels)[:, None]
    batch = {"classify": pixels, "objective": pixels, "labels": torch.arange(6) % trainings.CLASSES}
    plain = copy.deepcopy(network).train()
    expected = nn.functional.cross_entropy(plain(as_images(pixels[:, 0])).logits, batch["labels"])
    terms = joint_loss(objective, 0.5)(network.train(), batch, torch.Generator())
    assert terms["classification_loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    total = (expected + 0.5 * terms["objective_loss"]).item()
    assert terms["loss"].item() == pytest.approx(total, rel=1e-6)
    assert not torch.equal(network.encoder.layer3[0].bn1.running_mean, torch.zeros(8))
    for name, buffer in plain.named_buffers():
        if "running" in name:
            torch.testing.assert_close(network.get_buffer(name), buffer, rtol=0, atol=0)
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {layer.momentum for layer in layers} == {0.1}


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
    grey = 0.2 * images + 0.8 * images.mean(1, keepdim=True)  # colour is what tells the classes

    def accuracy(images, **options) -> torch.Tensor:
        predictions = network(images, **options).logits.argmax(1)
        return (predictions == labels).float().mean()

    def gaps(images):
        first = network(images).logits
        second = network(images, given=first.softmax(-1)).logits
        pairs = zip(first.split(1), second.split(1), strict=True)
        return torch.stack([distance(*pair, "js") for pair in pairs])

    with torch.no_grad():
        assert accuracy(images) > 0.9
        assert accuracy(images, given=truth) > 0.95
        assert accuracy(grey, given=truth) > accuracy(grey) + 0.1
        assert gaps(grey).mean() > 1.5 * gaps(images).mean()


def test_a_checkpoint_brings_the_head_back_and_other_classes_leave_it(tmp_path):
    network, _ = trainings.build(trainings.IT3)
    about = {"settings": trainings.IT3, "classes": ("a", "b", "c"), "image_size": trainings.SIZE}
    save(network, tmp_path, **about)
    images, given = torch.rand(3, 3, trainings.SIZE, trainings.SIZE), torch.eye(3)
    loaded, _ = load(tmp_path)
    assert torch.equal(loaded(images, given=given).logits, network(images, given=given).logits)
    settings = trainings.IT3 | {"weights": str(tmp_path)}
    wider, _ = build_network(settings, 5, trainings.SIZE, seed=0)
    assert wider.head.embedding.in_features == 5
    assert torch.equal(wider.encoder.conv1[0].weight, network.encoder.conv1[0].weight)


@pytest.mark.parametrize("family", BACKBONES)
def test_labels_come_in_at_every_place_behind_the_middle_of_any_backbone(family, monkeypatch):
    name, options, size = BACKBONES[family]
    torch.manual_seed(0)
    encoder = build_encoder(name, size, stem="original", options=options).double().eval()
    head, middle = IT3().head(encoder, 4).double(), math.ceil(len(find_stage_indices(encoder)) / 2)
    images, given = torch.rand(2, 3, size, size, dtype=torch.float64), torch.eye(2, 4)

    def middle_map(encoder, images):
        return stage_maps(encoder, images, [middle])[0]

    with torch.no_grad():
        features = head.features_given(encoder, images, given)
        assert (features - pooled_features(encoder, images)).abs().amax(1).min() > 1e-6
        monkeypatch.setattr("tttlab.objectives.it3.pooled_features", middle_map)
        change = head.features_given(encoder, images, given) - middle_map(encoder, images)
        added = head.embedding(given.double() - 0.25)
    torch.testing.assert_close(change, added[:, :, None, None].expand_as(change))


def test_labels_come_in_where_the_settings_say():
    encoder = networks.resnet().encoder
    stages = [IT3(stage).head(encoder, 4).stage for stage in (None, 1, 4)]
    assert stages == ["layer2", "layer1", "layer4"]
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
