"""What params.yaml's sections are made of: strict values, and mistakes told in one line each."""

import json
import re
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from tttlab.errors import choices

Count = Annotated[StrictInt, Field(ge=1)]
Natural = Annotated[StrictInt, Field(ge=0)]
Positive = Annotated[StrictFloat, Field(gt=0)]
NonNegative = Annotated[StrictFloat, Field(ge=0)]
Fraction = Annotated[StrictFloat, Field(gt=0, lt=1)]


def fault(message: str, key: str = "", more: int = 0) -> PydanticCustomError:
    """Say in our own words what is wrong with ``key`` below the value under validation."""
    return PydanticCustomError("told", "{message}", {"message": message, "key": key, "more": more})


def refuse_unknown_keys(values: Any, allowed: Collection[str]) -> Any:
    """Return the values of a section, all of whose keys are known."""
    keys = values if isinstance(values, dict) else {}
    if unknown := [str(key) for key in keys if key not in allowed]:
        message = f"unknown key; {choices(unknown[0], allowed)}"
        raise fault(message, unknown[0], len(unknown) - 1)
    return values


class Strict(BaseModel):
    """A section of the file: no unknown keys, no silent conversions, never changed once read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        return refuse_unknown_keys(values, cls.model_fields)


def show(value: Any) -> str:
    """Write a value as it stands in the file, shortened."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _path(error: ErrorDetails, values: Any) -> str:
    """Write the path of a mistake as keys of the file.

    Steps that pydantic adds for its own unions are left out.
    """
    *inner, last = error["loc"] or ("",)
    text = ""
    for step in (*inner, last):
        known = isinstance(values, dict) and step in values
        if isinstance(values, list) and isinstance(step, int):
            text += f"[{step}]"
            known = step < len(values)
        elif known or (error["type"] == "missing" and step == last):
            text += f".{step}"
        values = values[step] if known else values
    extra = error.get("ctx", {}).get("key") or error.get("ctx", {}).get("discriminator", "").strip(
        "'"
    )
    return f"{text}.{extra}".strip(".") if extra else text.strip(".")


def _expected(error: ErrorDetails) -> str:
    """Turn pydantic's sentence into ``a number greater than 0`` and the like."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("model_type", "dict_type", "model_attributes_type", "dataclass_type"):
        return "keys with values"
    if kind == "too_short":
        return (
            f"at least {context['min_length']} entries"
            if context["min_length"] > 1
            else "at least one entry"
        )
    text = error["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    text = text.replace("a valid tuple", "a list")
    bound = re.match(r"(greater|less) than", text)
    return f"a number {text}" if bound else text


def list_mistakes(error: ValidationError, values: Any) -> list[tuple[str, str]]:
    """List (path, what is wrong) for every mistake that pydantic found.

    Alternatives of one value become one.
    """
    messages: dict[str, str] = {}
    expected: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        path, kind, context, found = (
            _path(detail, values),
            detail["type"],
            detail.get("ctx", {}),
            detail["input"],
        )
        if kind == "told":
            messages[path] = context["message"]
            messages |= {
                f"{path} {number}": "" for number in range(context["more"])
            }  # only counted
        elif kind in ("missing", "union_tag_not_found"):
            messages[path] = "missing; give it a value"
        elif kind in ("literal_error", "union_tag_invalid"):
            allowed = re.findall(r"'([^']*)'", context.get("expected") or context["expected_tags"])
            found = context.get("tag", found)
            messages[path] = f"found {show(found)}; {choices(str(found), allowed)}"
            expected.setdefault(path, []).append(" or ".join(map(repr, allowed)))
        else:
            expected.setdefault(path, []).append(_expected(detail))
            messages[path] = f"expected {' or '.join(expected[path])}, found {show(found)}"
        if len(expected.get(path, [])) > 1:
            messages[path] = f"expected {' or '.join(expected[path])}, found {show(found)}"
    return list(messages.items())
