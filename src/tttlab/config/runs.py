"""The runs of params.yaml: each a method with its settings and the inner loop's, for each model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tttlab.config.inner_loop import InnerLoop
from tttlab.config.loop_settings import LoopSettings
from tttlab.config.method_settings import ALIAS, METHODS, PROTOCOLS, declared, method_names
from tttlab.config.run_checks import (
    OF_RUNS,
    RunError,
    check_keys,
    check_search,
    foreign_settings,
    validate,
)
from tttlab.config.run_settings import RunSettings
from tttlab.config.strict import show
from tttlab.errors import UserError, choices


def resolve_run(
    runs: Mapping[str, dict[str, Any]],
    objectives: Mapping[str, str],
    run: str,
    model: str,
    protocol: str = "episodic",
    methods: Path = METHODS,
    search: Mapping[str, Any] | None = None,
) -> RunSettings:
    """Resolve the alias and the overrides of one run for one model, and check every value.

    Args:
        runs: the entries of ``adapt.runs``.
        objectives: model name → name of its objective.
        run: a key of ``runs``.
        model: a key of ``objectives``.
        protocol: of runs that do not name their own.
        methods: the folder of method files.
        search: what is tuned in every run that takes steps; a run's own ``search`` adds to it,
            replaces entries of it, or, as null, does away with it.

    Raises:
        RunError: what is wrong with it.
    """
    entry, path = runs[run], f"adapt.runs.{run}"
    method = _method(entry, path, objectives, model, methods)
    about = declared(method, methods)
    override = _override(entry, path, objectives, model)
    values = {key: value for key, value in entry.items() if key not in OF_RUNS} | override
    if all(isinstance(part.get("search"), dict) for part in (entry, override)):
        values["search"] = entry["search"] | override["search"]
    paths = {key: f"{path}.per_model.{model}" if key in override else path for key in values}
    takes_steps = about.trains and values.get("steps") != 0
    shared = {
        key: choice for key, choice in (search or {}).items() if key not in foreign_settings(about)
    }
    wished = _search(values, paths, shared if takes_steps else {})
    values.pop("search", None)
    check_keys(entry, values, paths, objectives, model, method, methods)
    checked, settings = validate((LoopSettings, about.settings), values, paths, path)
    loop = InnerLoop(**checked.model_dump())
    protocol = _protocol(entry, path, method, about.protocols, protocol)
    if not about.trains:
        if values.get("steps"):
            raise RunError(
                f"{paths['steps']}.steps: {method} does not train, expected 0, found {loop.steps}"
            )
        loop = replace(loop, steps=0)
    for key, (neutral, reason) in foreign_settings(about).items():
        if (value := getattr(loop, key)) != neutral:
            raise RunError(
                f"{paths[key]}.{key}: {method} {reason}, expected {neutral}, found {value}"
            )
    of_this_run = {*(entry.get("search") or {}), *(override.get("search") or {})}
    origins = {
        key: f"{paths['search']}.search" if key in of_this_run else "tune.search" for key in wished
    }
    searched = check_search(wished, about, origins)
    given = settings.model_dump(include=settings.model_fields_set | searched.keys())
    return RunSettings(method, loop, given, about.trains, searched, protocol)


def _protocol(
    entry: Mapping[str, Any], path: str, method: str, supported: Iterable[str], default: str
) -> str:
    """Choose the protocol of a run: its own, or that of all runs."""
    key = "protocol" if "protocol" in entry else "adapt.protocol"
    protocol = entry.get("protocol", default)
    if protocol not in PROTOCOLS:
        raise RunError(
            f"{path}.protocol: unknown protocol {protocol!r}; {choices(str(protocol), PROTOCOLS)}"
        )
    if protocol not in supported:
        raise RunError(
            f"{path}.method: {method} is defined for {' and '.join(supported)}, "
            f"found {key}: {protocol}; change one of them"
        )
    return protocol


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
            f"{path}.models: expected a list of models, found {show(wished)}; "
            "remove it for all of them"
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
            if resolved.protocol == "online":
                yield from _batch_mistakes(run, resolved.method, batch_size, methods)
            if run == "none":
                yield from _control_mistakes(resolved, models == tuple(objectives))
    if "none" not in runs:
        yield (
            "adapt.runs.none: missing; every comparison needs its control, add none: {method: none}"
        )


def _batch_mistakes(run: str, method: str, batch_size: int, methods: Path) -> Iterator[str]:
    """Tell whether some batch of a stream will be too small for the method.

    The batches of a visit differ by at most one image. So none is smaller than
    (batch_size + 1) / 2, if there are as many images; `tttlab.experiments.adapting` counts them.
    """
    least = 2 * declared(method, methods).smallest_batch - 1
    if batch_size < least:
        yield (
            f"adapt.online.batch_size: {method} (adapt.runs.{run}) needs batches of "
            f"{(least + 1) // 2} images or more; expected {least} or more, found {batch_size}"
        )


def _control_mistakes(resolved: RunSettings, for_all: bool) -> Iterator[str]:
    """Tell whether the control run changes anything, or is not for all models."""
    if resolved.search:
        yield "adapt.runs.none.search: the control has nothing to tune; remove it"
    loop = resolved.loop
    plain = resolved.method == "none" and loop.normalisation == "source" and not loop.average
    if not (plain and for_all):
        yield (
            "adapt.runs.none: the control leaves every network as it is; "
            "expected {method: none} alone"
        )


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
                f"{path}.method: {ALIAS} means the objective of each model, "
                f"but models.{model}.objective.name is none; remove this run "
                "or give that model an objective"
            )
        if method not in known:
            raise RunError(
                f"{path}.method: {ALIAS} means the objective of {model}, {method}, and there is no "
                f"methods/{method}.py to adapt by it; add it, or name this run's models"
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
            f"{path}.method: {method} needs the head of models.{model}.objective.name: {head}, "
            f"found {objectives[model]}; set method: {ALIAS} for each model's own, "
            "or change the objective"
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
    values: dict[str, Any], paths: dict[str, str], shared: dict[str, Any]
) -> dict[str, Any]:
    """Put together what one run tunes: what all runs that train do, and what is its own."""
    if "search" not in values:
        return shared
    own = values["search"]
    if own is None:
        return {}
    if not isinstance(own, dict):
        raise RunError(
            f"{paths['search']}.search: expected settings with lists of values, or null, "
            f"found {show(own)}"
        )
    return {key: choice for key, choice in (shared | own).items() if choice is not None}
