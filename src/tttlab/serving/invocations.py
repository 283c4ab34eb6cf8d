"""Requests over HTTP in the form that MLflow's server takes: images and how to adapt to them."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import SUPPORTED_FORMATS, infer_and_parse_data
from mlflow.types.schema import ParamSpec

from tttlab.errors import UserError, choices
from tttlab.serving.answers import Wish
from tttlab.serving.pyfunc import images_of
from tttlab.serving.registry import signature
from tttlab.serving.service import Busy

_DROPPED = 8  # so many times the size that is allowed is still received, and not kept
_FORMS = ", ".join(sorted(SUPPORTED_FORMATS))


class TooLarge(UserError):
    """A request has more bytes than is allowed."""


class NoJson(UserError):
    """A request says that it holds something else."""


# The first one that fits counts.
_STATUSES = {
    TooLarge: (413, "INVALID_PARAMETER_VALUE"),
    NoJson: (415, "INVALID_PARAMETER_VALUE"),
    UserError: (400, "INVALID_PARAMETER_VALUE"),
    Busy: (429, "RESOURCE_EXHAUSTED"),
}


def refusal(error: UserError | Busy) -> tuple[int, dict[str, str]]:
    """Give the status and the body, as MLflow writes it, that tell an error."""
    status, code = next(told for kind, told in _STATUSES.items() if isinstance(error, kind))
    return status, {"error_code": code, "message": " ".join(str(error).split())}


async def receive(request: Request, megabytes: float) -> bytes:
    """Take the body of a request, and drop it where it becomes too large.

    Args:
        request: whose body nobody has read.
        megabytes: most megabytes (10⁶ bytes).

    Raises:
        NoJson: by its header, it holds something else.
        TooLarge: it has more bytes.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise NoJson(f"Content-Type: expected 'application/json', found {kind[:60]!r}")
    limit, body, size = int(megabytes * 1_000_000), bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > _DROPPED * limit:
            break
        # A client that is answered while it still sends sees a broken connection and no answer.
        if size <= limit:
            body += chunk
        else:
            body.clear()
    if size > limit:
        raise TooLarge(
            f"expected a body of at most {megabytes:g} MB, found more; send fewer or smaller images"
        )
    return bytes(body)


def read(body: bytes) -> tuple[list[Any], Wish]:
    """Read the images of a request, and how they are to be adapted to.

    Args:
        body: JSON with the images in one of ``dataframe_records``, ``dataframe_split``, ``inputs``
            and ``instances``, as MLflow reads them, and the fields of a `Wish` in ``params``.

    Raises:
        UserError: it is no such thing.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError(f"expected a body in JSON, found none ({error})") from error
    forms = SUPPORTED_FORMATS & values.keys() if isinstance(values, dict) else ()
    if len(forms) != 1:
        found = ", ".join(map(str, values))[:200] if isinstance(values, dict) else "no keys"
        raise UserError(f"expected one of the keys {_FORMS}, found {found or 'none'}")
    (form,) = forms
    try:
        given = infer_and_parse_data({form: values[form]}, signature().inputs)
    except Exception as error:  # whatever pandas and numpy raise
        raise UserError(f"{form}: expected images as MLflow takes them, found others") from error
    return list(images_of(given)), _wish(values.get("params"))


def _wish(params: Any) -> Wish:
    if params is None:
        return Wish()
    if not isinstance(params, Mapping):
        raise UserError(f"params: expected keys with values, found {type(params).__name__}")
    specs = {spec.name: spec for spec in signature().params}
    if unknown := [name for name in params if name not in specs]:
        raise UserError(f"params: unknown key {unknown[0][:60]!r}; {choices(unknown[0], specs)}")
    for name, value in params.items():
        try:
            ParamSpec.validate_param_spec(value, specs[name])
        except MlflowException as error:
            raise UserError(
                f"params: {name}: expected {specs[name].dtype.name}, found {str(value)[:60]!r}"
            ) from error
    return Wish(**params)
