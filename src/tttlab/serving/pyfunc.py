"""A trained network that adapts to what it is asked about, as a model of MLflow.

Imported where a model is loaded or served, never by the stages: it needs MLflow at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_EXHAUSTED
from mlflow.pyfunc import PythonModel, PythonModelContext

from tttlab.errors import UserError
from tttlab.runtime.devices import choose_device
from tttlab.serving import adaptive_model
from tttlab.serving.answers import Wish
from tttlab.serving.pictures import Limits
from tttlab.serving.service import Busy, Service

ARTIFACT, COLUMN = "model", "image"
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
        device = choose_device(config["device"])
        model = adaptive_model.load(Path(context.artifacts[ARTIFACT]), device)
        limits = Limits(**{part.name: config[part.name] for part in fields(Limits)})
        self.service = Service(model, limits, config["together"])

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
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
            MlflowException: something cannot be served; the server answers 400, or 429 where it
                has too much to do.
        """
        try:
            return self.service.answer(images_of(model_input), Wish(**(params or {})))
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        except Busy as error:
            raise MlflowException(str(error), RESOURCE_EXHAUSTED) from None


def images_of(given: Any) -> list[Any]:
    """List the images of a request.

    Args:
        given: a data frame with the column ``image``, a mapping with such a key, an array
            ``(N, H, W, 3)``, a list of images, or one of mappings with the key ``image``.

    Raises:
        UserError: there is no ``image``.
    """
    if isinstance(given, (pd.DataFrame, Mapping)):
        # MLflow makes one row of {"image": [several]}.
        return [image for cell in _images(given) for image in _several(cell)]
    return [_images(row) if isinstance(row, Mapping) else row for row in given]


def _images(row: Mapping[str, Any] | pd.DataFrame) -> Any:
    if COLUMN not in row:
        raise UserError(f"expected a column {COLUMN!r}, found {', '.join(map(str, row))}")
    return row[COLUMN]


def _several(cell: Any) -> Sequence[Any]:
    """Give the images of a cell; nested lists of numbers are one image, unless they hold many."""
    depth, first = 0, cell
    while isinstance(first, (list, tuple, np.ndarray)) and len(first):
        depth, first = depth + 1, first[0]
    is_text = isinstance(first, (str, bytes, bytearray))
    return cell if depth > 3 or (depth and is_text) else [cell]
