import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.helpers import networks, trainings
from tttlab.data.pixels import as_images
from tttlab.errors import UserError
from tttlab.networks.checkpoints import build_network
from tttlab.networks.network import Outputs
from tttlab.networks.objective import Objective
from tttlab.objectives.clust3 import ClusT3
from tttlab.objectives.mae import MAE
from tttlab.objectives.rotation import Rotation
from tttlab.objectives.simclr import SimCLR
from tttlab.objectives.simsiam import SimSiam
from tttlab.runtime.ranks import Share, open_fabric
from tttlab.seeding import torch_generator
from tttlab.training.loaders import Views, open_loader
from tttlab.training.meta_training import meta_loss
from tttlab.training.optimisers import Recipe
from tttlab.training.recipes import joint_loss
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
    "mae-layernorm": (networks.vit, MAE(decoder_dim=16)),
}
KINDS = pytest.mark.parametrize("kind", SETTINGS)


def setting(kind: str) -> tuple[nn.Module, Objective, dict]:
    """A network in double precision and in training mode, with dropout, its objective, and a batch."""
    build, objective = SETTINGS[kind]
    network = build()
    network.head = objective.head(network.encoder)
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
    named = {name: value for name, value in network.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: value for name, value in zip(named, found, strict=True) if value is not None}


