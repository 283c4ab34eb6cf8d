"""Accuracy after every number of steps: the tuned settings, the default and the runners-up."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tttlab.experiments.rows import steps_rows
from tttlab.runtime.resuming import Work
from tttlab.workflow.loading import build_run
from tttlab.workflow.network_runs import NetworkRun
from tttlab.workflow.shifted import open_test


def list_settings(run: NetworkRun) -> dict[str, dict[str, Any]]:
    """List the settings to follow by name, all different.

    A run that neither trains nor was tuned has none. A stream has none, because fewer steps on one
    batch lead to other weights for the next.
    """
    curve, tuned, settings = run.params.adapt.curve, run.tuned, run.ready.settings
    followed = curve.images and (settings.trains or tuned["tuned"])
    if settings.protocol == "online" or not followed:
        return {}
    named = {"tuned" if tuned["tuned"] else "default": tuned["settings"]}
    if tuned["default"] != tuned["settings"]:
        named["default"] = tuned["default"]
    candidates = [candidate["settings"] for candidate in tuned["candidates"]]
    runners_up = [values for values in candidates if values not in named.values()]
    for number, values in enumerate(runners_up[: curve.candidates], 1):
        named[f"candidate-{number}"] = values
    return named


def adapt_along_steps(run: NetworkRun, work: Work) -> pd.DataFrame | None:
    """Predict on part of the test images after several numbers of steps, one pass per setting.

    Returns:
        rows of `steps_rows` with the setting's name, its values as text and the steps that it
        takes; None if there is nothing to follow, and on all processes but the first.
    """
    curve, settings, followed = run.params.adapt.curve, run.ready.settings, list_settings(run)
    if not followed:
        return None
    images, shifts = open_test(run.params, curve.images, curve.severities)
    if all(shift.clean for shift in shifts):
        return None
    used = {name: values.get("steps", settings.loop.steps) for name, values in followed.items()}
    steps = [0]
    if settings.trains:
        steps = sorted({0, *run.tuned.get("steps", ()), *used.values()})
    longest = {"steps": steps[-1]} if settings.trains else {}
    tables = []
    for name, values in followed.items():
        ready = build_run(run.params, *run.piece[:2], run.source, values | longest)
        rows = steps_rows(steps)
        result = run.over(shifts, images, ready, work, f"steps-{name}", record=steps, rows=rows)
        if result is not None:
            table, _ = result
            about = {"setting": name, "settings": tell(values), "used_step": used[name]}
            tables.append(table.assign(**about))
    return pd.concat(tables, ignore_index=True) if tables else None


def tell(values: Mapping[str, Any]) -> str:
    """Format settings as text, without their steps, which a curve shows."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if key != "steps")
