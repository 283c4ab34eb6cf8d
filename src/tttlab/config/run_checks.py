"""What may be wrong with the settings of a run, each mistake as ``path: what is wrong``."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tttlab.config.loop_settings import LoopSettings
from tttlab.config.method_settings import ALIAS, Declared, declared, method_file, method_names
from tttlab.config.run_settings import OF_TRAINING, plain
from tttlab.config.strict import Strict, list_mistakes, show
from tttlab.errors import choices

# Keys of a run that are no settings of its method or of the inner loop.
OF_RUNS = ("method", "protocol", "models", "per_model")


class RunError(Exception):
    """Every mistake of one run for one model, each as ``path: what is wrong``."""


def validate(
    sections: tuple[type[Strict], ...],
    values: Mapping[str, Any],
    paths: Mapping[str, str],
    path: str,
    item: str = "",
) -> list[Strict]:
    """Check values of a run, each by the section that knows its key.

    Args:
        sections: what each section allows.
        values: setting → value.
        paths: setting → the path under which it stands in params.yaml.
        path: of the run.
        item: behind the key, as for a value of a list.

    Raises:
        RunError: what is wrong with them.
    """
    parts, mistakes = [], []
    for section in sections:
        own = {key: value for key, value in values.items() if key in section.model_fields}
        try:
            parts.append(section.model_validate(own))
        except ValidationError as error:
            for key, text in list_mistakes(error, own):
                above = paths.get(re.match(r"\w*", key)[0], path)
                mistakes.append(f"{above}.{key}{item}: {text}")
    if mistakes:
        raise RunError(*mistakes)
    return parts


def check_keys(
    entry: Mapping[str, Any],
    values: Mapping[str, Any],
    paths: Mapping[str, str],
    objectives: Mapping[str, str],
    model: str,
    method: str,
    methods: Path,
) -> None:
    """Raise a `RunError` if a key is no setting of the method, of the inner loop or of runs.

    Args:
        entry: the run, as it stands in params.yaml.
        values: its settings for this model.
        paths: setting → the path under which it stands.
        objectives: model name → name of its objective.
        model: the model.
        method: the method, the alias resolved.
        methods: the folder of method files.
    """
    about = declared(method, methods)
    settings = about.settings.model_fields
    taken = [key for key in settings if key in {*LoopSettings.model_fields, *OF_RUNS, "search"}]
    if taken:
        raise RunError(
            f"{method_file(method, methods)}: the adapter already has a setting {taken[0]!r}; "
            "rename this one"
        )
    allowed = {*LoopSettings.model_fields, *settings}
    mistakes = []
    for key in values:
        if key in about.others:
            mistakes.append(
                f"{paths[key]}.{key}: {method} has it, but of a type that this file cannot hold; "
                "write int, float, bool, str, or tuple, list, dict, Literal, Annotated, Optional "
                "of them"
            )
        elif key not in allowed:
            legal = allowed | ({"search"} if "per_model" in paths[key] else {*OF_RUNS, "search"})
            owner = _owner(key, objectives, methods) if entry["method"] == ALIAS else None
            reason = f"unknown key; {choices(str(key), legal)}"
            if owner:
                reason = f"no setting of {method} (the objective of {model}); "
                reason += f"move it to per_model.{owner}"
            mistakes.append(f"{paths[key]}.{key}: {reason}")
    if mistakes:
        raise RunError(*mistakes)


def _owner(key: str, objectives: Mapping[str, str], methods: Path) -> str | None:
    """Find a model whose objective has this setting."""
    names = method_names(methods)
    for model, method in objectives.items():
        if method in names and key in declared(method, methods).settings.model_fields:
            return model
    return None


def foreign_settings(about: Declared) -> dict[str, tuple[Any, str]]:
    """List the inner loop's settings that do not go with a method: the neutral value, and why."""
    foreign: dict[str, tuple[Any, str]] = {}
    if about.predicts:
        foreign["average"] = (0, "has its own prediction")
    if about.normalises:
        foreign["normalisation"] = ("source", "normalises by statistics of its own")
    return foreign


def check_search(
    search: Mapping[str, Any], about: Declared, paths: Mapping[str, str]
) -> dict[str, tuple[Any, ...]]:
    """Check every value that tuning may choose as if it were set.

    Args:
        search: setting → the values to choose from.
        about: what the method declares.
        paths: setting → the path under which its values stand.

    Returns:
        the same, every value once.

    Raises:
        RunError: the first mistake.
    """
    sections = (LoopSettings, about.settings)
    allowed = [
        key
        for section in sections
        for key in section.model_fields
        if about.trains or key not in OF_TRAINING
    ]
    for key, values in search.items():
        path = paths[key]
        if key in OF_TRAINING and not about.trains:
            raise RunError(
                f"{path}.{key}: the method takes no steps, so there is nothing to tune in it; "
                "remove it"
            )
        if key not in allowed:
            raise RunError(
                f"{path}.{key}: there is no such setting to tune; {choices(str(key), allowed)}"
            )
        if not isinstance(values, list | tuple) or not values:
            raise RunError(
                f"{path}.{key}: expected a list of values to choose from, found {show(values)}"
            )
        if key == "steps" and any(value == 0 for value in values):
            raise RunError(
                f"{path}.steps: expected at least 1, found 0; without a step nothing is trained"
            )
        neutral, reason = foreign_settings(about).get(key, (None, ""))
        for number, value in enumerate(values):
            validate(sections, {key: value}, {key: path}, path, f"[{number}]")
            if reason and value != neutral:
                raise RunError(
                    f"{path}.{key}[{number}]: the method {reason}, so that only {neutral} goes "
                    f"with it, found {show(value)}; remove it"
                )
    return {key: tuple(dict.fromkeys(map(plain, values))) for key, values in search.items()}
