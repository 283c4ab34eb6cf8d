"""The three sides of the comparison, each timed as a whole: ours, the floor and the peers' way."""

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.cases import Case, ordinary_loss
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.inner_loop import make_optimizer
from tttlab.adaptation.trainable import select_parameters
from tttlab.config.inner_loop import InnerLoop
from tttlab.networks.network import Network
from tttlab.runtime.group_size import GroupSize
from tttlab.seeding import torch_generator


def ours(
    case: Case, network: Network, images: Tensor, statistics: Mapping[str, Tensor], group: GroupSize
) -> Tensor:
    """Do all that `adapt` does: views, steps, losses, predictions before and after.

    Returns:
        logits ``(N, K)``.
    """
    statistics = dict(statistics)
    return adapt(
        network, images, case.method, case.loop, statistics=statistics, images_per_step=group
    ).logits


def floor(case: Case, network: Network, images: Tensor) -> None:
    """Take S ordinary training steps, with shared weights, on one batch of the N·V views."""
    network = copy.deepcopy(network)
    optimizer = make_optimizer(train_only(network, case.loop), case.loop)
    views = case.method.views(network, images, streams(images, 0))
    for _ in range(case.steps):
        optimizer.zero_grad()
        ordinary_loss(network, case.method, views).backward()
        optimizer.step()


def peer(case: Case, network: Network, images: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
    """Adapt to one image after the other, on a deep copy of the network, as published codes do.

    Returns:
        logits ``(N, K)``.
    """
    logits, method = [], case.method
    for number, image in enumerate(images):
        model = copy.deepcopy(network)
        optimizer = make_optimizer(train_only(model, case.loop), case.loop)
        state = method.init_state()
        for step in range(case.steps):
            generator = torch_generator(0, "views", str(number), step)
            views = method.views(model, image[None], [generator])
            views = tree_map(lambda value: value[0], views)
            optimizer.zero_grad()
            loss, state = method.loss(Plain(model), views, statistics, state)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            logits.append(model(image[None]).logits[0])
    return torch.stack(logits)


class Plain:
    """A network in the calling form that methods expect."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Run it."""
        return self.module(*arguments, **options)


def train_only(network: Network, loop: InnerLoop) -> list[nn.Parameter]:
    """Freeze all but the trainable parameters, and give these."""
    trainable = list(select_parameters(network, loop.trainable).values())
    network.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return trainable


def streams(images: Tensor, step: int) -> list[torch.Generator]:
    """Open the random streams that `adapt` opens for unnamed images."""
    return [torch_generator(0, "views", str(number), step) for number in range(len(images))]


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Time one call, until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def interleaved(
    sides: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time all sides in turn, ``repeats`` times, so that a disturbance affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, function in sides.items():
            times[name].append(seconds(function, device))
    return times


def state_bytes(case: Case, network: Network) -> int:
    """Count the bytes of one image's own weights."""
    parameters = select_parameters(network, case.trainable).values()
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def bandwidth(device: torch.device) -> float:
    """Measure the bytes per second, read and written, of copying memory."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(5)]
    return 2 * source.numel() * source.element_size() / min(times)
