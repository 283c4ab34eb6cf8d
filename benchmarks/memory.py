"""Peak memory of one group beside the least that it must hold."""

import itertools
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Case, ordinary_loss, statistics_for
from benchmarks.sides import floor, ours, state_bytes, streams, train_only
from tttlab.networks.network import Network
from tttlab.runtime.group_size import GroupSize


def measure(case: Case, device: torch.device, group: int) -> dict[str, float]:
    """Measure one group of images, by what PyTorch allocates.

    Returns:
        ``peak_mb``, the peak of adapting the group; ``model_mb``, the least that it must hold (each
        image's weights and gradients, and the activations that backpropagation keeps); ``ratio`` of
        both; and ``ordinary_mb``, the peak of training shared weights on as many views.
    """
    network = case.build(case.size).to(device)
    images = torch.rand(group, 3, case.size, case.size, device=device)
    statistics = statistics_for(network, case.size) if case.method.needs else {}
    peak = peak_bytes(lambda: ours(case, network, images, statistics, GroupSize(group)), device)
    ordinary = peak_bytes(lambda: floor(case, network, images), device)
    model = group * 2 * state_bytes(case, network) + kept_activations(case, network, images)
    return {
        "peak_mb": peak / 2**20,
        "model_mb": model / 2**20,
        "ratio": peak / model,
        "ordinary_mb": ordinary / 2**20,
    }


def kept_activations(case: Case, network: Network, images: torch.Tensor) -> int:
    """Count the bytes that an ordinary backward pass over all views keeps, without parameters.

    Tensors that share memory count once.
    """
    train_only(network, case.loop)
    views = case.method.views(network, images, streams(images, 0))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}  # address → bytes

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ordinary_loss(network, case.method, views)
    network.requires_grad_(True)
    return sum(size for address, size in kept.items() if address not in parameters)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Find the most bytes that PyTorch holds during a call beyond those it held before."""
    function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes), default=0)
