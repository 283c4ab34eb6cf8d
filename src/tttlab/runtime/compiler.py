"""PyTorch's compiler, imported when something is compiled and not before.

Importing it takes longer than importing the rest of PyTorch. timm, torchvision and every optimiser do so for trifles: to mark
what must not be compiled, and to ask about a layer for object detection. The pipeline compiles nothing, so where nothing
else is wanted of the compiler the marks have no meaning and can be left out.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

_PACKAGE, _QUESTIONS = "torch._dynamo", "torch._dynamo.utils"


class _Postponed(ModuleType):
    """Stands for a module until anything is wanted of it that it cannot give; then the module is imported, and asked."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and not (
            name == "__path__" and self.__name__ == _PACKAGE
        ):  # what any import looks for
            raise AttributeError(name)
        return getattr(_load(self.__name__), name)


class _Compiler(_Postponed):
    """Stands for the compiler."""

    @staticmethod
    def disable(function: Callable | None = None, *_options: Any, **_more: Any) -> Callable:
        """Leave a function unmarked."""
        return function if function is not None else lambda marked: marked

    @staticmethod
    def graph_break(*_reason: str) -> None:
        """Do what this does to code that is not being compiled: nothing."""


class _Questions(_Postponed):
    """Stands for the module that torchvision asks."""

    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        """Pass the question on, when that layer runs."""
        return _load(_QUESTIONS).is_compile_supported(device_type)


def postpone_compiler() -> None:
    """Have the compiler imported when it is needed; call this in a process that compiles nothing, before timm is imported."""
    if _PACKAGE not in sys.modules:
        sys.modules[_PACKAGE], sys.modules[_QUESTIONS] = _Compiler(_PACKAGE), _Questions(_QUESTIONS)


def _load(name: str) -> ModuleType:
    """Import the module itself in place of what stands for it."""
    for known in (_PACKAGE, _QUESTIONS):
        if isinstance(sys.modules.get(known), _Postponed):
            del sys.modules[known]
    return import_module(name)
