"""Independent random streams, one per (seed, purpose, image, step).

A stream is found from its key alone, so a result never depends on the order of the work, on the number of workers,
or on where a killed run went on.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int, *key: str | int) -> int:
    """Hash ``(seed, *key)`` to an integer in ``[0, 2**63)``; a change in any part gives an unrelated one."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(seed: int, *key: str | int) -> np.random.Generator:
    """Open the NumPy stream of ``(seed, *key)``."""
    return np.random.default_rng(stream_seed(seed, *key))


def torch_generator(seed: int, *key: str | int) -> "torch.Generator":
    """Open the torch stream of ``(seed, *key)``, on the CPU whatever the device: the numbers are then the same."""
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, *key))
