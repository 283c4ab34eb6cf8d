"""One run on one trained network over the shifted test images, by all processes of the stage together."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from pipeline.loading import Ready, Source, build_run, load_gate, load_source, load_tuned
from pipeline.shifted import open_test
from pipeline.streams import open_stream
from tttlab import sweep
from tttlab.data import ImageSet
from tttlab.params import Params
from tttlab.resuming import Work
from tttlab.shifts import Shift

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from tttlab.ranks import Alone


class Sweep(NamedTuple):
    """A run (``name``) on one network: ``tuned`` is what was chosen, ``ready`` the run with it; ``images``: the test set."""

    params: Params
    name: str
    model: str
    seed: int
    images: ImageSet
    shifts: list[Shift]
    fabric: "Alone | Fabric"
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
        return {"run": self.name, "method": repr(self.ready.method), **own, "seed": self.params.seed}

    @property
    def tags(self) -> dict[str, Any]:
        """Say what MLflow finds this run by."""
        return {"model": self.model, "method": self.ready.settings.method, "run": self.name, "training_seed": self.seed,
                "protocol": self.ready.settings.protocol, "source_run_id": self.source.about.get("mlflow_run_id")}  # fmt: skip

    def adapt(self, work: Work) -> tuple[pd.DataFrame, np.ndarray] | None:
        """Adapt to this process's share of all shifted images; the first process returns what all found."""
        found = self.over(self.shifts, self.images, self.ready, work, self.prefix, gate=load_gate(self.tuned))
        if found is not None:
            found[0].insert(1, "seed", self.seed)
        return found

    def over(self, shifts: list, images: ImageSet, ready: Ready, work: Work, prefix: str, **settings: Any):
        """Adapt to any images under any shifts, with a progress bar; see `tttlab.sweep.adapt_to_shifts`."""
        fabric, machine, device = self.fabric, self.params.machine, self.source.device
        total, hidden = sum(len(shift.of(images)) for shift in shifts) // fabric.world_size, not fabric.is_global_zero
        with tqdm(total=total, desc=f"{self.name} {prefix}", unit="image", mininterval=1, disable=hidden) as bar:
            return sweep.adapt_to_shifts(
                self.source.network, ready.method, ready.loop, images, shifts, statistics=ready.statistics,
                seed=self.params.seed, work=work, prefix=prefix, images_per_step=machine.images_per_step, device=device,
                on_images=bar.update, workers=machine.workers if device.type == "cpu" else 0,
                stream=open_stream(self.params, ready.settings.protocol),
                rank=fabric.global_rank, ranks=fabric.world_size, barrier=fabric.barrier, **settings,
            )  # fmt: skip


def open_sweep(params: Params, name: str, model: str, seed: int, fabric: "Alone | Fabric") -> Sweep:
    """Load what is needed; every mistake shows here, before any work."""
    source, tuned = load_source(params, model, seed, fabric.device), load_tuned(name, model)
    ready = build_run(params, name, model, source, tuned["settings"])
    return Sweep(params, name, model, seed, *open_test(params), fabric, source, tuned, ready)
