"""A run's settings along their steps: the tuned one, the default and the runners-up, on part of the test images."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tttlab.experiments.rows import steps_rows
from tttlab.runtime.resuming import Work
from tttlab.workflow.loading import build_run
from tttlab.workflow.shifted import open_test
from tttlab.workflow.sweeps import Sweep


def list_settings(run: Sweep) -> dict[str, dict[str, Any]]:
    """List the settings to follow by name, all different; none for a run that neither trains nor was tuned, and on streams."""
    wish, tuned = run.params.adapt.curve, run.tuned
    if (
        run.ready.settings.protocol == "online"
    ):  # fewer steps on one batch lead to other weights for the next
        return {}
    if not wish.images or not (run.ready.settings.trains or tuned["tuned"]):
        return {}
    named = {"tuned" if tuned["tuned"] else "default": tuned["settings"]}
    named |= {"default": tuned["default"]} if tuned["default"] != tuned["settings"] else {}
    others = [
        told["settings"] for told in tuned["candidates"] if told["settings"] not in named.values()
    ]
    return named | {
        f"candidate-{number}": values for number, values in enumerate(others[: wish.candidates], 1)
    }


def adapt_along_steps(run: Sweep, work: Work) -> pd.DataFrame | None:
    """Predict after each of several numbers of steps, in one pass for every setting.

    Returns:
        rows of `sweep.steps_rows` with the setting's name, its values as text and the steps that it takes; None where
        there is nothing to follow, and on all processes but the first.
    """
    wish, own, settings = run.params.adapt.curve, run.ready.settings, list_settings(run)
    if not settings:
        return None
    images, shifts = open_test(run.params, wish.images, wish.severities)
    if all(shift.clean for shift in shifts):
        return None
    taken = {
        setting: values.get("steps", own.adapter.steps) for setting, values in settings.items()
    }
    steps = sorted({0, *run.tuned.get("steps", ()), *taken.values()}) if own.trains else [0]
    longest = {"steps": steps[-1]} if own.trains else {}
    tables = []
    for setting, values in settings.items():
        ready = build_run(run.params, run.name, run.model, run.source, values | longest)
        rows = steps_rows(steps)
        found = run.over(
            shifts, images, ready, work, f"{run.prefix}-{setting}", record=steps, rows=rows
        )
        if found is not None:
            tables.append(
                found[0].assign(setting=setting, settings=tell(values), used_step=taken[setting])
            )
    return pd.concat(tables, ignore_index=True) if tables else None


def tell(values: Mapping[str, Any]) -> str:
    """Write settings as text, without their steps, which a curve shows."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if key != "steps")
