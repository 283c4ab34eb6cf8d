"""MLflow's scoring server for a model that adapts, made safe to leave alone.

MLflow's own application answers ``/invocations``, ``/ping``, ``/health`` and ``/version``. What
stands around it here limits what is read, answers every mistake in one line of JSON, has enough
threads for requests to be adapted to together, and adds ``/model`` and ``/metrics``.
"""

import asyncio
import logging
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from PIL import Image

from tttlab.errors import UserError
from tttlab.serving.answers import Wish
from tttlab.serving.replies import FAILED, JSON_TYPE, Message, Receive, Refused, Reply, Send
from tttlab.serving.requests import check_body
from tttlab.serving.service import Service
from tttlab.serving.watching import Metrics, Record
from tttlab.tracking.store import quiet

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel

# What is answered; MLflow's pages about its interface load scripts from elsewhere.
ADDRESSES = ("/invocations", "/ping", "/health", "/version", "/model", "/metrics")
REQUESTS = 256  # most requests at once; each waits in a thread of its own
HELD = 16  # most bytes of all requests at once, as a multiple of the limit for one
GRACE = 5.0  # seconds that MLflow's own limit comes after ours
_log = logging.getLogger("uvicorn.error")


class Gone(Exception):
    """The client has left before its request was read."""


def create(
    model: "PyFuncModel", about: dict[str, Any], metrics: Metrics, record: Record | None
) -> "Guard":
    """Make the application.

    Args:
        model: a loaded model of `tttlab.serving.pyfunc`.
        about: what ``/model`` says beside names and limits, such as the model's address.
        metrics: what ``/metrics`` tells.
        record: the MLflow run that is kept; None: none.

    Returns:
        an application of ASGI.
    """
    with quiet():
        from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
        from mlflow.pyfunc import scoring_server

    # Our own limit is told in a better sentence.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    service = model.unwrap_python_model().service
    _warm_up(service)
    watchers = [metrics, *([record] if record else [])]
    service.watchers += watchers
    MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.set(str(int(service.limits.seconds + GRACE)))
    app = scoring_server.init(model)

    @app.get("/model")
    def describe() -> JSONResponse:
        return JSONResponse(describe_model(service) | about)

    @app.get("/metrics")
    def measure() -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    return Guard(app, service, watchers)


def _warm_up(service: Service) -> None:
    """Answer once, so that the first client does not wait for what is made on first use."""
    side = service.model.image_size
    service.adapt(*service.checked([np.zeros((side, side, 3), np.uint8)], Wish(gate=False)))


def describe_model(service: Service) -> dict[str, Any]:
    """Say what a service answers by, and what it refuses."""
    model = service.model
    return {
        "name": model.name,
        "classes": model.classes,
        "image_size": model.image_size,
        "best": model.best,
        "runs": {
            name: {
                "method": type(run.task.method).__module__.rpartition(".")[2],
                "steps": run.task.loop.steps,
                "gate": asdict(run.gate) if run.gate else None,
            }
            for name, run in model.runs.items()
        },
        "refused": model.refused,
        "limits": asdict(service.limits) | {"folder": bool(service.limits.folder)},
        "ttt_lab": version("ttt-lab"),
        "mlflow": version("mlflow"),
    }


class Guard:
    """Stands around MLflow's application; see the module's docstring.

    Args:
        app: MLflow's application.
        service: what answers behind it.
        watchers: are told what is refused; closed in the end, where they can be.
    """

    def __init__(self, app: Any, service: Service, watchers: Sequence[Metrics | Record]) -> None:
        self._app, self._service, self._watchers = app, service, watchers
        self._most = service.limits.megabytes * 10**6
        self._open = self._held = 0  # requests, and bytes of their bodies
        # Apart from the threads that wait for answers, so that a mistake is told at once.
        self._checking = ThreadPoolExecutor(2, "check")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI wants it."""
        if scope["type"] == "lifespan":
            threads = ThreadPoolExecutor(REQUESTS, "answer")
            asyncio.get_running_loop().set_default_executor(threads)
            await self._app(scope, receive, send)
            for watcher in self._watchers:
                if isinstance(watcher, Record):
                    watcher.close()
        elif scope["type"] == "http":
            await self._answer(scope, receive, Reply(send, self._refuse))

    def _refuse(self, status: int, code: str, line: str) -> None:
        for watcher in self._watchers:
            watcher.refused(code)
        _log.info("refused (%d %s): %s", status, code, line)

    async def _answer(self, scope: Message, receive: Receive, reply: "Reply") -> None:
        body = bytearray()
        self._open += 1
        try:
            if scope["path"] not in ADDRESSES:
                raise Refused(404, f"expected one of {', '.join(ADDRESSES)}, found another address")
            if (scope["method"], scope["path"]) == ("POST", "/invocations"):
                await self._read(scope, receive, body)
                loop = asyncio.get_running_loop()
                check = check_body, bytes(body), self._service.limits
                checked = await loop.run_in_executor(self._checking, *check)
                scope, receive = _again(checked, scope, receive)
            await self._app(scope, receive, reply.pass_on)
        except Gone:
            pass
        except UserError as error:
            await reply.refuse(400, str(error))
        except Refused as error:
            await reply.refuse(error.status, str(error), receive)
        except Exception:
            _log.exception("a request failed")
            await reply.refuse(500, FAILED)
        finally:
            self._open -= 1
            self._held -= len(body)

    async def _read(self, scope: Message, receive: Receive, body: bytearray) -> None:
        """Read the body of a request into ``body``.

        Raises:
            Refused: it is too large or too slow, of no type that is answered, or one too many.
            Gone: the client has left.
        """
        _check_headers(dict(scope["headers"]), self._service.limits.megabytes)
        if self._open > REQUESTS:
            raise Refused(429, f"{REQUESTS} requests wait already; try again later")
        try:
            async with asyncio.timeout(self._service.limits.seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    part = message.get("body", b"")
                    body += part
                    self._held += len(part)
                    if len(body) > self._most:
                        raise _too_large(self._service.limits.megabytes)
                    if self._held > HELD * self._most:
                        raise Refused(429, "too many bytes wait already; try again later")
                    more = message.get("more_body", False)
        except TimeoutError as error:
            seconds = self._service.limits.seconds
            raise Refused(408, f"the body did not arrive within {seconds:g} s") from error


def _again(body: bytes, scope: Message, receive: Receive) -> tuple[Message, Receive]:
    """Make a request of a body that was read."""
    headers = [(b"content-type", JSON_TYPE), (b"content-length", b"%d" % len(body))]
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Message:
        return left.pop() if left else await receive()

    return scope | {"headers": headers}, read


def _check_headers(headers: dict[bytes, bytes], megabytes: int) -> None:
    kind = headers.get(b"content-type", b"")
    if kind.partition(b";")[0].strip().lower() != JSON_TYPE:
        found = repr(kind[:60].decode("latin-1")) if kind else "none"
        raise Refused(415, f"expected the content type application/json, found {found}")
    charset = re.search(rb"charset=\"?([\w.-]*)", kind.lower())
    if charset and charset[1] != b"utf-8":
        raise Refused(415, f"expected the charset utf-8, found {charset[1][:60].decode()!r}")
    if b"content-encoding" in headers:
        raise Refused(415, "expected a body that is not compressed")
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > megabytes * 10**6:
        raise _too_large(megabytes)


def _too_large(megabytes: int) -> Refused:
    return Refused(413, f"expected a body of at most {megabytes} MB; send fewer or smaller images")
