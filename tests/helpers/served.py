"""A small model with several runs, as it is served."""

from pathlib import Path

import torch

from tests.helpers import contract, networks
from tttlab.adaptation.gate import Gate
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import Augmentation, InnerLoop
from tttlab.networks import checkpoints
from tttlab.serving import adaptive_model
from tttlab.serving.adaptive_model import AdaptiveModel, ServedRun

SETTINGS = {
    "backbone": "resnet18",
    "backbone_options": networks.RESNET,
    "stem": "small",
    "objective": {"name": "simclr", "hidden_dim": 16, "projection_dim": 8},
}
CLASSES = ["ant", "bee", "cat", "dog"]
LOOPS = {
    "none": InnerLoop(steps=0),
    "shrink": InnerLoop(steps=0, normalisation="shrink", threshold=2.0),
    "averaged": InnerLoop(steps=0, average=3, augmentation=Augmentation(min_scale=0.5)),
    "memo": InnerLoop(steps=2, lr=0.05, normalisation="mixed", trainable="norm"),
    "simclr": InnerLoop(steps=2, lr=0.1, trainable=("encoder.layer4", "encoder.layer3")),
}
METHODS = {"memo": "memo", "simclr": "simclr"}
GATES = {"memo": Gate("distance", 1.5), "simclr": Gate("confidence", 1.0)}


def model(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[AdaptiveModel, Path]:
    """Make a model with a network of its own; also → the folder of its checkpoint."""
    network = networks.resnet()
    about = checkpoints.save(network, folder, settings=SETTINGS, classes=CLASSES, image_size=16)
    network, runs, statistics = network.to(dtype), {}, None
    for name, loop in LOOPS.items():
        method = contract.load(METHODS.get(name, "none"))
        _, measured = contract.source("resnet", method)
        statistics = statistics or {key: value.to(dtype) for key, value in measured.items()}
        own = {key: value.to(dtype) for key, value in measured.items() if key not in statistics}
        task = Task(network, method, loop, statistics | own, seed=3)
        runs[name] = ServedRun(task, GATES.get(name))
    refused = {"tent": "tent, which adapts along a stream of images, not to a single one"}
    return AdaptiveModel("m", about, runs, "memo", refused), folder


def written(folder: Path) -> Path:
    """Write the model into ``folder/served``; → that folder."""
    served, network = model(folder / "network")
    adaptive_model.save(served, folder / "served", network)
    return folder / "served"
