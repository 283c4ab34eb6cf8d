"""The three ways that are compared: ours, the floor, and the peers' way, each timed as a whole."""

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, ordinary_loss
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.inner_loop import InnerLoop, make_optimizer, select_parameters
from tttlab.networks.network import Network
from tttlab.runtime.group_size import GroupSize
from tttlab.seeding import torch_generator


def ours(
    case: Case, network: Network, images: Tensor, statistics: Mapping[str, Tensor], group: GroupSize
) -> Tensor:
    """Everything that `adapt` does: views, steps, loss curve, the prediction without and with; logits ``(N, K)``."""
    return adapt(
        network, images, case.method, case.loop, statistics=dict(statistics), images_per_step=group
    ).logits


def floor(case: Case, network: Network, images: Tensor) -> None:
    """S ordinary training steps with shared weights on the N·V images in one batch, and nothing else."""
    network = copy.deepcopy(network)
    optimizer = make_optimizer(train_only(network, case.loop), case.loop)
    views = case.method.views(network, images, streams(images, 0))
    for _ in range(case.steps):
        optimizer.zero_grad()
        ordinary_loss(network, case.method, views).backward()
        optimizer.step()


def peer(case: Case, network: Network, images: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
    """One image after the other on a deep copy of the network, as published codes do; logits ``(N, K)``."""
    logits = []
    for number, image in enumerate(images):
        own = copy.deepcopy(network)
        optimizer = make_optimizer(train_only(own, case.loop), case.loop)
        state = case.method.init_state()
        for step in range(case.steps):
            views = case.method.views(
                own, image[None], [torch_generator(0, "views", str(number), step)]
            )
            views = (
                {key: value[0] for key, value in views.items()}
                if isinstance(views, dict)
                else views[0]
            )
            optimizer.zero_grad()
            loss, state = case.method.loss(Plain(own), views, statistics, state)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            logits.append(own(image[None]).logits[0])
    return torch.stack(logits)


class Plain:
    """A network behind the calling form that methods expect."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Run it."""
        return self.module(*arguments, **options)


def train_only(network: Network, loop: InnerLoop) -> list[nn.Parameter]:
    """Freeze all but the trainable parameters."""
    chosen = list(select_parameters(network, loop.trainable).values())
    network.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def streams(images: Tensor, step: int) -> list[torch.Generator]:
    """Open the random streams that `adapt` opens for unnamed images."""
    return [torch_generator(0, "views", str(number), step) for number in range(len(images))]


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Time one call, until the device has done its work."""
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
    """Time all sides in turn, again and again, so that whatever disturbs the machine disturbs all of them."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, function in sides.items():
            times[name].append(seconds(function, device))
    return times


def state_bytes(case: Case, network: Network) -> int:
    """Bytes of one image's own weights."""
    return sum(
        value.numel() * value.element_size()
        for value in select_parameters(network, case.trainable).values()
    )


def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying memory."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(5)]
    return 2 * source.numel() * source.element_size() / min(times)
