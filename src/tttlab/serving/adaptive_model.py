"""A trained network with the runs that adapt it, in a folder that stands alone.

Neither the source images nor params.yaml are needed to adapt by it: what methods measure on source
images is kept beside the weights.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from tttlab.adaptation import registry
from tttlab.adaptation.gate import Gate
from tttlab.adaptation.method import Method
from tttlab.adaptation.task import Task
from tttlab.config.inner_loop import Augmentation, InnerLoop
from tttlab.errors import UserError, choices
from tttlab.networks import checkpoints, source_statistics

_FILE, _NETWORK, _STATISTICS = "model.json", "network", "source_stats"


@dataclass(frozen=True)
class ServedRun:
    """One run on a network, with what tuning chose.

    Attributes:
        task: network, method, inner loop, source statistics and seed.
        gate: tells which images to adapt to; None: all.
    """

    task: Task
    gate: Gate | None = None

    @property
    def takes_steps(self) -> bool:
        """Whether it trains on an image."""
        return self.task.method.trains and self.task.loop.steps > 0


@dataclass(frozen=True)
class AdaptiveModel:
    """A trained network with the runs that adapt it to single images.

    Attributes:
        name: of the model, as in params.yaml.
        about: the contents of the network's ``network.json``.
        runs: by name; `none`, the network as it is, is one of them.
        best: the run that tuning recommends, on source images alone.
        refused: runs that cannot answer about single images → the reason.
        depth: recorded bits per value of images with more than eight; None: what the file says.
    """

    name: str
    about: dict[str, Any]
    runs: dict[str, ServedRun]
    best: str
    refused: dict[str, str] = field(default_factory=dict)
    depth: int | None = None

    @property
    def classes(self) -> list[str]:
        """Names of the K classes, in the order of the logits."""
        return self.about["classes"]

    @property
    def image_size(self) -> int:
        """Side of the square that the network sees, pixels."""
        return self.about["image_size"]

    @property
    def like(self) -> torch.Tensor:
        """A tensor of the network's device and precision."""
        network = next(iter(self.runs.values())).task.network
        return next(network.parameters())

    def find(self, run: str | None) -> tuple[str, ServedRun]:
        """Give a run by its name; None: the best one.

        Raises:
            UserError: there is no such run, or it cannot answer about single images.
        """
        name = run or self.best
        if name in self.refused:
            raise UserError(f"run: {self.refused[name]}")
        if name not in self.runs:
            raise UserError(f"run: unknown run {name!r}; {choices(name, self.runs)}")
        return name, self.runs[name]


def save(model: AdaptiveModel, folder: Path, network: Path) -> None:
    """Write a model into a folder.

    Args:
        model: what to write.
        folder: created if it does not exist.
        network: the checkpoint folder of its network, which is copied.
    """
    shutil.copytree(network, folder / _NETWORK, dirs_exist_ok=True)
    common = _common({name: run.task.statistics for name, run in model.runs.items()})
    checkpoint = model.about["sha256"]
    source_statistics.save(common, folder / _STATISTICS, checkpoint=checkpoint)
    for name, run in model.runs.items():
        own = {key: value for key, value in run.task.statistics.items() if key not in common}
        if own:
            source_statistics.save(own, folder / _STATISTICS / name, checkpoint=checkpoint)
    described = {
        "name": model.name,
        "best": model.best,
        "depth": model.depth,
        "refused": model.refused,
        "runs": {name: _describe(run) for name, run in model.runs.items()},
    }
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    (folder / _FILE).write_text(text, encoding="utf-8")


def load(folder: Path, device: str | torch.device = "cpu") -> AdaptiveModel:
    """Load what `save` wrote.

    Raises:
        UserError: the folder holds no model, or its parts do not belong together.
    """
    try:
        described = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / _FILE}: expected a model that adapts, found none that can be read; "
            "run the stage register"
        ) from error
    network, about = checkpoints.load(folder / _NETWORK, device)

    def statistics(place: Path) -> dict[str, torch.Tensor]:
        loaded = source_statistics.load(place, about["sha256"])
        return {name: value.to(device) for name, value in loaded.items()}

    common, runs = statistics(folder / _STATISTICS), {}
    for name, run in described["runs"].items():
        place = folder / _STATISTICS / name
        own = statistics(place) if place.is_dir() else {}
        method = registry.load_method(run["method"], _read(run["settings"]))
        loop, gate = InnerLoop(**_read(run["loop"])), run["gate"]
        task = Task(network, method, loop, common | own, run["seed"])
        runs[name] = ServedRun(task, Gate(**gate) if gate else None)
    best, refused, depth = (described[name] for name in ("best", "refused", "depth"))
    return AdaptiveModel(described["name"], about, runs, best, refused, depth)


def _common(statistics: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Give the statistics that all runs share: the very same tensors."""
    first, *others = statistics.values()
    return {
        name: value
        for name, value in first.items()
        if all(other.get(name) is value for other in others)
    }


def _describe(run: ServedRun) -> dict[str, Any]:
    task = run.task
    return {
        "method": type(task.method).__module__,
        "settings": _settings(task.method),
        "loop": asdict(task.loop),
        "gate": asdict(run.gate) if run.gate else None,
        "seed": task.seed,
    }


def _settings(method: Method) -> dict[str, Any]:
    """Give a method's settings as JSON can keep them."""
    values = {part.name: getattr(method, part.name) for part in fields(method)}
    return {
        name: asdict(value) if isinstance(value, Augmentation) else value
        for name, value in values.items()
    }


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn settings from JSON back: lists into tuples, the views' strength into its value."""
    read = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    if isinstance(read.get("augmentation"), dict):
        read["augmentation"] = Augmentation(**read["augmentation"])
    return read
