"""One run on one trained network over the shifted test images, by all processes of the stage together."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.experiments import sweep
from tttlab.runtime.resuming import Work
from tttlab.workflow.loading import (
    Ready,
    Source,
    build_run,
    load_gate,
    load_source,
    load_tuned,
    open_stream,
)
from tttlab.workflow.processes import shares
from tttlab.workflow.shifted import open_test

if TYPE_CHECKING:
    from tttlab.workflow.processes import Processes


class Sweep(NamedTuple):
    """A run (``name``) on one network: ``tuned`` is what was chosen, ``ready`` the run with it; ``images``: the test set."""

    params: Params
    name: str
    model: str
    seed: int
    images: ImageSet
    shifts: list
    fabric: "Processes"
    source: Source
    tuned: dict[str, Any]
    ready: Ready

    @property
    def prefix(self) -> str:
        """Name this network."""
        return f"{self.model}-{self.seed}"

    @property
    def told(self) -> dict[str, Any]:
        """Say what MLflow and the report show as settings: those that act."""
        own = {"protocol": self.ready.settings.protocol, **self.ready.settings.in_use}
        return {
            "run": self.name,
            "method": repr(self.ready.method),
            **own,
            "seed": self.params.seed,
        }

    @property
    def tags(self) -> dict[str, Any]:
        """Say what MLflow finds this run by."""
        return {
            "model": self.model,
            "method": self.ready.settings.method,
            "run": self.name,
            "training_seed": self.seed,
            "protocol": self.ready.settings.protocol,
            "source_run_id": self.source.about.get("mlflow_run_id"),
        }

    def adapt(self, work: Work) -> tuple[pd.DataFrame, np.ndarray] | None:
        """Adapt to this process's share of all shifted images; the first process returns what all found."""
        found = self.over(
            self.shifts, self.images, self.ready, work, self.prefix, gate=load_gate(self.tuned)
        )
        if found is not None:
            found[0].insert(1, "seed", self.seed)
        return found

    def over(
        self, shifts: list, images: ImageSet, ready: Ready, work: Work, prefix: str, **settings: Any
    ):
        """Adapt to any images under any shifts, with a progress bar; see `tttlab.experiments.sweep.adapt_to_shifts`."""
        fabric, device, at_once = (
            self.fabric,
            self.source.device,
            self.params.machine.images_per_step,
        )
        total, hidden = (
            sum(len(shift.of(images)) for shift in shifts) // fabric.world_size,
            not fabric.is_global_zero,
        )
        with tqdm(
            total=total, desc=f"{self.name} {prefix}", unit="image", mininterval=1, disable=hidden
        ) as bar:
            return sweep.adapt_to_shifts(
                self.source.network,
                ready.method,
                ready.loop,
                images,
                shifts,
                statistics=ready.statistics,
                seed=self.params.seed,
                work=work,
                prefix=prefix,
                images_per_step=at_once,
                device=device,
                on_images=bar.update,
                stream=open_stream(self.params, ready.settings.protocol),
                **shares(self.params, fabric),
                **settings,
            )


def open_sweeps(params: Params, name: str, fabric: "Processes") -> dict[str, list[Sweep]]:
    """Load what is needed, for every model a sweep per training seed; every mistake shows here, before any work."""
    tested, found = open_test(params), {model: [] for model in params.models_of(name)}
    for model, sweeps in found.items():
        for seed in params.seeds:
            source, tuned = load_source(params, model, seed, fabric.device), load_tuned(name, model)
            ready = build_run(params, name, model, source, tuned["settings"])
            sweeps.append(Sweep(params, name, model, seed, *tested, fabric, source, tuned, ready))
    return found
