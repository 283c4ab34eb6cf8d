"""The runs of params.yaml: each a method with its settings and the adapter's, as every model sees them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tttlab.config.inner_loop import InnerLoop, LoopSettings
from tttlab.config.method_settings import (
    ALIAS,
    METHODS,
    PROTOCOLS,
    Declared,
    declared,
    method_file,
    method_names,
)
from tttlab.config.run_settings import OF_TRAINING, RunSettings, plain
from tttlab.config.settings import Strict, show, tell
from tttlab.errors import UserError, choices

_OF_RUNS = (
    "method",
    "protocol",
    "models",
    "per_model",
)  # keys of a run that are no settings of its method or the adapter


class RunError(Exception):
    """Every mistake of one run for one model, each as ``path: what is wrong``."""


def resolve_run(
    runs: Mapping[str, dict[str, Any]],
    objectives: Mapping[str, str],
    run: str,
    model: str,
    protocol: str = "episodic",
    methods: Path = METHODS,
    search: Mapping[str, Any] | None = None,
) -> RunSettings:
    """Resolve the alias and the ``per_model`` overrides of one run for one model, and check every value.

    Args:
        runs: the entries of ``adapt.runs``.
        objectives: model name → name of its objective.
        run: a key of ``runs``.
        model: a key of ``objectives``.
        protocol: of runs that do not name their own.
        methods: the folder of method files.
        search: what is tuned in every run that trains; a run's own ``search`` adds to it, replaces entries of it, or, as
            null, does away with it.

    Raises:
        RunError: what is wrong with it.
    """
    entry, path = runs[run], f"adapt.runs.{run}"
    method = _method(entry, path, objectives, model, methods)
    override = _override(entry, path, objectives, model)
    values = {key: value for key, value in entry.items() if key not in _OF_RUNS} | override
    if all(isinstance(part.get("search"), dict) for part in (entry, override)):
        values["search"] = entry["search"] | override["search"]
    places = {key: f"{path}.per_model.{model}" if key in override else path for key in values}
    own = declared(method, methods)
    wished = _search(values, places, {**(search or {})} if own.trains else {})
    values.pop("search", None)
    _check_keys(entry, values, places, objectives, model, method, methods)
    checked, settings = _validate((LoopSettings, own.settings), values, places, path)
    loop = InnerLoop(**checked.model_dump())
    place, protocol = (
        ("protocol", entry["protocol"]) if "protocol" in entry else ("adapt.protocol", protocol)
    )
    if protocol not in PROTOCOLS:
        raise RunError(
            f"{path}.protocol: unknown protocol {protocol!r}; {choices(str(protocol), PROTOCOLS)}"
        )
    if protocol not in own.protocols:
        raise RunError(
            f"{path}.method: {method} is defined for {' and '.join(own.protocols)}, "
            f"found {place}: {protocol}; change one of them"
        )
    if not own.trains:
        if values.get("steps"):
            raise RunError(
                f"{places['steps']}.steps: {method} does not train, expected 0, found {loop.steps}"
            )
        loop = replace(loop, steps=0)
    if own.predicts and loop.average:
        raise RunError(
            f"{places['average']}.average: {method} has its own prediction, expected 0, found {loop.average}"
        )
    settings = settings.model_dump(exclude_unset=True)
    mine = {*(entry.get("search") or {}), *(override.get("search") or {})}
    origins = {
        key: f"{places['search']}.search" if key in mine else "tune.search" for key in wished
    }
    choice = _check_search(wished, own, origins)
    return RunSettings(method, loop, settings, own.trains, choice, protocol)


def models_of(
    entry: Mapping[str, Any], models: Iterable[str], path: str = "adapt.runs"
) -> tuple[str, ...]:
    """List the models that a run is for: those that it names, or all of them.

    Raises:
        RunError: it names none, or one that there is not.
    """
    if "models" not in entry:
        return tuple(models)
    wished, known = entry["models"], tuple(models)
    if not isinstance(wished, list | tuple) or not wished:
        raise RunError(
            f"{path}.models: expected a list of models, found {show(wished)}; remove it for all of them"
        )
    for name in wished:
        if name not in known:
            raise RunError(f"{path}.models: unknown model {name!r}; {choices(str(name), known)}")
    return tuple(name for name in known if name in wished)


def run_mistakes(
    runs: Mapping[str, dict[str, Any]],
    objectives: Mapping[str, str],
    protocol: str = "episodic",
    batch_size: int = 64,
    methods: Path = METHODS,
    search: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Yield everything that is wrong with the runs, and with the control run ``none``."""
    for run, entry in runs.items():
        try:
            models = models_of(entry, objectives, f"adapt.runs.{run}")
        except RunError as error:
            yield from error.args
            continue
        for model in models:
            try:
                resolved = resolve_run(runs, objectives, run, model, protocol, methods, search)
            except RunError as error:
                yield from error.args
                continue
            least = declared(resolved.method, methods).smallest_batch
            # A visit's batches differ by one image at most, so that none is smaller than (batch_size + 1) / 2 where there are
            # as many images; `tttlab.experiments.adapting` looks at what there is.
            if resolved.protocol == "online" and batch_size < 2 * least - 1:
                yield (
                    f"adapt.online.batch_size: {resolved.method} (adapt.runs.{run}) needs batches of {least} images or "
                    f"more; expected {2 * least - 1} or more, found {batch_size}"
                )
            if run == "none" and resolved.search:
                yield "adapt.runs.none.search: the control has nothing to tune; remove it"
            plain = (
                resolved.method == "none"
                and resolved.loop.normalisation == "source"
                and not resolved.loop.average
            )
            if run == "none" and not (plain and models == tuple(objectives)):
                yield "adapt.runs.none: the control leaves every network as it is; expected {method: none} alone"
    if "none" not in runs:
        yield "adapt.runs.none: missing; every comparison needs its control, add none: {method: none}"


