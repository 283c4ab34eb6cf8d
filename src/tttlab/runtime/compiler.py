"""PyTorch's compiler, imported only when something is compiled.

Importing it takes longer than importing the rest of PyTorch. timm, torchvision and every optimiser
import it only to mark functions that must not be compiled, and to ask about a layer for object
detection. The pipeline compiles nothing, so the marks have no effect and can be left out.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

_PACKAGE, _QUESTIONS = "torch._dynamo", "torch._dynamo.utils"


class _Postponed(ModuleType):
    """Stands for a module, which is imported once an attribute is wanted that is missing here."""

    def __getattr__(self, name: str) -> Any:
        # Every import looks for such attributes, and only a package needs its path.
        is_path = name == "__path__" and self.__name__ == _PACKAGE
        if name.startswith("__") and not is_path:
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
        """Do nothing, as in code that is not being compiled."""


class _Questions(_Postponed):
    """Stands for the module that torchvision asks."""

    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        """Import the module and ask it; this happens only when the layer runs."""
        return _load(_QUESTIONS).is_compile_supported(device_type)


def postpone_compiler() -> None:
    """Have the compiler imported only when it is needed.

    Call this in a process that compiles nothing, before timm is imported.
    """
    if _PACKAGE not in sys.modules:
        sys.modules[_PACKAGE] = _Compiler(_PACKAGE)
        sys.modules[_QUESTIONS] = _Questions(_QUESTIONS)


def _load(name: str) -> ModuleType:
    """Import the module itself in place of its stand-in."""
    for module in (_PACKAGE, _QUESTIONS):
        if isinstance(sys.modules.get(module), _Postponed):
            del sys.modules[module]
    return import_module(name)
