"""One run on one trained network over the shifted test images, by all processes of the stage."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from tttlab.adaptation.gate import Gate
from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.experiments.adapting import Rows, adapt_to_shifts
from tttlab.experiments.jobs import Experiment
from tttlab.experiments.rows import predictions
from tttlab.runtime.resuming import Work
from tttlab.shifts.shift import Shift
from tttlab.workflow.loading import (
    Ready,
    SourceNetwork,
    build_run,
    load_gate,
    load_network,
    load_tuned,
    open_stream,
)
from tttlab.workflow.pieces import Piece
from tttlab.workflow.processes import machine_of
from tttlab.workflow.shifted import open_test

if TYPE_CHECKING:
    from tttlab.workflow.processes import Processes


@dataclass(frozen=True)
class NetworkRun:
    """A run on one network.

    Attributes:
        params: all settings.
        piece: which run, and which network.
        images: the test images.
        shifts: under which they are seen.
        fabric: the processes that share the work.
        source: the source network.
        tuned: what tuning chose; see `tttlab.workflow.loading.load_tuned`.
        ready: the run with the chosen settings.
    """

    params: Params
    piece: Piece
    images: ImageSet
    shifts: Sequence[Shift]
    fabric: "Processes"
    source: SourceNetwork
    tuned: dict[str, Any]
    ready: Ready

    @property
    def settings(self) -> dict[str, Any]:
        """Give the settings that MLflow and the report show: those that have an effect."""
        settings, method = self.ready.settings, repr(self.ready.task.method)
        shown = {"run": self.piece.run, "method": method, "protocol": settings.protocol}
        return shown | settings.in_use | {"seed": self.params.seed}

    @property
    def tags(self) -> dict[str, Any]:
        """Give the tags by which MLflow finds this run."""
        return {
            "model": self.piece.model,
            "method": self.ready.settings.method,
            "run": self.piece.run,
            "training_seed": self.piece.seed,
            "protocol": self.ready.settings.protocol,
            "source_run_id": self.source.about.get("mlflow_run_id"),
        }

    def adapt(self, work: Work) -> tuple[pd.DataFrame, np.ndarray] | None:
        """Adapt to this process's share of all shifted images; the first process returns all."""
        gate = load_gate(self.tuned)
        result = self.over(self.shifts, self.images, self.ready, work, "adapt", gate=gate)
        if result is not None:
            result[0].insert(1, "seed", self.piece.seed)
        return result

    def over(
        self,
        shifts: Sequence[Shift],
        images: ImageSet,
        ready: Ready,
        work: Work,
        prefix: str,
        *,
        gate: Gate | None = None,
        record: Sequence[int] = (0,),
        rows: Rows = predictions,
    ) -> tuple[pd.DataFrame, np.ndarray] | None:
        """Adapt to any images under any shifts, with a progress bar.

        See `tttlab.experiments.adapting.adapt_to_shifts`.
        """
        stream = open_stream(self.params, ready.settings.protocol)
        total = sum(len(shift.of(images)) for shift in shifts) // self.fabric.world_size
        name = f"{self.piece.run} {self.piece.model}-{self.piece.seed}"
        hidden = not self.fabric.is_global_zero
        with tqdm(total=total, desc=name, unit="image", mininterval=1, disable=hidden) as bar:
            return adapt_to_shifts(
                Experiment(ready.task, images, stream, gate, record),
                shifts,
                work=work,
                prefix=prefix,
                machine=machine_of(self.params, self.fabric),
                on_images=bar.update,
                rows=rows,
            )


def open_runs(params: Params, pieces: Iterable[Piece], fabric: "Processes") -> list[NetworkRun]:
    """Load all runs before any work, so that every mistake shows first."""
    images, shifts = open_test(params)
    sources: dict[tuple[str, int], SourceNetwork] = {}
    runs = []
    for piece in pieces:
        network = piece.model, piece.seed
        if network not in sources:
            sources[network] = load_network(params, *network, fabric.device)
        source, tuned = sources[network], load_tuned(piece.run, piece.model)
        ready = build_run(params, piece.run, piece.model, source, tuned["settings"])
        runs.append(NetworkRun(params, piece, images, shifts, fabric, source, tuned, ready))
    return runs
