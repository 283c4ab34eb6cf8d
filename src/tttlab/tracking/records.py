"""Points, tags and settings of one run, within MLflow's limits."""

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tttlab.tracking.store import quiet

if TYPE_CHECKING:
    from mlflow import MlflowClient

_NAME_LIMIT = 250  # characters of the name of a metric or parameter; MLflow refuses longer ones
TAG_LIMIT = 8_000  # characters; MLflow cuts longer ones, perhaps within a table


def create_run(client: "MlflowClient", experiment: str, name: str, tags: Mapping[str, Any]) -> str:
    """Create a run with its tags and MLflow's own of user, script and commit; return its id."""
    from mlflow.tracking.context.registry import resolve_tags

    tags = {key: str(value)[:TAG_LIMIT] for key, value in tags.items()}
    with quiet():
        tags = resolve_tags(tags)
    return client.create_run(experiment, run_name=name, tags=tags).info.run_id


def log_points(
    client: "MlflowClient", run_id: str, points: Sequence[tuple[str, float | None, int]]
) -> None:
    """Log (name, value, step) points; None and NaN, which mean unknown, are left out."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [
        Metric(legal_name(name), float(value), now, step)
        for name, value, step in points
        if value is not None and value == value
    ]
    for start in range(0, len(metrics), 1_000):  # MLflow's limit for one call
        client.log_batch(run_id, metrics=metrics[start : start + 1_000])


def log_tags(client: "MlflowClient", run_id: str, tags: Mapping[str, Any]) -> None:
    """Set tags; values become text."""
    from mlflow.entities import RunTag

    entries = [RunTag(name, str(value)[:TAG_LIMIT]) for name, value in tags.items()]
    client.log_batch(run_id, tags=entries)


def log_params(client: "MlflowClient", run_id: str, params: Mapping[str, Any]) -> None:
    """Log settings, nested as they are in params.yaml."""
    from mlflow.entities import Param

    entries = [Param(legal_name(name), str(value)) for name, value in flatten(params).items()]
    for start in range(0, len(entries), 100):  # MLflow's limit for one call
        client.log_batch(run_id, params=entries[start : start + 100])


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested values by their path: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat = {}
    for name, value in nested.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat


def legal_name(name: str) -> str:
    """Write a name as MLflow accepts it for a metric or parameter.

    A name that has to change ends with a digest, so that different names stay different.
    """
    legal = re.sub(r"[^\w\-. :/]", "_", name)
    if legal == name and len(name) <= _NAME_LIMIT:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{legal[: _NAME_LIMIT - len(digest) - 1]} {digest}"
