"""The C library's memory allocator, told to keep what a training step frees for the next step."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> None:
    """Keep freed blocks in the process.

    By default glibc hands large blocks back to the system when they are freed and takes them anew in the next step, page by
    page, each page first filled with zeros: on a CPU a fifth of the time of a training step and more. No threshold that
    glibc accepts covers the activations of a batch, hence no memory maps at all. Elsewhere than on Linux with glibc this
    does nothing.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
