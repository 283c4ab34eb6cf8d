"""The runs of params.yaml: each a method with its settings and the adapter's, as every model sees them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictFloat, ValidationError

from tttlab.errors import choices
from tttlab.method_settings import ALIAS, METHODS, declared, method_names
from tttlab.settings import Natural, Positive, Strict, fault, show, tell


def _check_trainable(value: Any) -> Any:
    groups = ("all", "norm", "encoder", "none")
    if isinstance(value, str) and value not in groups:
        raise fault(f"unknown group {value!r}; {choices(value, groups)}, or a list of parameter-name prefixes")
    prefixes = value if isinstance(value, list | tuple) else []
    if not isinstance(value, str) and not (prefixes and all(isinstance(prefix, str) and prefix for prefix in prefixes)):
        raise fault(f"expected {', '.join(groups)} or a list of parameter-name prefixes, found {show(value)}")
    return value


class AdapterSettings(Strict):
    """What the adapter does for every method: how far, how, and which parameters and statistics move."""

    steps: Natural = 1
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: Positive = 1e-3
    momentum: Annotated[StrictFloat, Field(ge=0, lt=1)] = 0.0
    trainable: Annotated[str | tuple[str, ...], BeforeValidator(_check_trainable)] = "encoder"
    normalisation: Literal["source", "image", "mixed", "shrink"] = "source"
    prior: Annotated[StrictFloat, Field(ge=0, le=1)] = 0.1
    threshold: Positive = 1.0
    clip: Positive | None = None


@dataclass(frozen=True)
class RunSettings:
    """One run as one model sees it.

    Attributes:
        method: name of a file in ``methods/`` (never the alias).
        adapter: settings of the adapter.
        settings: keyword arguments of the method's dataclass, as far as they are set.
    """

    method: str
    adapter: AdapterSettings
    settings: dict[str, Any]


class RunError(Exception):
    """Every mistake of one run for one model, each as ``path: what is wrong``."""


def resolve_run(
    runs: Mapping[str, dict[str, Any]],
    objectives: Mapping[str, str],
    run: str,
    model: str,
    protocol: str = "episodic",
    methods: Path = METHODS,
) -> RunSettings:
    """Resolve the alias and the ``per_model`` overrides of one run for one model, and check every value.

    Args:
        runs: the entries of ``adapt.runs``.
        objectives: model name → name of its objective.
        run: a key of ``runs``.
        model: a key of ``objectives``.
        protocol: the protocol that the method must support.
        methods: the folder of method files.

    Raises:
        RunError: what is wrong with it.
    """
    entry, path = runs[run], f"adapt.runs.{run}"
    method = _method(entry, path, objectives, model, methods)
    override = _override(entry, path, objectives, model)
    values = {key: value for key, value in entry.items() if key not in ("method", "per_model")} | override
    places = {key: f"{path}.per_model.{model}" if key in override else path for key in values}
    own = declared(method, methods)
    _check_keys(entry, values, places, objectives, model, method, methods)
    adapter, settings = _validate((AdapterSettings, own.settings), values, places, path)
    if protocol not in own.protocols:
        raise RunError(f"{path}.method: {method} is defined for {' and '.join(own.protocols)}, "
                       f"found adapt.protocol: {protocol}; change one of them")  # fmt: skip
    if not own.trains:
        if values.get("steps"):
            raise RunError(f"{places['steps']}.steps: {method} does not train, expected 0, found {adapter.steps}")
        adapter = adapter.model_copy(update={"steps": 0})
    return RunSettings(method, adapter, settings.model_dump(exclude_unset=True))


def run_mistakes(
    runs: Mapping[str, dict[str, Any]],
    objectives: Mapping[str, str],
    protocol: str = "episodic",
    methods: Path = METHODS,
) -> Iterator[str]:
    """Yield everything that is wrong with the runs, and with the control run ``none``."""
    for run in runs:
        for model in objectives:
            try:
                resolved = resolve_run(runs, objectives, run, model, protocol, methods)
            except RunError as error:
                yield from error.args
                continue
            if run == "none" and (resolved.method != "none" or resolved.adapter.normalisation != "source"):
                yield "adapt.runs.none: the control leaves the network as it is; expected {method: none} alone"
    if "none" not in runs:
        yield "adapt.runs.none: missing; every comparison needs its control, add none: {method: none}"


def _method(entry: dict[str, Any], path: str, objectives: Mapping[str, str], model: str, methods: Path) -> str:
    """Name the method's file, the alias resolved."""
    method = entry.get("method")
    known = method_names(methods)
    if method is None:
        raise RunError(f"{path}.method: missing; allowed: {', '.join([*known, ALIAS])}")
    if method == ALIAS:
        method = objectives[model]
        if method == "none":
            raise RunError(
                f"{path}.method: {ALIAS} means the objective of each model, but models.{model}.objective.name is none; "
                "remove this run or give that model an objective"
            )
    if method not in known:
        raise RunError(f"{path}.method: unknown method {method!r}; {choices(str(method), [*known, ALIAS])}")
    return method


def _override(entry: dict[str, Any], path: str, objectives: Mapping[str, str], model: str) -> dict[str, Any]:
    """Take the model's own settings out of ``per_model``."""
    per_model = entry.get("per_model", {})
    if not isinstance(per_model, dict):
        raise RunError(f"{path}.per_model: expected a model's name and its settings, found {show(per_model)}")
    for name in per_model:
        if name not in objectives:
            raise RunError(f"{path}.per_model.{name}: unknown model; {choices(str(name), objectives)}")
    override = per_model.get(model, {})
    if not isinstance(override, dict):
        raise RunError(f"{path}.per_model.{model}: expected settings with their values, found {show(override)}")
    return override


def _check_keys(
    entry: dict[str, Any],
    values: dict[str, Any],
    places: dict[str, str],
    objectives: Mapping[str, str],
    model: str,
    method: str,
    methods: Path,
) -> None:
    own = declared(method, methods).settings.model_fields
    taken = [key for key in own if key in {*AdapterSettings.model_fields, "method", "per_model"}]
    if taken:
        raise RunError(f"{methods / method}.py: the adapter already has a setting {taken[0]!r}; rename this one")
    allowed = {*AdapterSettings.model_fields, *own}
    mistakes = []
    for key in values:
        if key not in allowed:
            legal = allowed if "per_model" in places[key] else allowed | {"method", "per_model"}
            owner = _owner(key, objectives, methods) if entry["method"] == ALIAS else None
            hint = f"no setting of {method} (the objective of {model}); move it to per_model.{owner}"
            mistakes.append(f"{places[key]}.{key}: {hint if owner else f'unknown key; {choices(str(key), legal)}'}")
    if mistakes:
        raise RunError(*mistakes)


def _owner(key: str, objectives: Mapping[str, str], methods: Path) -> str | None:
    """Find a model whose objective has this setting."""
    known = method_names(methods)
    owners = (
        model
        for model, method in objectives.items()
        if method in known and key in declared(method, methods).settings.model_fields
    )
    return next(owners, None)


def _validate(sections: tuple[type[Strict], ...], values: dict[str, Any], places: dict[str, str], path: str) -> list[Strict]:
    parts, mistakes = [], []
    for section in sections:
        own = {key: value for key, value in values.items() if key in section.model_fields}
        try:
            parts.append(section.model_validate(own))
        except ValidationError as error:
            for key, text in tell(error, own):
                place = next((place for name, place in places.items() if re.match(rf"{name}\b", key)), path)
                mistakes.append(f"{place}.{key}: {text}")
    if mistakes:
        raise RunError(*mistakes)
    return parts
