"""Which device and precision to compute with; only stage scripts choose."""

import resource
import sys

import torch

from tttlab.errors import UserError


def choose_device(wish: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:<n>`` into a device that exists.

    Raises:
        UserError: a GPU is wanted and there is none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wish == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(wish)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"machine.device: expected a GPU for {wish!r}, found {count}; set auto or cpu")
    return device


def peak_memory(device: torch.device) -> float:
    """Largest memory so far, MiB: the GPU's for tensors, else the resident set of this process or its largest worker."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilobytes = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)
