"""A method from its name in params.yaml, which is the name of its module."""

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tttlab.adaptation.method import Method
from tttlab.config.inner_loop import Augmentation
from tttlab.config.method_words import NO_LOSS
from tttlab.errors import UserError


def load_method(
    name: str,
    settings: Mapping[str, Any] | None = None,
    *,
    objective: Mapping[str, Any] | None = None,
    augmentation: Augmentation | None = None,
) -> Method:
    """Create the method of ``tttlab/methods/<name>.py``, or of any module that holds one.

    Args:
        name: the file's name, or the module's dotted path (``my_package.my_method``).
        settings: its fields that differ from their defaults.
        objective: settings of the pretraining objective and, as ``augmentation``, the views that
            its head was trained on. A method that uses this head inherits the settings that it
            has too (a temperature, a mask ratio), unless ``settings`` overrides them.
        augmentation: strength of the random views, for any other method that draws them.

    Raises:
        UserError: the module cannot be imported, does not hold exactly one method, the method lacks
            a loss to train with, or it refuses a value.
    """
    try:
        module = importlib.import_module(name if "." in name else f"tttlab.methods.{name}")
    except Exception as error:  # the module's own code may raise anything
        prefix = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise UserError(
            f"method {name}: its module cannot be imported ({prefix}{error})"
        ) from error
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    ]
    if len(classes) != 1:
        raise UserError(
            f"{module.__file__}: expected one subclass of tttlab.adaptation.method.Method, "
            f"found {len(classes)}"
        )
    kind = classes[0]
    if kind.trains and kind.loss is Method.loss:
        raise UserError(f"{module.__file__}: class {kind.__name__} {NO_LOSS}")
    inherited = {} if augmentation is None else {"augmentation": augmentation}
    if objective and kind.head == objective["name"]:
        inherited |= objective
    names = {field.name for field in fields(kind)}
    inherited = {name: value for name, value in inherited.items() if name in names}
    try:
        return kind(**{**inherited, **(settings or {})})
    except (TypeError, ValueError) as error:
        raise UserError(f"method {name}: {error}") from error