def _method(
    entry: dict[str, Any], path: str, objectives: Mapping[str, str], model: str, methods: Path
) -> str:
    """Name the method, the alias resolved, and see that its file can be read."""
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
    if method not in known and not (isinstance(method, str) and "." in method):
        raise RunError(
            f"{path}.method: unknown method {method!r}; {choices(str(method), [*known, ALIAS])}, "
            "or the dotted path of a module of your own"
        )
    try:
        head = declared(method, methods).head
    except UserError as error:
        raise RunError(f"{path}.method: {error}") from error
    if head not in (None, objectives[model]):
        raise RunError(
            f"{path}.method: {method} needs the head of models.{model}.objective.name: {head}, found "
            f"{objectives[model]}; set method: {ALIAS} for each model's own, or change the objective"
        )
    return method


def _override(
    entry: dict[str, Any], path: str, objectives: Mapping[str, str], model: str
) -> dict[str, Any]:
    """Take the model's own settings out of ``per_model``."""
    per_model = entry.get("per_model", {})
    if not isinstance(per_model, dict):
        raise RunError(
            f"{path}.per_model: expected a model's name and its settings, found {show(per_model)}"
        )
    for name in per_model:
        if name not in objectives:
            raise RunError(
                f"{path}.per_model.{name}: unknown model; {choices(str(name), objectives)}"
            )
    override = per_model.get(model, {})
    if not isinstance(override, dict):
        raise RunError(
            f"{path}.per_model.{model}: expected settings with their values, found {show(override)}"
        )
    return override


def _search(
    values: dict[str, Any], places: dict[str, str], shared: dict[str, Any]
) -> dict[str, Any]:
    """Put together what one run tunes: what all that train do, and its own wishes."""
    if "search" not in values:
        return shared
    own = values["search"]
    if own is not None and not isinstance(own, dict):
        raise RunError(
            f"{places['search']}.search: expected settings with lists of values, or null, found {show(own)}"
        )
    return (
        {}
        if own is None
        else {key: found for key, found in (shared | own).items() if found is not None}
    )


def _check_search(
    wished: dict[str, Any], own: Declared, origins: Mapping[str, str]
) -> dict[str, tuple[Any, ...]]:
    """Check every value that tuning may choose as if it were set."""
    sections = (LoopSettings, own.settings)
    allowed = [
        key
        for section in sections
        for key in section.model_fields
        if own.trains or key not in OF_TRAINING
    ]
    for key, found in wished.items():
        place = origins[key]
        if key in OF_TRAINING and not own.trains:
            raise RunError(
                f"{place}.{key}: the method takes no steps, so there is nothing to tune in it; remove it"
            )
        if key not in allowed:
            raise RunError(
                f"{place}.{key}: there is no such setting to tune; {choices(str(key), allowed)}"
            )
        if not isinstance(found, list | tuple) or not found:
            raise RunError(
                f"{place}.{key}: expected a list of values to choose from, found {show(found)}"
            )
        if key == "steps" and any(value == 0 for value in found):
            raise RunError(
                f"{place}.steps: expected at least 1, found 0; without a step nothing is trained"
            )
        for number, value in enumerate(found):
            _validate(sections, {key: value}, {key: place}, place, f"[{number}]")
    return {
        key: tuple(dict.fromkeys(plain(value) for value in found)) for key, found in wished.items()
    }


def _check_keys(
    entry: dict[str, Any],
    values: dict[str, Any],
    places: dict[str, str],
    objectives: Mapping[str, str],
    model: str,
    method: str,
    methods: Path,
) -> None:
    about = declared(method, methods)
    own = about.settings.model_fields
    taken = [key for key in own if key in {*LoopSettings.model_fields, *_OF_RUNS, "search"}]
    if taken:
        raise RunError(
            f"{method_file(method, methods)}: the adapter already has a setting {taken[0]!r}; rename this one"
        )
    allowed = {*LoopSettings.model_fields, *own}
    mistakes = []
    for key in values:
        if key in about.others:
            mistakes.append(
                f"{places[key]}.{key}: {method} has it, but of a type that this file cannot hold; write "
                "int, float, bool, str, or tuple, list, dict, Literal, Annotated, Optional of them"
            )
        elif key not in allowed:
            legal = allowed | ({"search"} if "per_model" in places[key] else {*_OF_RUNS, "search"})
            owner = _owner(key, objectives, methods) if entry["method"] == ALIAS else None
            hint = (
                f"no setting of {method} (the objective of {model}); move it to per_model.{owner}"
            )
            mistakes.append(
                f"{places[key]}.{key}: {hint if owner else f'unknown key; {choices(str(key), legal)}'}"
            )
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


def _validate(
    sections: tuple[type[Strict], ...],
    values: dict[str, Any],
    places: dict[str, str],
    path: str,
    item: str = "",
) -> list[Strict]:
    parts, mistakes = [], []
    for section in sections:
        own = {key: value for key, value in values.items() if key in section.model_fields}
        try:
            parts.append(section.model_validate(own))
        except ValidationError as error:
            for key, text in tell(error, own):
                place = next(
                    (place for name, place in places.items() if re.match(rf"{name}\b", key)), path
                )
                mistakes.append(f"{place}.{key}{item}: {text}")
    if mistakes:
        raise RunError(*mistakes)
    return parts
