"""Single precision where bf16 is too coarse: sums over positions, tokens or frequencies."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device: str) -> AbstractContextManager:
    """Switch autocast off, where it is on."""
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def at_least_single(values: Tensor) -> Tensor:
    """Convert half precision to single; wider numbers stay as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
