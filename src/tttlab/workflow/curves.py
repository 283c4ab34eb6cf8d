"""Accuracy after every number of steps: the tuned settings, the default and the runners-up."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from tttlab.experiments.adapting import Result, Sweep
from tttlab.experiments.jobs import Experiment
from tttlab.experiments.rows import steps_rows
from tttlab.runtime.resuming import Work
from tttlab.workflow.loading import build_run
from tttlab.workflow.network_runs import NetworkRun
from tttlab.workflow.shifted import open_test

if TYPE_CHECKING:
    import pandas as pd


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


class Curve(NamedTuple):
    """One setting along its steps.

    Attributes:
        setting: its name.
        values: its values.
        used_step: the number of steps that it takes.
        sweep: over part of the test images, which predicts after several numbers of steps.
    """

    setting: str
    values: dict[str, Any]
    used_step: int
    sweep: Sweep

    def table(self, result: Result) -> "pd.DataFrame":
        """Make rows of `steps_rows` with the setting's name, its values as text and its steps."""
        about = {"setting": self.setting, "settings": tell(self.values)}
        return result.table.assign(**about, used_step=self.used_step)


def list_curves(run: NetworkRun, work: Work) -> list[Curve]:
    """List the curves of a run, one pass per setting; none if there is nothing to follow."""
    curve, settings, followed = run.params.adapt.curve, run.ready.settings, list_settings(run)
    if not followed:
        return []
    images, shifts = open_test(run.params, curve.images, curve.severities)
    if all(shift.clean for shift in shifts):
        return []
    used = {name: values.get("steps", settings.loop.steps) for name, values in followed.items()}
    steps = [0]
    if settings.trains:
        steps = sorted({0, *run.tuned.get("steps", ()), *used.values()})
    longest = {"steps": steps[-1]} if settings.trains else {}
    curves = []
    for name, values in followed.items():
        task = build_run(run.params, *run.piece[:2], run.source, values | longest).task
        experiment = Experiment(task, images, record=steps)
        sweep = Sweep(experiment, shifts, work, f"steps-{name}", steps_rows(steps))
        curves.append(Curve(name, values, used[name], sweep))
    return curves


def tell(values: Mapping[str, Any]) -> str:
    """Format settings as text, without their steps, which a curve shows."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if key != "steps")
