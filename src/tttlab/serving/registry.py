"""Registered models: MLflow's page *Models*."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tttlab.tracking.runs import Run
from tttlab.tracking.store import database_uri, quiet

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

ALIAS = "champion"
_DIGEST = "content"  # tag of a version: a hash of its files and its card
# What a model needs to adapt, beside this package.
REQUIREMENTS = (
    *("mlflow", "torch", "torchvision", "timm", "numpy", "pandas", "pillow"),
    *("pydantic", "safetensors", "lightly"),
)


def register(
    run: Run, root: Path, name: str, folder: Path, card: str, example: Path, code: Sequence[str]
) -> tuple[int, bool]:
    """Register a model's newest version under the alias `champion`, unless it is there already.

    Args:
        run: an open run, which the version belongs to.
        root: folder of ``mlflow.db``.
        name: of the registered model.
        folder: what `tttlab.serving.adaptive_model.save` wrote.
        card: about the version, in Markdown.
        example: an image file, shown as the input example.
        code: folders and files of modules that the model needs and that no package brings.

    Returns:
        the version's number, and whether it is new.
    """
    client = run.client
    digest = _digest(folder, card)
    if (known := _champion(client, name)) and known.tags.get(_DIGEST) == digest:
        return int(known.version), False
    with quiet():
        number = _log(run, root, name, folder, example, code)
    client.update_registered_model(name, description=card.partition("\n\n")[0])
    client.update_model_version(name, number, description=card)
    client.set_model_version_tag(name, number, _DIGEST, digest)
    client.set_registered_model_alias(name, ALIAS, number)
    return int(number), True


def _log(run: Run, root: Path, name: str, folder: Path, example: Path, code: Sequence[str]) -> str:
    """Log the model to the run and register it; return the version's number."""
    import mlflow
    import pandas as pd
    from mlflow.environment_variables import (
        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR,
        MLFLOW_UV_AUTO_DETECT,
    )

    from tttlab.serving.pyfunc import ARTIFACT, CONFIG
    from tttlab.serving.requests import COLUMN

    image = base64.b64encode(example.read_bytes()).decode()
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)  # bars of a few small files
    MLFLOW_UV_AUTO_DETECT.set(False)  # it would copy this project's pyproject.toml into the model
    mlflow.set_tracking_uri(database_uri(root))
    with mlflow.start_run(run_id=run.id):
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(Path(__file__).with_name("pyfunc_code.py")),
            artifacts={ARTIFACT: folder.resolve().as_uri()},
            model_config=CONFIG,
            signature=signature(),
            input_example=pd.DataFrame({COLUMN: [image]}),
            pip_requirements=requirements(),
            code_paths=list(code) or None,
            registered_model_name=name,
        )
    return info.registered_model_version


def signature() -> "ModelSignature":
    """Describe an image in any form, the fields of a `Wish`, and what is answered."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, Map, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import DataType as Type

    from tttlab.serving.requests import COLUMN

    params = [
        ParamSpec("run", "string", None),
        ParamSpec("gate", "boolean", True),
        ParamSpec("steps", "long", None),
        ParamSpec("seed", "long", None),
        ParamSpec("return_curve", "boolean", False),
    ]
    by_class = Map(Type.double)
    answered = {"run": Type.string, "fell_back": Type.boolean, "milliseconds": Type.double}
    for side in ("source_", ""):
        answered |= {f"{side}class": Type.string, f"{side}probabilities": by_class}
    known = [ColSpec(kind, name) for name, kind in answered.items()]
    perhaps = {"gate": Type.boolean, "distance": Type.double}
    perhaps |= {"source_confidence": Type.double, "confidence": Type.double}
    perhaps |= {"loss_before": Type.double, "loss_after": Type.double, "curve": AnyType()}
    known += [ColSpec(kind, name, required=False) for name, kind in perhaps.items()]
    return ModelSignature(
        inputs=Schema([ColSpec(AnyType(), COLUMN)]),
        outputs=Schema(known),
        params=ParamSchema(params),
    )


def requirements() -> list[str]:
    """Pin this package and the libraries that a model needs, as they are installed here."""
    return [f"{name}=={version(name)}" for name in ("ttt-lab", *REQUIREMENTS)]


def _champion(client: "MlflowClient", name: str):
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, ALIAS)
    except MlflowException:  # no such model yet, or no such alias
        return None


def _digest(folder: Path, card: str) -> str:
    digest = hashlib.sha256(card.encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
