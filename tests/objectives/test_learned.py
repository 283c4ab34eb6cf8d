"""The learned task: values by hand, what trains it, what stays random, one image at test time."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import networks, trainings
from tttlab.adaptation.adapter import adapt
from tttlab.config.inner_loop import InnerLoop
from tttlab.data.pixels import as_images
from tttlab.errors import UserError
from tttlab.methods.learned import LearnedTraining
from tttlab.networks.checkpoints import build_network, load, save
from tttlab.networks.taps import record
from tttlab.objectives.learned import Learned, reconstruction_error
from tttlab.objectives.simsiam import SimSiam
from tttlab.seeding import torch_generator
from tttlab.training.loaders import Views, open_loader
from tttlab.training.meta_training import meta_loss
from tttlab.training.optimisers import Recipe
from tttlab.training.recipes import finetune
from tttlab.training.trainer import Task

# Encoder, stage, pixels between two positions of its map.
PLACES = [("learned", "layer3", 4), ("learned_vit", "blocks.1", 4)]


@pytest.mark.parametrize(("kind", "stage", "stride"), PLACES)
def test_the_error_is_half_the_distance_of_two_linear_maps_at_every_place(kind, stage, stride):
    network, _ = networks.source_statistics(kind)
    images = networks.images(2, seed=1).double()
    with record(network, [f"encoder.{stage}"]) as activations, torch.no_grad():
        network(images)
        loss = Learned().loss(network, images[:, None], torch_generator(0)).item()
    features = activations[f"encoder.{stage}"]
    if kind == "learned_vit":  # the first token is the class token
        features = features[:, 1:].mT.unflatten(-1, (4, 4))
    head, pixels = network.head, network.normalise(images).numpy()
    decoder, projection = (
        layer.weight.detach().numpy() for layer in (head.decoder, head.projection)
    )
    biases = [layer.bias.detach().numpy() for layer in (head.decoder, head.projection)]
    errors = []
    for image, values in zip(pixels, features.numpy(), strict=True):
        for row, column in np.ndindex(values.shape[1:]):
            rows = slice(row * stride, (row + 1) * stride)
            columns = slice(column * stride, (column + 1) * stride)
            reconstruction = decoder[:, :, 0, 0] @ values[:, row, column] + biases[0]
            target = np.einsum("dcij,cij->d", projection, image[:, rows, columns]) + biases[1]
            errors.append(((reconstruction - target) ** 2).sum() / 2)
    assert len(errors) == 2 * (networks.SIZE // stride) ** 2
    assert loss == pytest.approx(np.mean(errors), rel=1e-10)
    assert loss > 0.01


def test_maps_of_another_size_are_compared_where_both_are():
    wide, narrow = torch.arange(9.0).view(1, 1, 3, 3), torch.zeros(1, 1, 2, 2)
    for maps in ((wide, narrow), (narrow, wide)):
        assert reconstruction_error(*maps).item() == (0 + 1 + 9 + 16) / 4 / 2


@pytest.mark.parametrize("trained", [True, False])
def test_the_step_teaches_the_task_unless_it_is_kept_random(trained, tmp_path):
    """Without weight in the outer loss, decoder and projection learn through the step alone."""
    settings = trainings.MAE | {
        "objective": {"name": "learned", "stage": 1, "dim": 4, "trained": trained}
    }
    network, objective = build_network(settings, trainings.CLASSES, trainings.SIZE, seed=0)
    before = copy.deepcopy(network.state_dict())
    views = {"classify": Views(1, trainings.VIEWS)}
    task = Task(
        "finetune",
        ("encoder", "classifier", "head"),
        meta_loss(objective, 0.0, 0.5, trainable="norm"),
        views,
        Recipe(epochs=1, batch_size=8, lr=1e-2),
    )
    trainings.trainer().fit(network, trainings.image_set(16), task)
    moved = {
        name.partition(".")[0]
        for name, value in network.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved == {"encoder", "classifier"} | ({"head"} if trained else set())
    save(network, tmp_path, settings=settings, classes=("a", "b", "c"), image_size=trainings.SIZE)
    loaded, _ = load(tmp_path)
    assert all(parameter.requires_grad is trained for parameter in loaded.head.parameters())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name


def test_training_draws_no_view_but_the_one_that_is_classified():
    drawn = {}

    class Watching:
        def fit(self, network, images, task):
            drawn[type(objective).__name__] = set(task.views)
            return []

    inner, images = {"lr": 0.1, "steps": 1, "pairs": 1}, trainings.image_set(6)
    for objective in (Learned(), SimSiam()):
        finetune(
            Watching(),
            networks.resnet("groupnorm1"),
            objective,
            images,
            images,
            Recipe(epochs=1, batch_size=6, lr=0.1),
            mode="meta",
            objective_weight=0.0,
            inner=inner,
            augmentation=trainings.VIEWS,
            objective_augmentation=trainings.VIEWS,
        )
    assert drawn == {"Learned": {"classify"}, "SimSiam": {"classify", "objective"}}


def test_one_image_takes_the_step_that_training_took():
    """The adapter's step on an image gives the logits of the same step in meta-training."""
    network = networks.resnet("groupnorm1", objective=Learned(stage=4, dim=5))
    network = networks.decoding(network).double()
    view = {"classify": Views(1, trainings.VIEWS)}
    batch = next(iter(open_loader(trainings.image_set(6), view, 6, seed=0)))
    terms = meta_loss(Learned(), 0.0, 0.3, trainable="norm")(network, batch, torch_generator(0))
    images = as_images(batch["classify"][:, 0]).double()
    loop = InnerLoop(steps=1, optimizer="sgd", lr=0.3, trainable="norm", clip=10.0)
    adapted = adapt(network, images, LearnedTraining(), loop, image_ids=list("abcdef"))
    loss = F.cross_entropy(adapted.logits, batch["labels"])
    assert loss.item() == pytest.approx(terms["classification_loss"].item(), rel=1e-6)
    unadapted = F.cross_entropy(network(images).logits, batch["labels"]).item()
    assert abs(loss.item() - unadapted) > 1e-3


def test_an_untrained_step_moves_nothing_unless_the_task_is_to_stay_random():
    images, loop = networks.images(3), InnerLoop(steps=1, lr=1.0, trainable="norm")
    for trained in (True, False):
        network = networks.resnet("groupnorm1", objective=Learned(stage=4, trained=trained))
        adapted = adapt(network, images, LearnedTraining(), loop, image_ids=list("abc"))
        change = (adapted.logits - adapted.source_logits).abs().max().item()
        assert (change > 1e-4) is not trained


def test_backbones_and_stages_that_do_not_fit_are_refused():
    encoder = networks.resnet().encoder
    with pytest.raises(UserError, match=r"objective.stage: expected numbers from 1 to 4, .*\[5\]"):
        Learned(stage=5).head(encoder)
    with pytest.raises(UserError, match="needs a backbone with stages that timm can stop at"):
        Learned().head(nn.Linear(2, 2))
