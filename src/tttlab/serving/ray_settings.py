"""What a deployment of Ray Serve is told: which model, how often, and what to refuse."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tttlab.config.strict import list_mistakes
from tttlab.errors import UserError, choices
from tttlab.serving.pictures import LARGEST_LIMIT, Limits

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, le=LARGEST_LIMIT)]


class RaySettings(BaseModel):
    """Arguments of `tttlab.serving.ray_app.build`; text is converted, as a command line gives it.

    Attributes:
        folder: of a model, as `tttlab.serving.adaptive_model.save` writes it.
        uri: of a registered model instead, ``models:/<name>@champion``.
        tracking_uri: where MLflow's registry is; None: as MLflow is set up.
        num_replicas: processes that answer, each with a copy of the model.
        num_cpus: cores that Ray reserves for a replica; PyTorch uses as many threads.
        num_gpus: part of a GPU that Ray reserves for a replica; 0: it computes on the CPU.
        max_batch_size: most images that a replica adapts to at once.
        batch_wait_timeout_s: longest time that an image waits for others to come, seconds. Ray
            counts it while the batch before is worked on, too: much less than that takes, and
            every image is a batch of its own.
        max_ongoing_requests: most requests that a replica has at once.
        max_queued_requests: most requests that wait for a replica; others are refused.
        images: most images of a request; this and what follows as in `Limits`.
        pixels: most pixels of a request's images together.
        megabytes: most megabytes of a request.
        steps: most steps.
        seconds: longest time that a request waits inside a replica.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    folder: str | None = None
    uri: str | None = None
    tracking_uri: str | None = None
    num_replicas: Count = 1
    num_cpus: Share = 1.0
    num_gpus: Share = 0.0
    max_batch_size: Count = 64
    batch_wait_timeout_s: Share = 0.1
    max_ongoing_requests: Count = 64
    max_queued_requests: Count = 256
    images: Count = Limits.images
    pixels: Count = Limits.pixels
    megabytes: Positive = Limits.megabytes
    steps: Annotated[int, Field(ge=0)] = Limits.steps
    seconds: Positive = Limits.seconds

    @property
    def limits(self) -> Limits:
        """What a replica refuses; a file's name means nothing on several machines."""
        names = ("images", "pixels", "megabytes", "steps", "seconds")
        return Limits(**{name: getattr(self, name) for name in names}, folder=None)


def read_settings(args: Mapping[str, Any]) -> RaySettings:
    """Check the arguments of a deployment; a folder becomes an absolute path.

    Raises:
        UserError: something is unknown or wrong, or it is not said which model.
    """
    fields = RaySettings.model_fields
    if unknown := [name for name in args if name not in fields]:
        raise UserError(f"unknown key {unknown[0]!r}; {choices(unknown[0], fields)}")
    try:
        settings = RaySettings.model_validate(dict(args))
    except ValidationError as error:
        key, text = list_mistakes(error, dict(args))[0]
        raise UserError(f"{key}: {text}") from error
    if (settings.folder is None) == (settings.uri is None):
        found = "neither" if settings.uri is None else "both"
        raise UserError(
            f"expected folder=outputs/served/<model> or uri=models:/<name>@champion, found {found}"
        )
    if settings.folder is None:
        return settings
    folder = Path(settings.folder).resolve()
    if not (folder / "model.json").is_file():
        raise UserError(
            f"folder: expected a model that adapts, found none in {folder}; run the stage register"
        )
    return settings.model_copy(update={"folder": str(folder)})
