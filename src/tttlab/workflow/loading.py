"""What one run of params.yaml needs of one trained network, checked before any work."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from tttlab.adaptation import registry
from tttlab.adaptation.gate import Gate
from tttlab.adaptation.inner_loop import InnerLoop
from tttlab.adaptation.method import Method
from tttlab.adaptation.method_code import method_code
from tttlab.adaptation.method_trial import try_method, watched
from tttlab.adaptation.task import Task, complete_statistics
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.params import Params
from tttlab.config.run_settings import RunSettings
from tttlab.errors import UserError
from tttlab.networks import checkpoints, source_statistics
from tttlab.networks.source_statistics import Statistics
from tttlab.runtime import devices
from tttlab.shifts.streams import Stream
from tttlab.workflow import places
from tttlab.workflow.choices import choice_file
from tttlab.workflow.source_images import source_batches


@dataclass(frozen=True)
class SourceNetwork:
    """A trained network.

    Attributes:
        network: the network, on its device.
        about: what ``network.json`` says of it.
        statistics: its source statistics.
        device: where it computes.
        open_batches: opens the source images.
        measured: what a method measures itself, by method: once, whatever settings are tuned.
        tried: the runs that have been tried on this network.
    """

    network: nn.Module
    about: dict[str, Any]
    statistics: Statistics
    device: torch.device
    open_batches: Callable[[], Iterable[torch.Tensor]]
    measured: dict[str, Statistics] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)


class Ready(NamedTuple):
    """A run that can start: its settings, with what tuning chose, and the task that they make."""

    settings: RunSettings
    task: Task


def load_source(
    params: Params, model: str, seed: int, device: torch.device | None = None
) -> SourceNetwork:
    """Load the network of one model and training seed; ``device`` None: as ``machine.device`` says."""
    device = device or devices.choose_device(params.machine.device, params.machine.precision)
    network, about = checkpoints.load(places.OUTPUTS / "finetuned" / model / str(seed), device)
    folder = places.OUTPUTS / "source_stats" / model / str(seed)
    statistics = source_statistics.load(folder, about["sha256"])
    statistics = {name: value.to(device) for name, value in statistics.items()}
    return SourceNetwork(network, about, statistics, device, lambda: source_batches(params, device))


def build_run(
    params: Params, name: str, model: str, source: SourceNetwork, values: Mapping[str, Any]
) -> Ready:
    """Make a run's task, with the settings in ``values`` replaced, and check that it fits the network."""
    settings, trained = params.run_settings(name, model).with_values(values), params.models[model]
    views = params.adapt.augment
    # A self-supervised head knows the views that it was trained on.
    objective = trained.objective.model_dump() | {"augmentation": trained.pretrain.augment}
    method = registry.load_method(
        settings.method, settings.settings, objective=objective, augmentation=views
    )
    loop = replace(settings.loop, augmentation=views)
    try:
        statistics = fit(params, name, source, settings, method, loop)
    except UserError as error:
        raise UserError(
            f"adapt.runs.{name}, method {settings.method} on {model}: {error}"
        ) from error
    return Ready(settings, Task(source.network, method, loop, statistics, params.seed))


def fit(
    params: Params,
    name: str,
    source: SourceNetwork,
    settings: RunSettings,
    method: Method,
    loop: InnerLoop,
) -> Statistics:
    """Give the source statistics that a run needs of a network; the first time the run is tried on it.

    Raises:
        UserError: what does not fit, or is wrong with the method.
    """
    checked = watched(method)
    checked.check(source.network)
    select_parameters(source.network, loop.trainable)
    statistics = source.measured.get(repr(method), source.statistics)
    statistics = complete_statistics(statistics, checked, source.network, source.open_batches)
    source.measured.setdefault(repr(method), statistics)
    if name not in source.tried:
        size, batch_size = source.about["image_size"], params.adapt.online.batch_size
        protocol = settings.protocol
        try_method(source.network, method, loop, statistics, size, protocol, batch_size)
    source.tried.add(name)
    return statistics


def settings_of(params: Params, name: str, model: str) -> dict[str, Any]:
    """Give all that a run is made of on one model, but for its network and what is searched."""
    settings, trained = params.run_settings(name, model), params.models[model]
    return {
        "loop": asdict(replace(settings.loop, augmentation=params.adapt.augment)),
        "objective": trained.objective.model_dump(mode="json"),
        "objective_views": asdict(trained.pretrain.augment),
        "online": params.adapt.online.model_dump(mode="json"),
        "source_stats": params.source_stats.model_dump(mode="json"),
        "seed": params.seed,
        "protocol": settings.protocol,
        "method": settings.method,
        "settings": settings.settings,
        "code": method_code(settings.method),
    }


def open_stream(params: Params, protocol: str) -> Stream | None:
    """Say how images arrive; None: each is adapted to on its own, so that their order does not matter."""
    return Stream(**params.adapt.online.model_dump()) if protocol == "online" else None


def load_tuned(name: str, model: str) -> dict[str, Any]:
    """Read what the stage `tune` chose for one run and model; a `UserError` says that it has not."""
    path = choice_file(name, model)
    try:
        choice = json.loads(path.read_text(encoding="utf-8"))
        if {"tuned", "settings", "default", "candidates", "gate"} <= choice.keys():
            return choice
    except (OSError, ValueError, AttributeError):
        pass
    raise UserError(
        f"{path}: expected what tuning chose for {model}, found nothing that can be read; run python -m pipeline.tune {name}"
    )


def load_gate(tuned: Mapping[str, Any]) -> Gate | None:
    """Make the gate that tuning chose, if it chose one."""
    return Gate(**tuned["gate"]) if tuned["gate"] else None
