"""Independent random streams, one per (seed, purpose, image, step).

A stream depends on its key alone. So no result depends on the order of the work, on the number of
workers, or on where a killed run was resumed.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int, *key: str | int) -> int:
    """Hash ``(seed, *key)`` to an integer in ``[0, 2**63)``; different keys give unrelated ones."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(seed: int, *key: str | int) -> np.random.Generator:
    """Open the NumPy stream of ``(seed, *key)``."""
    return np.random.default_rng(stream_seed(seed, *key))


def torch_generator(seed: int, *key: str | int) -> "torch.Generator":
    """Open the torch stream of ``(seed, *key)``.

    It is on the CPU, so that the numbers are the same whatever device computes with them.
    """
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, *key))


@contextmanager
def global_stream(seed: int) -> Iterator[None]:
    """Give code that draws from torch's global stream another one, on the CPU, for a while.

    Unlike ``torch.manual_seed``, this touches no accelerator, whose stream nothing would restore.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
