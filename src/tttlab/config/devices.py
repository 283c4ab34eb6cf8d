"""How a device is named, in settings and options; checked without importing torch."""

import re

DEVICES = ("auto", "cpu", "cuda", "cuda:<number>")


def is_device(name: str) -> bool:
    """Tell whether this is the name of a device, be it there or not."""
    # Not \d, which knows the digits of all scripts; torch reads neither these nor cuda:01.
    return re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?", name) is not None
