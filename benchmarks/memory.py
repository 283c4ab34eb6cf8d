"""Peak memory of one group against what it must hold; run in a process of its own, for a CPU only tells a process's peak."""

import json
import resource
import subprocess
import sys

import torch

from benchmarks.cases import Case, list_cases, ordinary_loss, statistics_for
from benchmarks.sides import ours, state_bytes, streams, train_only
from tttlab.group_size import GroupSize


def measure(case: Case, device: torch.device, group: int) -> dict[str, float]:
    """Measure a group of images in a fresh process.

    Returns:
        ``peak_mb`` that adapting added to what the process held before, ``model_mb`` that it must hold: per image its own
        weights and gradients, and the activations that backpropagation keeps; and their ratio.
    """
    command = [sys.executable, "-m", "benchmarks.memory", case.name, str(device), str(group)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def kept_activations(case: Case, network, images: torch.Tensor) -> int:
    """Bytes that an ordinary backward pass over all views keeps, each memory once, without the parameters themselves."""
    train_only(network, case.loop)
    views = case.method.views(network, images, streams(images, 0))
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ordinary_loss(network, case.method, views)
    network.requires_grad_(True)
    return sum(size for place, size in kept.items() if place not in own)


def peak(device: torch.device) -> int:
    """Most bytes held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(name: str, device: torch.device, group: int) -> dict[str, float]:
    """Measure in this process."""
    case = next(case for case in list_cases(device) if case.name == name)
    network = case.build(case.size).to(device)
    images = torch.rand(group, 3, case.size, case.size, device=device)
    statistics = statistics_for(network, case.size)
    ours(case, network, images[:1], statistics, GroupSize(1))  # libraries load their kernels on first use
    before = peak(device)
    ours(case, network, images, statistics, GroupSize(group))
    added = peak(device) - before
    model = group * 2 * state_bytes(case, network) + kept_activations(case, network, images)
    return {"peak_mb": added / 2**20, "model_mb": model / 2**20, "ratio": added / model}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], torch.device(sys.argv[2]), int(sys.argv[3]))))
