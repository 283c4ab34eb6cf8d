"""Tiny real trainings, shared by the tests and by the process that one of them kills."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
import torch

from tttlab.config.inner_loop import Augmentation
from tttlab.data.image_sets import ImageSet
from tttlab.networks.checkpoints import build_network
from tttlab.networks.network import Network
from tttlab.runtime.ranks import open_fabric
from tttlab.runtime.resuming import Work
from tttlab.training.loaders import Views
from tttlab.training.losses import classification_loss
from tttlab.training.optimisers import Recipe
from tttlab.training.recipes import finetune, pretrain
from tttlab.training.trainer import Task, Trainer

SIMCLR = {
    "backbone": "resnet18",
    "backbone_options": {
        "layers": [1, 1, 1, 1],
        # With fewer than 8 oneDNN can crash on any CPU (docs/limits.md), with fewer than 16 where
        # two threads share the work (docs/design.md, fact 18): tests/conftest.py allows one.
        "channels": [8, 8, 8, 8],
        "stem_type": "deep",
        "stem_width": 4,
    },
    "stem": "stride2",
    "objective": {"name": "simclr", "temperature": 0.5, "hidden_dim": 8, "projection_dim": 4},
}
MAE = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_options": {
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "patch_size": 4,
        "proj_drop_rate": 0.2,
    },
    "objective": {
        "name": "mae",
        "mask_ratio": 0.5,
        "decoder_dim": 8,
        "decoder_depth": 1,
        "decoder_heads": 2,
    },
}
ROTATION = SIMCLR | {"objective": {"name": "rotation", "shared_stages": 2}}
SIMSIAM = SIMCLR | {
    "objective": {"name": "simsiam", "hidden_dim": 8, "projection_dim": 8, "prediction_dim": 4}
}
CLUST3 = SIMCLR | {"objective": {"name": "clust3", "stages": [1, 2], "heads": 2, "clusters": 3}}
IT3 = SIMCLR | {"objective": {"name": "it3", "stage": 2}}
OF_EACH = {
    settings["objective"]["name"]: settings
    for settings in (SIMCLR, MAE, ROTATION, SIMSIAM, CLUST3, IT3)
}
VIEWS = Augmentation(min_scale=0.5, flip=True, jitter=0.5)
SIZE, CLASSES = 16, 3


def image_set(count: int = 22, seed: int = 0) -> ImageSet:
    """Draw images of four squares of random colours, tinted by class."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    squares = generator.integers(0, 130, (count, 2, 2, 3))
    squares[np.arange(count), :, :, labels] += 120
    pixels = squares.repeat(SIZE // 2, axis=1).repeat(SIZE // 2, axis=2)
    names = tuple(f"{seed}-{number}" for number in range(count))
    return ImageSet(pixels.astype(np.uint8), labels, names, tuple("abc"))


def build(settings: dict) -> tuple:
    return build_network(settings, CLASSES, SIZE, seed=3)


def trainer(work: Work | None = None, workers: int = 0, **options) -> Trainer:
    return Trainer(open_fabric("cpu", "32"), seed=5, workers=workers, work=work, **options)


def train(
    settings: dict, work: Work | None = None, die_in: tuple[str, int] | None = None
) -> tuple[Network, list]:
    """Pretrain and fine-tune for three epochs each, and refit the head.

    ``die_in``, a task and its epoch: the process kills itself then.
    """

    def report(task: str, row: dict) -> None:
        if die_in == (task, row["epoch"]):  # this epoch is computed, but not yet saved
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    network, objective = build(settings)
    fitter = trainer(work, report=report)
    recipe = Recipe(epochs=3, batch_size=8, lr=1e-2, warmup_epochs=1)
    images, held_out = image_set(), image_set(9, seed=1)
    curve = pretrain(fitter, network, objective, images, (images, held_out), VIEWS, recipe)
    curves = finetune(
        fitter,
        network,
        objective,
        images,
        held_out,
        recipe,
        mode="full",
        augmentation=VIEWS,
        objective_augmentation=VIEWS,
    )
    return network, [curve, *curves]


def lose_a_worker() -> None:
    """Train while the worker process that augments images is killed during the first step.

    torch then raises an error at whatever line this process has reached.
    """

    def loss(model, batch, generator):
        for worker in psutil.Process().children():
            worker.kill()
        return classification_loss(model, batch, generator)

    network, _ = build(SIMCLR)
    recipe = Recipe(epochs=9, batch_size=8, lr=1e-2)
    task = Task("t", ("classifier",), loss, {"classify": Views(1, VIEWS)}, recipe)
    trainer(workers=1).fit(network, image_set(), task)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(lose_a_worker())
    with Work(Path(sys.argv[1])) as unfinished:
        train(OF_EACH[sys.argv[2]], unfinished, (sys.argv[3], int(sys.argv[4])))
