"""The inner loop as params.yaml sets it: the fields of its declaration, ready to check values."""

import types
from dataclasses import fields
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BeforeValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    create_model,
)

from tttlab.config.inner_loop import Augmentation, InnerLoop
from tttlab.config.strict import Strict, fault, refuse_unknown_keys, show
from tttlab.errors import choices

_STRICT = {int: StrictInt, float: StrictFloat, bool: StrictBool}  # "3" and true are no numbers


def _strict(kind: Any) -> Any:
    """Refuse silent conversions of the plain values in a type."""
    if get_origin(kind) is Annotated:
        return Annotated[_strict(kind.__origin__), *kind.__metadata__]
    if get_origin(kind) is types.UnionType or get_origin(kind) is Union:
        return Union[tuple(_strict(part) for part in get_args(kind))]  # noqa: UP007
    return _STRICT.get(kind, kind)


def strict_fields(declaration: type) -> dict[str, tuple[Any, Any]]:
    """Give type and default of every field of a dataclass, as `create_model` takes them."""
    return {field.name: (_strict(field.type), field.default) for field in fields(declaration)}


def _every_key(values: Any) -> Any:
    names = [field.name for field in fields(Augmentation)]
    refuse_unknown_keys(values, names)
    missing = [name for name in names if isinstance(values, dict) and name not in values]
    if missing:
        raise fault("missing; give it a value", missing[0], len(missing) - 1)
    return values


# The section of params.yaml, in which every key stands.
Views = Annotated[
    create_model("Views", __base__=Strict, **strict_fields(Augmentation)),
    BeforeValidator(_every_key),
    AfterValidator(lambda section: Augmentation(**dict(section))),
]


def _check_trainable(value: Any) -> Any:
    groups = ("all", "norm", "encoder", "lora", "none")
    if isinstance(value, str) and value not in groups:
        raise fault(
            f"unknown group {value!r}; {choices(value, groups)}, "
            "or a list of parameter-name prefixes"
        )
    prefixes = value if isinstance(value, list | tuple) else []
    named = prefixes and all(isinstance(prefix, str) and prefix for prefix in prefixes)
    if not isinstance(value, str) and not named:
        raise fault(
            f"expected {', '.join(groups)} or a list of parameter-name prefixes, "
            f"found {show(value)}"
        )
    return value


_OF_RUNS = {key: field for key, field in strict_fields(InnerLoop).items() if key != "augmentation"}
_TRAINABLE = Annotated[str | tuple[str, ...], BeforeValidator(_check_trainable)]
# What a run may set, ready to check values that come from params.yaml.
LoopSettings: type[Strict] = create_model(
    "LoopSettings",
    __base__=Strict,
    **{**_OF_RUNS, "trainable": (_TRAINABLE, _OF_RUNS["trainable"][1])},
)
