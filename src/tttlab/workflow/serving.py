"""A registered model, or one in a folder, served on this machine."""

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tttlab.errors import UserError, choices, line_of
from tttlab.runtime.compiler import postpone_compiler
from tttlab.tracking.store import open_store
from tttlab.workflow import places
from tttlab.workflow.ui import find_port

# What the processes of a server are told, and where they add up what they count.
_ASKED, _SHARED = "TTTLAB_SERVE", "PROMETHEUS_MULTIPROC_DIR"
HOST = "127.0.0.1"
FAILED_TO_START = 3  # uvicorn does not start such a process again
HELP = """\
{address}   answers in some ten seconds; Ctrl-C ends it
curl {address}/model
printf '{{"instances": [{{"image": "%s"}}]}}' "$(base64 < photo.png | tr -d '\\n')" |
  curl {address}/invocations -H 'Content-Type: application/json' -d @-"""


@dataclass(frozen=True)
class Asked:
    """What the processes of a server are to serve.

    Attributes:
        uri: of a model for MLflow.
        config: the ``model_config``: limits, ``device`` and ``together``.
        root: folder of ``mlflow.db``.
        record: whether an MLflow run is kept there.
        mistake: a file that says, once it is there, that a process has told why it cannot start.
        about: what ``/model`` says of where the model comes from.
    """

    uri: str
    config: dict[str, Any]
    root: str
    record: bool
    mistake: str
    about: dict[str, Any] = field(default_factory=dict)


def configure(limits: Sequence[str], images: str | None, **others: Any) -> dict[str, Any]:
    """Turn options into a ``model_config``.

    Args:
        limits: as ``name=number``, of `tttlab.serving.pictures.Limits`.
        images: the folder whose files may be asked for; None: none.
        others: further entries; None: left out.

    Raises:
        UserError: there is no such device, limit, folder or number.
    """
    from tttlab.serving.pictures import LARGEST_LIMIT, Limits

    config = {name: value for name, value in others.items() if value is not None}
    if "device" in config:
        from tttlab.runtime.devices import choose_device

        choose_device(config["device"], key="--device")
    if config.get("together", 1) < 1:
        raise UserError(f"--together: expected at least 1, found {config['together']}")
    if images is not None:
        if not Path(images).is_dir():
            raise UserError(f"--images: expected a folder, found none at {images}")
        config["folder"] = str(Path(images).resolve())
    known = {name: value for name, value in asdict(Limits()).items() if name != "folder"}
    for text in limits:
        name, _, number = text.partition("=")
        if name not in known:
            raise UserError(f"--limit: no limit {name!r}; {choices(name, known)}")
        try:
            config[name] = type(known[name])(number)
        except ValueError:
            config[name] = 0
        if not 0 < config[name] <= LARGEST_LIMIT:  # nor NaN
            wanted = f"{name}=<number above 0, up to {LARGEST_LIMIT:,}>"
            raise UserError(f"--limit: expected {wanted}, found {text!r}")
    return config


def serve(
    config: Mapping[str, Any],
    *,
    model: str | None = None,
    uri: str | None = None,
    folder: Path | None = None,
    port: int = 5001,
    workers: int = 1,
    record: bool = True,
) -> None:
    """Serve until Ctrl-C.

    Args:
        config: the ``model_config`` (see `tttlab.serving.pyfunc.CONFIG`), as far as it differs.
        model: a registered model's name, whose champion is served; None, without ``uri`` and
            ``folder``: the first one.
        uri: the address of a model for MLflow instead.
        folder: a folder of `tttlab.serving.adaptive_model.save` instead.
        port: the first port to try.
        workers: number of processes, each with the whole model.
        record: whether an MLflow run is kept, where there is a store.

    Raises:
        UserError: there is no such model, no free port, or no run can be kept in the store.
    """
    if workers < 1:
        raise UserError(f"--workers: expected at least 1, found {workers}")
    port = find_port(port)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if workers > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    postpone_compiler()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # cleans up
    with tempfile.TemporaryDirectory(prefix="ttt-lab-") as room:
        found, about = _find(model, uri, folder, Path(room) / "model")
        if workers > 1:
            (shared := Path(room) / "counts").mkdir()
            os.environ[_SHARED] = str(shared)
        keeps = record and (places.ROOT / "mlflow.db").is_file()
        if keeps:
            open_store(places.ROOT)  # a mistake is told here once, not in every process
        about |= {"workers": workers}
        mistake = Path(room) / "mistake"
        asked = Asked(found, dict(config), str(places.ROOT), keeps, str(mistake), about)
        os.environ[_ASKED] = json.dumps(asdict(asked))
        print(HELP.format(address=f"http://{HOST}:{port}"), flush=True)
        _run(port, workers)
        if mistake.exists():  # of several processes; uvicorn ends well even so
            sys.exit(FAILED_TO_START)


def _find(
    model: str | None, uri: str | None, folder: Path | None, into: Path
) -> tuple[str, dict[str, Any]]:
    """Give the address of what is asked for, and what ``/model`` says of it."""
    from tttlab.serving.loading import champion, wrap

    if folder:
        return wrap(folder, into), {"source": str(folder)}
    return (uri, {"source": uri}) if uri else champion(places.ROOT, model)


def _run(port: int, workers: int) -> None:
    import uvicorn

    uvicorn.run(
        "tttlab.workflow.serving:application",
        factory=True,
        host=HOST,
        port=port,
        workers=workers,
        access_log=False,
        timeout_worker_healthcheck=15,  # seconds; one that loads a model answers late
        timeout_graceful_shutdown=10,
    )


def application() -> Any:
    """Make the application in a process of the server; uvicorn calls this.

    Whatever goes wrong here ends the server, for uvicorn would start the process again for ever.
    The first process tells it, and the others nothing.
    """
    asked = Asked(**json.loads(os.environ[_ASKED]))
    try:
        return _make(asked)
    except Exception as error:
        if _is_first(Path(asked.mistake)):
            line = line_of(error)
            text = "".join(traceback.format_exception(error)) if line is None else f"error: {line}"
            print(text.rstrip(), file=sys.stderr, flush=True)
        sys.exit(FAILED_TO_START)


def _is_first(mistake: Path) -> bool:
    """Create the file that says that a mistake was told, and say whether it was not there."""
    try:
        mistake.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the disk is full, say
        return True
    return True


def _make(asked: Asked) -> Any:
    postpone_compiler()
    from tttlab.runtime.allocator import keep_freed_memory
    from tttlab.serving.loading import load
    from tttlab.serving.server import create
    from tttlab.serving.watching import Metrics, Record

    keep_freed_memory()
    root, shared = Path(asked.root), os.environ.get(_SHARED)
    model = load(asked.uri, root, asked.config)
    service = model.unwrap_python_model().service
    metrics = Metrics(lambda: service.waiting, Path(shared) if shared else None)
    record = None
    if asked.record:
        params = asked.about | {"limits": asdict(service.limits)}
        record = Record(root, service.model.name, params)
    return create(model, asked.about, metrics, record)
