import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.helpers import networks, trainings
from tttlab.adaptation.trainable import select_parameters
from tttlab.data.pixels import as_images
from tttlab.errors import UserError
from tttlab.networks.checkpoints import build_network
from tttlab.networks.network import Outputs
from tttlab.networks.objective import Objective
from tttlab.objectives.clust3 import ClusT3
from tttlab.objectives.learned import Learned
from tttlab.objectives.mae import MAE
from tttlab.objectives.rotation import Rotation
from tttlab.objectives.simclr import SimCLR
from tttlab.objectives.simsiam import SimSiam
from tttlab.runtime.ranks import Share, open_fabric
from tttlab.seeding import torch_generator
from tttlab.training.loaders import Views, open_loader
from tttlab.training.losses import joint_loss, supervised_loss
from tttlab.training.meta_training import meta_loss
from tttlab.training.optimisers import Recipe
from tttlab.training.trainer import Task, Trainer

IMAGES, PAIRS = 3, 2
WEIGHT, LR = 0.3, 0.5
PARTS = ("encoder", "classifier", "head")

SETTINGS = {
    "simsiam-groupnorm": (
        lambda: networks.resnet("groupnorm1"),
        SimSiam(hidden_dim=16, projection_dim=8, prediction_dim=4),
    ),
    "rotation-batchnorm": (networks.resnet, Rotation()),
    "clust3-batchnorm": (networks.resnet, ClusT3(heads=2, clusters=3)),
    "learned-groupnorm": (lambda: networks.resnet("groupnorm1"), Learned(stage=4, dim=5)),
    "mae-layernorm": (networks.vit, MAE(decoder_dim=16)),
    "mae-ttt_mlp": (lambda: networks.mixed(networks.vit(), "ttt_mlp"), MAE(decoder_dim=16)),
}
KINDS = pytest.mark.parametrize("kind", SETTINGS)


def setting(kind: str) -> tuple[nn.Module, Objective, dict]:
    """A network (double precision, training mode, with dropout), its objective, and a batch."""
    build, objective = SETTINGS[kind]
    network = build()
    network.head = objective.head(network.encoder)
    if isinstance(objective, Learned):
        networks.decoding(network)
    network.classifier = nn.Sequential(nn.Dropout(0.5), network.classifier)
    return networks.settle(network).double().train(), objective, batch_of(objective)


def batch_of(
    objective: Objective, pairs: int = PAIRS, count: int = IMAGES, seed: int = 0
) -> dict[str, Tensor]:
    views = {
        "classify": Views(1, trainings.VIEWS),
        "objective": Views(pairs * objective.num_views, trainings.VIEWS),
    }
    return next(iter(open_loader(trainings.image_set(count, seed), views, count, seed=0)))


def gradients(loss: Tensor, network: nn.Module) -> dict[str, Tensor]:
    parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
    return gradients_by_name(loss, parameters)


def gradients_by_name(
    loss: Tensor, parameters: dict[str, Tensor], **options: bool
) -> dict[str, Tensor]:
    """The gradients of the parameters that influence the loss."""
    values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, **options)
    return {
        name: value for name, value in zip(parameters, values, strict=True) if value is not None
    }


def with_parameters(network: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """Copy a network and replace its parameters by tensors with a history."""
    network = copy.deepcopy(network)
    for name, value in parameters.items():
        path, _, attribute = name.rpartition(".")
        module = network.get_submodule(path)
        del module._parameters[attribute]
        setattr(module, attribute, value)
    return network


def one_by_one(
    network: nn.Module,
    objective: Objective,
    batch: dict,
    steps: int = 1,
    clip: float | None = None,
    second_order: bool = True,
    moved: tuple[str, ...] | None = None,
) -> tuple[Tensor, list[float]]:
    """The same loss image by image, by autograd alone; also the norms of the inner gradients.

    ``moved`` names the parameters that inner steps move; None: all that are trainable.
    """
    network.eval()
    images, views = as_images(batch["classify"]), as_images(batch["objective"])
    views = views.unflatten(1, (-1, objective.num_views))
    losses, norms = [], []
    for number, (image, label) in enumerate(zip(images, batch["labels"], strict=True)):

        def objective_of(model, number=number) -> Tensor:
            share = None
            if isinstance(objective, MAE):
                # All images' masks are drawn together; each image takes its share.
                share = Share(views.shape[:2].numel(), number, len(views))
            return objective.loss(model, views[number], torch_generator(1), share)

        parameters = {
            name: value for name, value in network.named_parameters() if value.requires_grad
        }
        for _ in range(steps):
            loss = objective_of(with_parameters(network, parameters))
            inner = {name: parameters[name] for name in moved or parameters}
            parts = gradients_by_name(loss, inner, create_graph=second_order)
            norm = sum(part.square().sum() for part in parts.values()).sqrt()
            norms.append(norm.item())
            factor = clip / norm if clip and norm > clip else 1.0
            parameters = parameters | {
                name: parameters[name] - LR * factor * part for name, part in parts.items()
            }
        adapted = with_parameters(network, parameters)
        supervised = F.cross_entropy(adapted(image).logits, label[None])
        losses.append(supervised + WEIGHT * objective_of(adapted))
    return sum(losses) / len(losses), norms


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-8
) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        error = (actual[name] - expected[name]).abs().max()
        assert error <= tolerance * max(1.0, expected[name].abs().max().item()), (name, error)


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients, relative to the second's norm."""
    squares = sum((first[name] - second[name]).square().sum() for name in second)
    return (squares / sum(part.square().sum() for part in second.values())).sqrt().item()


