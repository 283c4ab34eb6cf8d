"""A model that adapts, as a deployment of Ray Serve: several processes, GPUs or machines answer.

Replicas, their restart, batching, queues and the HTTP server are Ray's. Needs the extra ``serve``.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray import serve

from tttlab.errors import UserError
from tttlab.serving import adaptive_model
from tttlab.serving.answers import Wish
from tttlab.serving.invocations import receive, refusal, within
from tttlab.serving.loading import correct_paths
from tttlab.serving.ray_settings import RaySettings, read_settings
from tttlab.serving.requests import read
from tttlab.serving.service import Busy, Late, Service

Adapt = Callable[[Wish, list[np.ndarray]], list[dict[str, Any]]]

app = FastAPI(title="ttt-lab", docs_url=None, redoc_url=None, openapi_url=None)


def adapt_by_wish(
    adapt: Adapt, wishes: Sequence[Wish], pixels: Sequence[np.ndarray]
) -> list[dict[str, Any] | Exception]:
    """Adapt to the images of a batch, those of the same wish at once.

    Ray itself keeps apart only what a request's header names (multiplexed models). Images that
    fail together are tried one by one, so that an error reaches only the request that causes it.

    Args:
        adapt: (wish, images) → a row per image.
        wishes: one per image.
        pixels: the images.

    Returns:
        for each image its row, or what went wrong.
    """
    groups: dict[Wish, list[int]] = {}
    for index, wish in enumerate(wishes):
        groups.setdefault(wish, []).append(index)
    results: list[dict[str, Any] | Exception] = [{} for _ in wishes]
    for wish, group in groups.items():
        for index, row in zip(group, _tried(adapt, wish, [pixels[i] for i in group]), strict=True):
            results[index] = row
    return results


def _tried(
    adapt: Adapt, wish: Wish, pixels: list[np.ndarray]
) -> Sequence[dict[str, Any] | Exception]:
    try:
        return adapt(wish, pixels)
    except Exception as error:
        if len(pixels) == 1:
            return [error]
        return [row for image in pixels for row in _tried(adapt, wish, [image])]


def load_service(settings: RaySettings) -> Service:
    """Load the model in a replica, onto the GPU that Ray gave it, if any."""
    device = "cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu"
    if settings.folder is not None:
        model = adaptive_model.load(Path(settings.folder), device)
        return Service(model, settings.limits)
    import mlflow  # here, where the variables of `build` are set

    if settings.tracking_uri is not None:
        mlflow.set_tracking_uri(settings.tracking_uri)
    correct_paths(mlflow.get_tracking_uri())
    config = asdict(settings.limits) | {"device": device}
    loaded = mlflow.pyfunc.load_model(settings.uri, model_config=config)
    return loaded.unwrap_python_model().service


# Ray copies the class while it is made, and with it only what stands above.
@serve.deployment(name="adaptive")
@serve.ingress(app)
class Adaptive:
    """Answers what MLflow's server answers, at the same path.

    Args:
        settings: which model, and the limits.
    """

    def __init__(self, settings: RaySettings) -> None:
        self._service = load_service(settings)
        self._adapt.set_max_batch_size(settings.max_batch_size)
        self._adapt.set_batch_wait_timeout_s(settings.batch_wait_timeout_s)

    @app.get("/ping")
    @app.get("/health")
    async def ping(self) -> Response:
        """Say that a replica is there."""
        return Response("\n", media_type="application/json")

    @app.post("/invocations")
    async def invocations(self, request: Request) -> Response:
        """Classify images without and with adapting to them; see `Service.answer`."""
        limits = self._service.limits
        late = Late(f"no answer within {limits.seconds:g} s; send fewer images")
        try:
            body = await receive(request, limits.megabytes, limits.seconds)
            async with within(limits.seconds, late):
                return JSONResponse({"predictions": await self._answer(body)})
        except (UserError, Busy) as error:
            status, told = refusal(error)
            return JSONResponse(told, status)

    async def _answer(self, body: bytes) -> list[dict[str, Any]]:
        wish, pixels = await asyncio.to_thread(self._read, body)
        rows = await asyncio.gather(*(self._adapt(wish, image) for image in pixels))
        for row in rows:
            if isinstance(row, Exception):
                raise row
        return rows

    def _read(self, body: bytes) -> tuple[Wish, list[np.ndarray]]:
        images, params = read(body, self._service.limits)
        return self._service.checked(images, Wish(**params))

    @serve.batch
    async def _adapt(
        self, wishes: list[Wish], pixels: list[np.ndarray]
    ) -> list[dict[str, Any] | Exception]:
        """Adapt to images of several requests; Ray calls it for one batch at a time."""
        return await asyncio.to_thread(adapt_by_wish, self._service.adapt, wishes, pixels)


def build(args: Mapping[str, Any]) -> serve.Application:
    """Make the application, for ``serve run tttlab.serving.ray_app:build folder=…``.

    Args:
        args: fields of `RaySettings`.

    Raises:
        UserError: an argument is wrong.
    """
    settings = read_settings(args)
    deployment = Adaptive.options(
        num_replicas=settings.num_replicas,
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        ray_actor_options={
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "runtime_env": {"env_vars": {"MLFLOW_DISABLE_TELEMETRY": "true"}},
        },
    )
    return deployment.bind(settings)
