"""What one run of params.yaml needs of one trained network, checked before any work."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from tttlab.adaptation import registry
from tttlab.adaptation.gate import Gate
from tttlab.adaptation.inner_loop import InnerLoop, select_parameters
from tttlab.adaptation.method import Method
from tttlab.adaptation.method_trial import try_method, watched
from tttlab.config.params import Params
from tttlab.config.run_settings import RunSettings
from tttlab.data.views import Augmentation
from tttlab.errors import UserError
from tttlab.experiments import sweep
from tttlab.networks import checkpoints, source_statistics
from tttlab.networks.source_statistics import Statistics
from tttlab.runtime import devices
from tttlab.shifts.streams import Stream
from tttlab.workflow import places
from tttlab.workflow.source_images import source_batches


class Source(NamedTuple):
    """A trained network, what ``network.json`` says of it, its source statistics, and where it computes."""

    network: nn.Module
    about: dict[str, Any]
    statistics: Statistics
    device: torch.device
    batches: Callable[[], Iterable[torch.Tensor]]  # opens the source images
    measured: dict[
        str, Statistics
    ]  # what a method measures itself, by method: once, whatever settings are tuned
    tried: set[str]  # the runs that have been tried on this network


class Ready(NamedTuple):
    """A run that can start: its settings, with what tuning chose, and what they make."""

    settings: RunSettings
    method: Method
    loop: InnerLoop
    statistics: Statistics


def load_source(
    params: Params, model: str, seed: int, device: torch.device | None = None
) -> Source:
    """Load the network of one model and training seed; ``device`` None: as ``machine.device`` says."""
    device = device or devices.choose_device(params.machine.device, params.machine.precision)
    network, about = checkpoints.load(places.OUTPUTS / "finetuned" / model / str(seed), device)
    statistics = source_statistics.load(
        places.OUTPUTS / "source_stats" / model / str(seed), about["sha256"]
    )
    statistics = {name: value.to(device) for name, value in statistics.items()}
    return Source(
        network, about, statistics, device, lambda: source_batches(params, device), {}, set()
    )


def build_run(
    params: Params, name: str, model: str, source: Source, values: Mapping[str, Any]
) -> Ready:
    """Make a run's method and inner loop, with the settings in ``values`` replaced, and check that they fit the network."""
    chosen, trained = params.run_settings(name, model).with_values(values), params.models[model]
    # A self-supervised head knows the views that it was trained on.
    own, views = (
        Augmentation(**given.model_dump())
        for given in (trained.pretrain.augment, params.adapt.augment)
    )
    objective = trained.objective.model_dump() | {"augmentation": own}
    method = registry.load_method(
        chosen.method, chosen.settings, objective=objective, augmentation=views
    )
    loop = sweep.inner_loop(chosen.adapter.model_dump(), views)
    return Ready(chosen, method, loop, fit(params, name, model, source, chosen, method, loop))


def fit(
    params: Params,
    name: str,
    model: str,
    source: Source,
    chosen: RunSettings,
    method: Method,
    loop: InnerLoop,
) -> Statistics:
    """Give the source statistics that a run needs of a network; the first time the run is tried on it.

    Raises:
        UserError: what does not fit, or is wrong with the method.
    """
    try:
        tried = watched(method)
        tried.check(source.network)
        select_parameters(source.network, loop.trainable)
        known = source.measured.get(repr(method), source.statistics)
        known = source.measured.setdefault(
            repr(method), sweep.complete(known, tried, source.network, source.batches)
        )
        if name not in source.tried:
            size, batch_size = source.about["image_size"], params.adapt.online.batch_size
            try_method(source.network, method, loop, known, size, chosen.protocol, batch_size)
    except UserError as error:
        raise UserError(f"adapt.runs.{name}, method {chosen.method} on {model}: {error}") from error
    source.tried.add(name)
    return known


def open_stream(params: Params, protocol: str) -> Stream | None:
    """Say how images arrive; None: each is adapted to on its own, so that their order does not matter."""
    return Stream(**params.adapt.online.model_dump()) if protocol == "online" else None


def load_tuned(name: str, model: str) -> dict[str, Any]:
    """Read what the stage `tune` chose for one run and model; a `UserError` says that it has not."""
    path = places.OUTPUTS / "tuned" / f"{name}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[model]
        if {"tuned", "settings", "default", "candidates", "gate"} <= found.keys():
            return found
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass
    raise UserError(
        f"{path}: expected what tuning chose for {model}, found nothing that can be read; run python -m pipeline.tune {name}"
    )


def load_gate(tuned: Mapping[str, Any]) -> Gate | None:
    """Make the gate that tuning chose, if it chose one."""
    return Gate(**tuned["gate"]) if tuned["gate"] else None
