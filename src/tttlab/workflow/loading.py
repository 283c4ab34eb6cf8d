"""Loading of one trained network and of one run of params.yaml on it, checked before any work."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from tttlab.adaptation import registry
from tttlab.adaptation.checks import check
from tttlab.adaptation.gate import Gate
from tttlab.adaptation.method import Method
from tttlab.adaptation.method_trial import try_method, watched
from tttlab.adaptation.task import Task, complete_statistics
from tttlab.adaptation.trainable import select_parameters, with_trainable
from tttlab.config.inner_loop import InnerLoop
from tttlab.config.params import Params
from tttlab.config.run_settings import RunSettings
from tttlab.errors import UserError
from tttlab.networks import checkpoints, source_statistics
from tttlab.networks.source_statistics import Statistics
from tttlab.runtime import devices
from tttlab.shifts.streams import Stream
from tttlab.workflow import places
from tttlab.workflow.source_images import source_batches
from tttlab.workflow.tuned import choice_file


@dataclass(frozen=True)
class SourceNetwork:
    """A trained network.

    Attributes:
        network: the network, on its device.
        about: the contents of its ``network.json``.
        statistics: its source statistics.
        device: where it computes.
        open_batches: opens the source images.
        measured: statistics by method, with those that the method measures itself; kept, so that
            it measures once for all settings that leave it unchanged.
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
    """A run that can start: its settings after tuning, and the task made of them."""

    settings: RunSettings
    task: Task


def load_network(
    params: Params, model: str, seed: int, device: torch.device | None = None
) -> SourceNetwork:
    """Load the network of one model and training seed; the default device is ``machine.device``."""
    device = device or devices.choose_device(params.machine.device, params.machine.precision)
    network, about = checkpoints.load(places.OUTPUTS / "finetuned" / model / str(seed), device)
    folder = places.OUTPUTS / "source_stats" / model / str(seed)
    statistics = source_statistics.load(folder, about["sha256"])
    statistics = {name: value.to(device) for name, value in statistics.items()}
    return SourceNetwork(network, about, statistics, device, lambda: source_batches(params, device))


def build_run(
    params: Params, name: str, model: str, source: SourceNetwork, values: Mapping[str, Any]
) -> Ready:
    """Make a run's task with these settings, and check that it fits the network.

    Args:
        params: all settings.
        name: the run.
        model: the model's name.
        source: the model's trained network.
        values: settings that replace the run's own.

    Raises:
        UserError: the run does not fit the network, or its method is wrong.
    """
    settings, trained = params.run_settings(name, model).with_values(values), params.models[model]
    views = params.adapt.augment
    # A self-supervised head needs the views that it was trained on.
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
    """Give the source statistics that a run needs, and try the run if it is new to the network.

    Raises:
        UserError: the run does not fit the network, or its method is wrong.
    """
    watched_method = watched(method)
    # Measuring statistics may take long, so what needs none is looked at before.
    watched_method.check(source.network)
    network = with_trainable(source.network, loop)
    select_parameters(network, loop.trainable)
    statistics = source.measured.get(repr(method), source.statistics)
    statistics = complete_statistics(
        statistics, watched_method, source.network, source.open_batches
    )
    source.measured.setdefault(repr(method), statistics)
    size, protocol = source.about["image_size"], settings.protocol
    none = next(source.network.parameters()).new_empty(0, 3, size, size)
    check(network, none, watched_method, loop, statistics, protocol)
    if name not in source.tried:
        batch_size = params.adapt.online.batch_size
        try_method(source.network, method, loop, statistics, size, protocol, batch_size)
    source.tried.add(name)
    return statistics


def open_stream(params: Params, protocol: str) -> Stream | None:
    """Give the order in which images arrive; None: each is adapted to on its own."""
    return Stream(**params.adapt.online.model_dump()) if protocol == "online" else None


def load_tuned(name: str, model: str) -> dict[str, Any]:
    """Read what the stage `tune` chose for one run and model.

    Raises:
        UserError: there is no readable choice.
    """
    path = choice_file(name, model)
    try:
        choice = json.loads(path.read_text(encoding="utf-8"))
        if {"tuned", "settings", "default", "candidates", "gate"} <= choice.keys():
            return choice
    except (OSError, ValueError, AttributeError):
        pass
    raise UserError(
        f"{path}: expected what tuning chose for {model}, found nothing that can be read; "
        f"run python -m pipeline.tune {name}"
    )


def load_gate(tuned: Mapping[str, Any]) -> Gate | None:
    """Make the gate that tuning chose, if any."""
    return Gate(**tuned["gate"]) if tuned["gate"] else None
