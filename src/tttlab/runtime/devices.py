"""Devices and their precision, which only stage scripts choose; their memory and work."""

import torch

from tttlab.config.devices import is_device
from tttlab.errors import UserError

# By number of the GPU: the largest memory in bytes before PyTorch's count was last reset.
_earlier_peaks: dict[int, int] = {}


def count_gpus() -> int:
    """Count the GPUs of this machine."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_device(wish: str, precision: str = "auto", key: str = "machine.device") -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:<n>`` into a device that exists.

    Args:
        wish: the device.
        precision: ``32`` has a GPU compute in full float32. Otherwise its convolutions may keep ten
            bits of the mantissa (TF32), which is faster and changes a logit in the third digit.
        key: what the user set, for messages.

    Raises:
        UserError: this is the name of no device, or a GPU is wanted and there is none.
    """
    if not is_device(str(wish)):
        raise UserError(f"{key}: expected auto, cpu, cuda or cuda:<n>, found {wish!r}")
    count = count_gpus()
    if count and precision == "32":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if wish == "auto":
        return torch.device("cuda" if count else "cpu")
    kind, _, number = str(wish).partition(":")
    if kind == "cuda" and int(number or 0) >= count:  # torch overflows at large numbers
        raise UserError(f"{key}: expected a GPU for {wish!r}, found {count}; set auto or cpu")
    return torch.device(wish)


def forget_peak(device: torch.device) -> None:
    """Start anew the count of `peak_memory`."""
    restart_peak(device)
    _earlier_peaks.pop(device.index or 0, None)


def restart_peak(device: torch.device) -> int:
    """Reset PyTorch's count of a GPU's peak, but not that of `peak_memory`; → bytes in use."""
    if device.type != "cuda":
        return 0
    number = device.index or 0
    peak = torch.cuda.max_memory_allocated(device)
    _earlier_peaks[number] = max(_earlier_peaks.get(number, 0), peak)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_memory(device: torch.device) -> float | None:
    """Largest memory of a GPU's tensors since `forget_peak`, in MiB; None on a CPU.

    On a CPU the system knows only the largest resident set of a process's whole life, and every
    worker is a process.
    """
    if device.type != "cuda":
        return None
    earlier = _earlier_peaks.get(device.index or 0, 0)
    return max(earlier, torch.cuda.max_memory_allocated(device)) / 2**20


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its work, so that a clock counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
