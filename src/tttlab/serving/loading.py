"""Models to serve: registered ones, any that MLflow can address, and folders."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tttlab.errors import UserError, choices
from tttlab.serving import registry
from tttlab.tracking.store import database_uri, open_client, quiet

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel


def champion(root: Path, name: str | None) -> tuple[str, dict[str, Any]]:
    """Find the champion of a registered model.

    Args:
        root: folder of ``mlflow.db``.
        name: of the registered model; None: the one that was registered first.

    Returns:
        the address of that version, which stays when another one becomes champion, and what
        ``/model`` says of it.

    Raises:
        UserError: there is none.
    """
    store = root / "mlflow.db"
    nothing = (
        f"{store}: expected registered models, found {{}}; run `make repro` first; after the file "
        "was moved away, `make repro ARGS='-s -f register'`"
    )
    if not store.is_file():
        raise UserError(nothing.format("no file"))
    with quiet():
        client = open_client(root)
        known = sorted(client.search_registered_models(), key=lambda one: one.creation_timestamp)
    known = {one.name: one.aliases for one in known if registry.ALIAS in one.aliases}
    if not known:
        raise UserError(nothing.format("none"))
    name = name or next(iter(known))
    if name not in known:
        raise UserError(f"--model: no registered model {name!r}; {choices(name, known)}")
    number = known[name][registry.ALIAS]
    return f"models:/{name}/{number}", {
        "source": f"models:/{name}@{registry.ALIAS}",
        "version": number,
    }


def wrap(folder: Path, into: Path) -> str:
    """Write a folder of `tttlab.serving.adaptive_model.save` as a model of MLflow.

    Args:
        folder: the model.
        into: a folder that does not exist yet.

    Returns:
        its address.

    Raises:
        UserError: the folder holds no model.
    """
    if not (folder / "model.json").is_file():
        raise UserError(
            f"--folder: {folder / 'model.json'}: expected a model that adapts, found no file; "
            "`make repro` writes outputs/served/<model>"
        )
    # MLflow takes a folder's name for an address, in which # and % have a meaning.
    source = into.with_name("source")
    shutil.copytree(folder, source)
    log = logging.getLogger("mlflow")
    level = log.level
    with quiet():  # MLflow warns of itself while it is imported
        import mlflow.pyfunc

        from tttlab.serving.pyfunc import ARTIFACT, CONFIG

        log.setLevel(logging.ERROR)  # it tells of every file that it copies
        mlflow.pyfunc.save_model(
            path=into,
            python_model=str(Path(__file__).with_name("pyfunc_code.py")),
            artifacts={ARTIFACT: str(source)},
            model_config=CONFIG,
            signature=registry.signature(),
            pip_requirements=registry.requirements(),
        )
    log.setLevel(level)
    return str(into)


def correct_paths(tracking_uri: str) -> None:
    """Correct the paths in a project's store that is named by its address, if it was moved.

    Args:
        tracking_uri: any of MLflow's; only a file ``mlflow.db`` is a project's own store.

    Raises:
        UserError: see `tttlab.tracking.store.open_client`.
    """
    from sqlalchemy import make_url

    if not tracking_uri.startswith("sqlite"):
        return
    store = Path(make_url(tracking_uri).database or "")
    if store.name == "mlflow.db" and store.is_file():
        with quiet():
            open_client(store.parent)


def load(uri: str, root: Path, config: Mapping[str, Any]) -> "PyFuncModel":
    """Load a model that adapts.

    Args:
        uri: its address for MLflow.
        root: folder of ``mlflow.db``, where registered models are looked up if there is one.
        config: the ``model_config`` as far as it differs from the model's own.

    Raises:
        UserError: there is no such model, or another kind of model.
    """
    with quiet():
        import mlflow.pyfunc
        from mlflow.exceptions import MlflowException

    try:
        with quiet():
            if uri.startswith(("models:", "runs:")) and (root / "mlflow.db").is_file():
                open_client(root)  # corrects the paths of a project that was moved
                mlflow.set_tracking_uri(database_uri(root))
            model = mlflow.pyfunc.load_model(uri, model_config=dict(config))
    except (MlflowException, OSError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{uri}: expected a model of MLflow, found none ({line})") from error
    if not hasattr(model, "unwrap_python_model") or not hasattr(
        model.unwrap_python_model(), "service"
    ):
        raise UserError(f"{uri}: expected a model that adapts, found another kind of model")
    return model
