"""The settings of the adapter that any run may have."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictFloat

from tttlab.config.settings import Natural, NonNegative, Positive, Strict, fault, show
from tttlab.errors import choices


def _check_trainable(value: Any) -> Any:
    groups = ("all", "norm", "encoder", "none")
    if isinstance(value, str) and value not in groups:
        raise fault(
            f"unknown group {value!r}; {choices(value, groups)}, or a list of parameter-name prefixes"
        )
    prefixes = value if isinstance(value, list | tuple) else []
    if not isinstance(value, str) and not (
        prefixes and all(isinstance(prefix, str) and prefix for prefix in prefixes)
    ):
        raise fault(
            f"expected {', '.join(groups)} or a list of parameter-name prefixes, found {show(value)}"
        )
    return value


class AdapterSettings(Strict):
    """What the adapter does for every method: how far, how, and which parameters and statistics move."""

    steps: Natural = 1
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: Positive = 1e-3
    momentum: Annotated[StrictFloat, Field(ge=0, lt=1)] = 0.0
    trainable: Annotated[str | tuple[str, ...], BeforeValidator(_check_trainable)] = "encoder"
    normalisation: Literal["source", "image", "mixed", "shrink"] = "source"
    prior: Annotated[StrictFloat, Field(ge=0, le=1)] = 0.1
    threshold: Positive = 1.0
    clip: Positive | None = None
    sharpness: NonNegative = 0.0
    average: Natural = 0
