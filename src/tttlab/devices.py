"""Which device and precision to compute with; only stage scripts choose."""

import resource
import sys

import torch

from tttlab.errors import UserError


def choose_device(wish: str, precision: str = "auto") -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:<n>`` into a device that exists.

    Args:
        wish: the device.
        precision: ``32`` has a GPU compute float32 as such; else its convolutions may keep ten bits of the mantissa (TF32),
            which is faster and moves a logit in the third digit.

    Raises:
        UserError: a GPU is wanted and there is none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count and precision == "32":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if wish == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(wish)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"machine.device: expected a GPU for {wish!r}, found {count}; set auto or cpu")
    return device


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` count anew from here, on a GPU; a process's resident set only ever grows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """Largest memory so far, MiB: the GPU's for tensors, else the resident set of this process or its largest worker."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilobytes = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)
