"""From a method's name in params.yaml to the method: the module is the registry."""

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tttlab.adaptation.method import Method
from tttlab.config.method_settings import NO_LOSS
from tttlab.data.views import Augmentation
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
        objective: settings of the pretraining objective and, as ``augmentation``, the views that its head was trained on. A
            method that uses this head takes over those that it has too (a temperature, a mask ratio), unless ``settings`` says
            otherwise.
        augmentation: strength of the random views, for any other method that draws them.

    Raises:
        UserError: the module cannot be imported, holds no method or one without a loss to train with, or refuses a value.
    """
    try:
        module = importlib.import_module(name if "." in name else f"tttlab.methods.{name}")
    except Exception as error:  # whatever its code raises
        told = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise UserError(f"method {name}: its module cannot be imported ({told})") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    ]
    if len(found) != 1:
        raise UserError(
            f"{module.__file__}: expected one subclass of tttlab.adaptation.method.Method, found {len(found)}"
        )
    if found[0].trains and found[0].loss is Method.loss:
        raise UserError(f"{module.__file__}: class {found[0].__name__} {NO_LOSS}")
    known = {field.name for field in fields(found[0])}
    inherited = {} if augmentation is None else {"augmentation": augmentation}
    if objective and found[0].head == objective["name"]:
        inherited |= objective
    inherited = {key: value for key, value in inherited.items() if key in known}
    try:
        return found[0](**{**inherited, **(settings or {})})
    except (TypeError, ValueError) as error:
        raise UserError(f"method {name}: {error}") from error
