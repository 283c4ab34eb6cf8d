"""Results that are computed once, and leave PyTorch's global random stream as it was."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Remember a function's results; a test that calls it first draws what it would draw later.

    Otherwise the numbers that a test draws would depend on which tests ran before it.
    """

    @cache
    @wraps(function)
    def remembered(*arguments: Any, **named: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            return function(*arguments, **named)

    return remembered
