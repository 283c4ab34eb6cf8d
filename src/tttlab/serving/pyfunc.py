"""A trained network that adapts to what it is asked about, as a model of MLflow.

Imported where a model is loaded or served, never by the stages: it needs MLflow at once.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    DEADLINE_EXCEEDED,
    INTERNAL_ERROR,
    RESOURCE_EXHAUSTED,
    TEMPORARILY_UNAVAILABLE,
)
from mlflow.pyfunc import PythonModel, PythonModelContext

from tttlab.errors import UserError
from tttlab.runtime.devices import choose_device
from tttlab.runtime.group_size import TooLittleMemory
from tttlab.serving import adaptive_model
from tttlab.serving.answers import Wish
from tttlab.serving.pictures import Limits, nesting
from tttlab.serving.requests import COLUMN
from tttlab.serving.service import Busy, Late, Service

_log = logging.getLogger(__name__)
ARTIFACT = "model"
# What `mlflow.pyfunc.load_model(…, model_config={…})` may set.
CONFIG = {**asdict(Limits()), "device": "auto", "together": 64}


class AdaptiveModel(PythonModel):
    """Classifies every image without and with adapting to it; see `predict`.

    Attributes:
        service: what answers; it may be asked from several threads.
    """

    service: Service

    def load_context(self, context: PythonModelContext) -> None:
        """Load the network, its runs and the limits of ``model_config``."""
        config = CONFIG | (context.model_config or {})
        device = choose_device(config["device"], key="model_config: device")
        model = adaptive_model.load(Path(context.artifacts[ARTIFACT]), device)
        limits = Limits(**{part.name: config[part.name] for part in fields(Limits)})
        self.service = Service(model, limits, config["together"])

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,  # MLflow asks for a type; it makes one of whatever it is given
        params: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Classify images, each on its own.

        Args:
            context: MLflow's.
            model_input: a data frame with the column ``image``, or whatever else `images_of`
                takes; the images as in `tttlab.serving.pictures.decode`.
            params: fields of `tttlab.serving.answers.Wish`.

        Returns:
            a row per image; see `tttlab.serving.answers.answer`.

        Raises:
            MlflowException: something cannot be served. A server answers 400; 429 where it has too
                much to do, 503 where its memory is too small, and 504 where that took too long.
        """
        try:
            return self.service.answer(images_of(model_input), Wish(**(params or {})))
        except TooLittleMemory as error:  # not the client's fault
            raise MlflowException(str(error), TEMPORARILY_UNAVAILABLE) from None
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        except Busy as error:
            code = DEADLINE_EXCEEDED if isinstance(error, Late) else RESOURCE_EXHAUSTED
            raise MlflowException(str(error), code) from None
        except Exception as error:  # MLflow would take it for the client's fault
            _log.exception("the model failed")
            raise MlflowException(f"the model failed: {error}", INTERNAL_ERROR) from error


def images_of(given: Any) -> list[Any]:
    """List the images of a request.

    Args:
        given: a data frame with the column ``image``, a mapping with such a key, an array
            ``(N, H, W, 3)``, a list of images, or one of mappings with the key ``image``.

    Raises:
        UserError: there is no ``image``.
    """
    if isinstance(given, (pd.DataFrame, Mapping)):
        if COLUMN not in given:
            found = ", ".join(map(str, given))[:200] or "none"
            raise UserError(f"expected a column {COLUMN!r}, found {found}")
        column = given[COLUMN]
        # One image alone is as good as a list of one.
        cells = [column] if isinstance(column, (str, bytes)) else _listed(column)
        return [image for cell in cells for image in _of_cell(cell)]
    rows = _listed(given)
    if rows and all(isinstance(row, Mapping) for row in rows):
        if lacking := [row for row in rows if COLUMN not in row]:
            return images_of(lacking[0])  # says so
        return [row[COLUMN] for row in rows]
    return rows


def _of_cell(cell: Any) -> Sequence[Any]:
    """Give a cell's images: MLflow makes one row of a mapping with a list of them.

    Nested lists of numbers are one image, unless they hold many.
    """
    depth, first = nesting(cell)
    is_text = isinstance(first, (str, bytes, bytearray))
    return cell if depth > 3 or (depth and is_text) else [cell]


def _listed(values: Any) -> list[Any]:
    try:
        return list(values)
    except TypeError as error:
        raise UserError(f"expected a list of images, found {type(values).__name__}") from error
