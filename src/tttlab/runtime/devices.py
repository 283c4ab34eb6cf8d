"""Which device and precision to compute with; only stage scripts choose."""

import torch

from tttlab.errors import UserError

_peaks: dict[
    int, int
] = {}  # of every GPU, in bytes, of the time before somebody began to count anew


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
        raise UserError(
            f"machine.device: expected a GPU for {wish!r}, found {count}; set auto or cpu"
        )
    return device


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` count anew from here."""
    restart_peak(device)
    _peaks.pop(device.index or 0, None)


def restart_peak(device: torch.device) -> int:
    """Let PyTorch count a GPU's peak anew from here, which `peak_memory` takes note of; → bytes in use."""
    if device.type != "cuda":
        return 0
    number = device.index or 0
    _peaks[number] = max(_peaks.get(number, 0), torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_memory(device: torch.device) -> float | None:
    """Largest memory of a GPU's tensors since `forget_peak`, MiB; None on a CPU.

    There the system knows only the largest resident set of a process's whole life, and workers have one each.
    """
    if device.type != "cuda":
        return None
    return max(_peaks.get(device.index or 0, 0), torch.cuda.max_memory_allocated(device)) / 2**20
