"""What a request over HTTP may look like, checked before anything is made of it.

MLflow's server would build a data frame of whatever JSON it gets, and quote it all in its errors.
"""

import json
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args, get_type_hints

from tttlab.config.names import is_utf8
from tttlab.errors import UserError, choices
from tttlab.serving.answers import Wish
from tttlab.serving.pictures import Limits, nesting

VALUES = 200_000  # most commas of a request: an image of 224 px as lists
NAME = 200  # most characters of a name
COLUMN, PARAMS = "image", "params"
RECORDS = ("dataframe_records", "instances", "inputs")
FORMATS = (*RECORDS, "dataframe_split")
EXAMPLE = '{"instances": [{"image": "<base64>"}]}'
_WORDS = {bool: "true or false", int: "an integer", str: "text"}
# The fields of a wish: (type, whether null will do).
_TYPES = {
    name: ((get_args(hint) or (hint,))[0], NoneType in get_args(hint))
    for name, hint in get_type_hints(Wish).items()
}
_SHOWN = 60  # characters of what was found


def check_body(body: bytes, limits: Limits) -> bytes:
    """Check that a body is a request for images, of a number that is allowed.

    Returns:
        the request in the one format that MLflow makes least of: it turns the others into arrays.

    Raises:
        UserError: it is none.
    """
    images, params = read(body, limits)
    records = {"dataframe_records": [{COLUMN: image} for image in images]}
    return json.dumps(records | {PARAMS: params}).encode()


def read(body: bytes, limits: Limits) -> tuple[list[Any], dict[str, Any]]:
    """Read the images of a request, and the fields of a `tttlab.serving.answers.Wish`.

    Args:
        body: JSON in one of MLflow's formats.
        limits: how many images are allowed.

    Raises:
        UserError: it is no such request.
    """
    if body.count(b",") > VALUES:  # counted at once; making them would hold all threads up
        raise UserError(f"expected at most {VALUES:,} values, found more; send images in base64")
    try:
        asked = json.loads(body)
    except RecursionError as error:
        raise UserError(
            f"expected JSON such as {EXAMPLE}, found lists too deeply nested"
        ) from error
    except ValueError as error:  # no JSON, no UTF-8, a number of 5,000 digits
        why = "empty body" if not body else str(error)[:_SHOWN]
        raise UserError(f"expected JSON such as {EXAMPLE}, found none ({why})") from error
    if not isinstance(asked, dict):
        raise UserError(f"expected a JSON object such as {EXAMPLE}, found {_kind(asked)}")
    for name in asked:
        if name not in (*FORMATS, PARAMS):
            raise UserError(f"unknown key {_short(name)}; allowed: {', '.join((*FORMATS, PARAMS))}")
    named = [name for name in FORMATS if name in asked]
    if len(named) != 1:
        raise UserError(
            f"expected one of {', '.join(FORMATS)}, found {' and '.join(named) or 'none'}"
        )
    images = _images(named[0], asked[named[0]])
    if not 0 < len(images) <= limits.images:
        raise UserError(f"expected 1 to {limits.images} images, found {len(images)}")
    for number, image in enumerate(images, 1):
        _check_single(number, image)
    _check_params(asked.get(PARAMS))
    return images, asked.get(PARAMS) or {}


def _images(name: str, rows: Any) -> list[Any]:
    """List the images, and check that there is nothing else."""
    if name == "dataframe_split":
        return _of_table(rows)
    if name == "inputs" and isinstance(rows, dict):
        if list(rows) != [COLUMN] or not isinstance(rows[COLUMN], list):
            raise UserError(f'{name}: expected {{"image": [<image>, …]}}, found {_keys(rows)}')
        return rows[COLUMN]
    if not isinstance(rows, list):
        raise UserError(f"{name}: expected a list of images, found {_kind(rows)}")
    return [_image(name, row) for row in rows]


def _image(name: str, row: Any) -> Any:
    """Give a row's image; it may stand there without its name, but for records."""
    if isinstance(row, dict) and list(row) == [COLUMN]:
        return row[COLUMN]
    if isinstance(row, (str, list)) and name != "dataframe_records":
        return row
    found = _keys(row) if isinstance(row, dict) else _kind(row)
    raise UserError(f'{name}: expected images as {{"image": …}}, found {found}')


def _check_single(number: int, image: Any) -> None:
    """Refuse what MLflow tells in other words than these, or misreads.

    Of a list of images in the place of one, a data frame would make a row of each.
    """
    depth, first = nesting(image)
    if depth > 3 or (depth and isinstance(first, str)):
        raise UserError(
            f"image {number}: expected base64 or lists (H, W, 3), found a list of images; "
            "give each a row of its own"
        )
    if isinstance(image, str) and not is_utf8(image):  # MLflow would fail to make bytes of it
        raise UserError(
            f"image {number}: expected base64 or lists (H, W, 3), found text with half a character "
            "(a lone surrogate)"
        )


def _of_table(table: Any) -> list[Any]:
    right = (
        isinstance(table, dict)
        and table.get("columns") == [COLUMN]
        and isinstance(table.get("data"), list)
        and all(isinstance(row, list) and len(row) == 1 for row in table["data"])
    )
    if not right:
        raise UserError(
            'dataframe_split: expected {"columns": ["image"], "data": [[<image>], …]}, found '
            + (_keys(table) if isinstance(table, dict) else _kind(table))
        )
    return [row[0] for row in table["data"]]


def _check_params(params: Any) -> None:
    """Check names and types, which MLflow would drop and tell in a long line."""
    if params is None:
        return
    if not isinstance(params, dict):
        raise UserError(f"{PARAMS}: expected an object, found {_kind(params)}")
    for name, value in params.items():
        if name not in _TYPES:
            near = choices(name[:_SHOWN], _TYPES)
            raise UserError(f"{PARAMS}: unknown name {_short(name)}; {near}")
        expected, nothing = _TYPES[name]
        if type(value) is not expected and not (nothing and value is None):
            raise UserError(f"{name}: expected {_WORDS[expected]}, found {_kind(value)}")
        if isinstance(value, str) and len(value) > NAME:  # looking for one like it would take long
            raise UserError(f"{name}: expected at most {NAME} characters, found {len(value):,}")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", float: "a fraction", type(None): "null"}
    return (kinds | _WORDS)[type(value)]


def _keys(value: Mapping[str, Any]) -> str:
    shown = ", ".join(_short(key) for key in list(value)[:5])
    return f"an object with {shown}" if value else "an empty object"


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
