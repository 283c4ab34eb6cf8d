"""The C library's memory allocator, told to keep what a training step frees for the next step."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> None:
    """Keep freed blocks in the process.

    By default glibc hands large freed blocks back to the system and takes them anew in the next
    step, page by page, each page first filled with zeros. On a CPU that is a fifth or more of the
    time of a training step. The largest threshold that glibc accepts is smaller than a batch's
    activations, so memory maps are turned off altogether. Without Linux and glibc nothing is done.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