def with_parameters(network: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """Copy a network and put tensors, with their history, in the place of its parameters."""
    network = copy.deepcopy(network)
    for name, value in parameters.items():
        place, _, leaf = name.rpartition(".")
        module = network.get_submodule(place)
        del module._parameters[leaf]
        setattr(module, leaf, value)
    return network


def one_by_one(
    network: nn.Module,
    objective: Objective,
    batch: dict,
    steps: int = 1,
    clip: float | None = None,
    second_order: bool = True,
) -> tuple[Tensor, list[float]]:
    """The same loss image by image, with autograd alone; → (loss, norms of the inner gradients)."""
    network.eval()
    views = as_images(batch["objective"]).unflatten(1, (-1, objective.num_views))
    losses, norms = [], []
    for number, (own, image, label) in enumerate(
        zip(views, as_images(batch["classify"]), batch["labels"], strict=True)
    ):
        # The masks of all images are one draw, of which each has its share.
        share = (
            Share(views.shape[:2].numel(), number, len(views))
            if isinstance(objective, MAE)
            else None
        )
        start = {name: value for name, value in network.named_parameters() if value.requires_grad}
        parameters = start
        for _ in range(steps):
            loss = objective.loss(
                with_parameters(network, parameters), own, torch_generator(1), share
            )
            found = torch.autograd.grad(
                loss, list(parameters.values()), create_graph=second_order, allow_unused=True
            )
            parts = {
                name: part for name, part in zip(parameters, found, strict=True) if part is not None
            }
            norm = sum(part.square().sum() for part in parts.values()).sqrt()
            norms.append(norm.item())
            factor = clip / norm if clip and norm > clip else 1.0
            parameters = parameters | {
                name: parameters[name] - LR * factor * part for name, part in parts.items()
            }
        adapted = with_parameters(network, parameters)
        supervised = F.cross_entropy(adapted(image).logits, label[None])
        losses.append(supervised + WEIGHT * objective.loss(adapted, own, torch_generator(1), share))
    return sum(losses) / len(losses), norms


def assert_same(
    found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-8
) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        error = (found[name] - wanted[name]).abs().max()
        assert error <= tolerance * max(1.0, wanted[name].abs().max().item()), (name, error)


def difference(ours: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients, as a share of the second's."""
    apart = sum((ours[name] - others[name]).square().sum() for name in others)
    return (apart / sum(part.square().sum() for part in others.values())).sqrt().item()


class Toy(nn.Module):
    """Feature w·m of the mean brightness m; logits (0, v·w·m)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
        self.classifier = nn.Parameter(torch.tensor([1.3], dtype=torch.float64))

    def forward(self, images: Tensor) -> Outputs:
        features = self.encoder * images.double().mean((1, 2, 3))
        return Outputs(
            torch.stack([0 * features, self.classifier * features], 1), features[:, None]
        )


@dataclass(frozen=True)
class One(Objective):
    """½ (feature − 1)²."""

    def loss(self, network, views: Tensor, generator, share=None) -> Tensor:
        return (network(views[:, 0]).features - 1).square().mean() / 2


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_gradient_is_the_closed_form(steps):
    brightness, labels = np.array([40, 130, 250], np.uint8), np.array([0, 1, 1])
    pixels = torch.from_numpy(brightness)[:, None, None, None, None].expand(3, 1, 2, 2, 3)
    batch = {"classify": pixels, "objective": pixels, "labels": torch.from_numpy(labels)}
    toy = Toy()
    terms = meta_loss(One(), WEIGHT, LR, steps, clip=None)(toy, batch, torch_generator(1))
    m = (brightness.astype(np.float32) / 255).astype(np.float64)
    w, v, sign = np.full(3, 0.7), 1.3, 2 * labels - 1
    for _ in range(steps):
        w = w - LR * (w * m - 1) * m
    slope = -sign / (1 + np.exp(sign * v * w * m))  # of the cross-entropy, by the second logit
    by_w = (slope * v * m + WEIGHT * (w * m - 1) * m) * (1 - LR * m**2) ** steps
    assert terms["classification_loss"].item() == pytest.approx(
        np.log1p(np.exp(-sign * v * w * m)).mean(), rel=1e-10
    )
    assert terms["objective_loss"].item() == pytest.approx(((w * m - 1) ** 2).mean() / 2, rel=1e-10)
    terms["loss"].backward()
    assert toy.encoder.grad.item() == pytest.approx(by_w.mean(), rel=1e-10)
    assert toy.classifier.grad.item() == pytest.approx((slope * w * m).mean(), rel=1e-10)


@KINDS
@pytest.mark.parametrize(("steps", "clipped"), [(1, False), (2, True)])
def test_second_derivatives_are_those_of_every_image_on_its_own(kind, steps, clipped):
    network, objective, batch = setting(kind)
    with sdpa_kernel(SDPBackend.MATH):
        clip = (
            float(np.median(one_by_one(network, objective, batch, steps)[1])) if clipped else None
        )
        wanted, norms = one_by_one(network, objective, batch, steps, clip)
        first_order, _ = one_by_one(network, objective, batch, steps, clip, second_order=False)
        wanted_gradients, first_order_gradients = (
            gradients(wanted, network),
            gradients(first_order, network),
        )
    assert not clipped or min(norms) < clip < max(norms)
    terms = meta_loss(objective, WEIGHT, LR, steps, clip)(
        network.train(), batch, torch_generator(1)
    )
    assert terms["loss"].item() == pytest.approx(wanted.item(), rel=1e-10)
    assert_same(gradients(terms["loss"], network), wanted_gradients)
    assert (
        difference(first_order_gradients, wanted_gradients) > 1e-2
    )  # or the comparison would not be about second derivatives


def test_gradient_is_that_of_central_differences():
    network, objective, batch = setting("mae-layernorm")  # smooth, and no gradient is stopped
    loss = meta_loss(objective, WEIGHT, LR, 2, clip=0.01)
    found = gradients(loss(network, batch, torch_generator(1))["loss"], network)
    parameters, generator = dict(network.named_parameters()), torch_generator(2)
    directions = {
        name: torch.randn(part.shape, generator=generator, dtype=part.dtype)
        for name, part in found.items()
    }
    slope = sum((part * directions[name]).sum() for name, part in found.items()).item()

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
    batch = batch_of(
        objective, pairs=1, count=1 if kind.startswith("clust3") else IMAGES
    )  # ClusT3's loss is no mean over images
    joint = joint_loss(objective, WEIGHT)(network.eval(), batch, torch_generator(1))
    wanted = gradients(joint["loss"], network)
    for options in ({"inner_lr": 0.0}, {"inner_lr": LR, "inner_steps": 0}):
        terms = meta_loss(objective, WEIGHT, **options)(network.train(), batch, torch_generator(1))
        assert terms.keys() == joint.keys()
        for name, value in joint.items():
            assert terms[name].item() == pytest.approx(value.item(), rel=1e-10)
        assert_same(gradients(terms["loss"], network), wanted)


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
    # In any precision the loss is computed in full, as test-time training is.
    rows = [
        Trainer(open_fabric("cpu", precision), seed=5).fit(
            copy.deepcopy(network), trainings.image_set(10), task
        )
        for precision in ("bf16", "32")
    ]
    assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]
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
    wanted, _ = one_by_one(network, objective, batch)
    terms = meta_loss(objective, WEIGHT, LR, clip=None)(network, batch, torch_generator(1))
    assert terms["loss"].item() == pytest.approx(wanted.item(), rel=1e-10)
    assert_same(gradients(terms["loss"], network), gradients(wanted, network))
    network.encoder.requires_grad_(False)
    network.head.requires_grad_(False)
    with pytest.raises(UserError, match="found none among the 2 trainable ones"):
        meta_loss(objective, WEIGHT, LR)(network, batch, torch_generator(1))


def test_objectives_that_contrast_images_are_refused():
    with pytest.raises(UserError, match="found simclr, whose negatives are other images"):
        meta_loss(SimCLR(), WEIGHT, LR)


def test_several_processes_are_refused():
    network, objective, batch = setting("simsiam-groupnorm")
    with pytest.raises(UserError, match="expected one process, found 2"):
        meta_loss(objective, WEIGHT, LR)(
            network, batch | {"share": Share(6, 0, 2)}, torch_generator(1)
        )


def test_the_inner_step_learns_to_help():
    """On new images, where after joint training the same step does next to nothing for the classification."""
    held_out = batch_of(MAE(), pairs=1, count=60, seed=9)
    views = {"classify": Views(1, trainings.VIEWS), "objective": Views(1, trainings.VIEWS)}

    def change(inner_steps_in_training: int) -> float:
        """Cross-entropy after an inner step as a share of that before, mean over three networks."""
        shares = []
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
            before, after = (found["classification_loss"].item() for found in terms)
            shares.append(after / before)
        return sum(shares) / len(shares)

    assert 0.97 < change(0) < 1.03
    assert change(1) < 0.95