class Toy(nn.Module):
    """Feature w·m of the mean brightness m; logits (0, v·w·m)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
        self.classifier = nn.Parameter(torch.tensor([1.3], dtype=torch.float64))

    def forward(self, images: Tensor) -> Outputs:
        features = self.encoder * images.double().mean((1, 2, 3))
        logits = torch.stack([0 * features, self.classifier * features], 1)
        return Outputs(logits, features[:, None])


@dataclass(frozen=True)
class ToyObjective(Objective):
    """½ (feature − 1)²."""

    def loss(self, network, views: Tensor, generator, share=None) -> Tensor:
        return (network(views[:, 0]).features - 1).square().mean() / 2


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_gradient_is_the_closed_form(steps):
    brightness, labels = np.array([40, 130, 250], np.uint8), np.array([0, 1, 1])
    pixels = torch.from_numpy(brightness)[:, None, None, None, None].expand(3, 1, 2, 2, 3)
    batch = {"classify": pixels, "objective": pixels, "labels": torch.from_numpy(labels)}
    toy = Toy()
    terms = meta_loss(ToyObjective(), WEIGHT, LR, steps, clip=None)(toy, batch, torch_generator(1))
    m = (brightness.astype(np.float32) / 255).astype(np.float64)
    w, v, sign = np.full(3, 0.7), 1.3, 2 * labels - 1
    for _ in range(steps):
        w = w - LR * (w * m - 1) * m
    slope = -sign / (1 + np.exp(sign * v * w * m))  # of the cross-entropy, by the second logit
    by_w = (slope * v * m + WEIGHT * (w * m - 1) * m) * (1 - LR * m**2) ** steps
    supervised = np.log1p(np.exp(-sign * v * w * m)).mean()
    assert terms["classification_loss"].item() == pytest.approx(supervised, rel=1e-10)
    assert terms["objective_loss"].item() == pytest.approx(((w * m - 1) ** 2).mean() / 2, rel=1e-10)
    terms["loss"].backward()
    assert toy.encoder.grad.item() == pytest.approx(by_w.mean(), rel=1e-10)
    assert toy.classifier.grad.item() == pytest.approx((slope * w * m).mean(), rel=1e-10)


@KINDS
@pytest.mark.parametrize(("steps", "clipped"), [(1, False), (2, True)])
def test_second_derivatives_are_those_of_every_image_on_its_own(kind, steps, clipped):
    network, objective, batch = setting(kind)
    with sdpa_kernel(SDPBackend.MATH):
        clip = None
        if clipped:
            _, norms = one_by_one(network, objective, batch, steps)
            clip = float(np.median(norms))
        expected, norms = one_by_one(network, objective, batch, steps, clip)
        first_order, _ = one_by_one(network, objective, batch, steps, clip, second_order=False)
        expected_gradients = gradients(expected, network)
        first_order_gradients = gradients(first_order, network)
    assert not clipped or min(norms) < clip < max(norms)
    loss = meta_loss(objective, WEIGHT, LR, steps, clip)
    terms = loss(network.train(), batch, torch_generator(1))
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-10)
    assert_same(gradients(terms["loss"], network), expected_gradients)
    # Without a difference the test would say nothing about second derivatives.
    assert difference(first_order_gradients, expected_gradients) > 1e-2


def test_gradient_is_that_of_central_differences():
    network, objective, batch = setting("mae-layernorm")  # smooth, and no gradient is stopped
    loss = meta_loss(objective, WEIGHT, LR, 2, clip=0.01)
    parts = gradients(loss(network, batch, torch_generator(1))["loss"], network)
    parameters, generator = dict(network.named_parameters()), torch_generator(2)
    directions = {
        name: torch.randn(part.shape, generator=generator, dtype=part.dtype)
        for name, part in parts.items()
    }
    slope = sum((part * directions[name]).sum() for name, part in parts.items()).item()

    @torch.no_grad()
    def move(distance: float) -> None:
        for name, direction in directions.items():
            parameters[name] += distance * direction

    values, step = [], 1e-6
    for distance in (step, -2 * step):
        move(distance)
        values.append(loss(network, batch, torch_generator(1))["loss"].item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


@KINDS
def test_without_inner_steps_it_is_joint_training(kind):
    network, objective, _ = setting(kind)
    # ClusT3's loss is not a mean over images.
    count = 1 if kind.startswith("clust3") else IMAGES
    batch = batch_of(objective, pairs=1, count=count)
    joint = joint_loss(objective, WEIGHT)(network.eval(), batch, torch_generator(1))
    expected = gradients(joint["loss"], network)
    for options in ({"inner_lr": 0.0}, {"inner_lr": LR, "inner_steps": 0}):
        terms = meta_loss(objective, WEIGHT, **options)(network.train(), batch, torch_generator(1))
        assert terms.keys() == joint.keys()
        for name, value in joint.items():
            assert terms[name].item() == pytest.approx(value.item(), rel=1e-10)
        assert_same(gradients(terms["loss"], network), expected)


@pytest.mark.slow
@KINDS
def test_training_moves_all_parts_but_no_statistics(kind):
    network, objective, _ = setting(kind)
    network.float()
    before = copy.deepcopy(network.state_dict())
    views = {
        "classify": Views(1, trainings.VIEWS),
        "objective": Views(PAIRS * objective.num_views, trainings.VIEWS),
    }
    modes = []

    def loss(model, batch, generator) -> dict[str, Tensor]:
        terms = meta_loss(objective, WEIGHT, LR)(model, batch, generator)
        modes.append([module.training for module in network.encoder.modules()])
        return terms

    task = Task("finetune", PARTS, loss, views, Recipe(epochs=1, batch_size=5, lr=1e-2))
    # The loss is computed in single precision whatever the setting, as test-time training is.
    curves = []
    for precision in ("bf16", "32"):
        trainer, trained = Trainer(open_fabric("cpu", precision), seed=5), copy.deepcopy(network)
        rows = trainer.fit(trained, trainings.image_set(10), task)
        curves.append([{**row, "seconds": 0} for row in rows])
    assert curves[0] == curves[1]
    Trainer(open_fabric("cpu", "32"), seed=5).fit(network, trainings.image_set(10), task)
    changed = {
        name for name, value in network.state_dict().items() if not torch.equal(value, before[name])
    }
    assert {name.partition(".")[0] for name in changed} == set(PARTS)
    assert not changed & {name for name, _ in network.named_buffers()}
    assert all(all(mode) for mode in modes)


def test_what_is_frozen_takes_no_inner_step():
    network, objective, batch = setting("simsiam-groupnorm")
    network.encoder.conv1.requires_grad_(False)
    network.encoder.bn1.requires_grad_(False)
    expected, _ = one_by_one(network, objective, batch)
    terms = meta_loss(objective, WEIGHT, LR, clip=None)(network, batch, torch_generator(1))
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-10)
    assert_same(gradients(terms["loss"], network), gradients(expected, network))
    network.encoder.requires_grad_(False)
    network.head.requires_grad_(False)
    with pytest.raises(UserError, match="found none among the 2 trainable ones"):
        meta_loss(objective, WEIGHT, LR)(network, batch, torch_generator(1))


@pytest.mark.parametrize("kind", ["simsiam-groupnorm", "learned-groupnorm", "mae-layernorm"])
def test_an_inner_step_of_the_norms_moves_nothing_else_and_all_is_trained(kind):
    network, objective, batch = setting(kind)
    moved = tuple(select_parameters(network, "norm"))
    assert moved
    with sdpa_kernel(SDPBackend.MATH):
        expected, _ = one_by_one(network, objective, batch, moved=moved)
        everything, _ = one_by_one(network, objective, batch)
        expected_gradients = gradients(expected, network)
    assert abs(expected.item() - everything.item()) > 1e-4
    loss = meta_loss(objective, WEIGHT, LR, clip=None, trainable="norm")
    terms = loss(network.train(), batch, torch_generator(1))
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-10)
    assert_same(gradients(terms["loss"], network), expected_gradients)
    assert {name.partition(".")[0] for name in expected_gradients} == set(PARTS)


def test_the_step_begins_after_some_epochs_and_the_head_with_it():
    """Until then nothing reads the head, which not even weight decay changes."""
    network, objective, _ = setting("learned-groupnorm")
    network.float()
    views = {name: Views(1, trainings.VIEWS) for name in ("classify", "objective")}
    inner = {"lr": LR, "steps": 1, "pairs": 1, "trainable": "norm", "after": 2}
    loss, heads = supervised_loss("meta", objective, 0.0, inner), {}

    def report(_name: str, row: dict) -> None:
        heads[row["epoch"]] = (copy.deepcopy(network.head.state_dict()), "objective_loss" in row)

    recipe = Recipe(epochs=3, batch_size=5, lr=1e-2, weight_decay=0.1)
    trainer = Trainer(open_fabric("cpu", "32"), seed=5, report=report)
    trainer.fit(network, trainings.image_set(10), Task("finetune", PARTS, loss, views, recipe))
    for epoch, stepped in ((1, False), (2, False), (3, True)):
        state, told = heads[epoch]
        assert told is stepped
        for name, value in heads[0][0].items():
            assert torch.equal(value, state[name]) is not stepped, (epoch, name)


def test_objectives_that_contrast_images_are_refused():
    with pytest.raises(UserError, match="found SimCLR, which contrasts images"):
        meta_loss(SimCLR(), WEIGHT, LR)


def test_several_processes_are_refused():
    network, objective, batch = setting("simsiam-groupnorm")
    batch["share"] = Share(6, 0, 2)
    with pytest.raises(UserError, match="expected one process, found 2"):
        meta_loss(objective, WEIGHT, LR)(network, batch, torch_generator(1))
    inner = {"lr": LR, "steps": 1, "pairs": PAIRS, "after": 5}
    later = supervised_loss("meta", objective, WEIGHT, inner)
    with pytest.raises(UserError, match="expected one process, found 2"):
        later(network, batch | {"epoch": 1}, torch_generator(1))


def test_fine_tuning_takes_as_many_inner_steps_of_those_weights_as_it_is_told():
    network, objective, batch = setting("simsiam-groupnorm")
    inner = {"lr": LR, "steps": 2, "pairs": PAIRS, "trainable": "norm"}

    def value(loss) -> float:
        return loss(network, batch, torch_generator(1))["loss"].item()

    found = value(supervised_loss("meta", objective, WEIGHT, inner))
    expected, fewer, others = (
        value(meta_loss(objective, WEIGHT, LR, steps, trainable=trainable))
        for steps, trainable in ((2, "norm"), (1, "norm"), (2, "all"))
    )
    assert found == pytest.approx(expected, rel=1e-12)
    assert min(abs(expected - fewer), abs(expected - others)) > 1e-6


@pytest.mark.slow
def test_the_inner_step_learns_to_help():
    """After joint training, the same step on new images hardly changes their classification."""
    held_out = batch_of(MAE(), pairs=1, count=60, seed=9)
    views = {"classify": Views(1, trainings.VIEWS), "objective": Views(1, trainings.VIEWS)}

    def change(inner_steps_in_training: int) -> float:
        """Cross-entropy after an inner step relative to before; mean over three networks."""
        ratios = []
        for seed in range(3):
            network, objective = build_network(
                trainings.MAE, trainings.CLASSES, trainings.SIZE, seed
            )
            loss = meta_loss(objective, 0.1, LR, inner_steps_in_training)
            task = Task("finetune", PARTS, loss, views, Recipe(epochs=8, batch_size=8, lr=3e-3))
            trainings.trainer().fit(network, trainings.image_set(44), task)
            terms = [
                meta_loss(objective, 0.1, LR, steps)(network, held_out, torch_generator(3))
                for steps in (0, 1)
            ]
            before, after = (step_terms["classification_loss"].item() for step_terms in terms)
            ratios.append(after / before)
        return sum(ratios) / len(ratios)

    assert 0.97 < change(0) < 1.03
    assert change(1) < 0.95
