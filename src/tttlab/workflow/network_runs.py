"""One run on one trained network over the shifted test images, by all processes of the stage."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.experiments.adapting import Sweep
from tttlab.experiments.jobs import Experiment
from tttlab.runtime.progress import open_bar
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

    @property
    def measures(self) -> bool:
        """Tell whether the method has statistics of its own, measured on source images."""
        return self.ready.task.statistics.keys() != self.source.statistics.keys()

    def sweep(self, work: Work) -> Sweep:
        """Describe the adaptation to all shifted images."""
        gate, images = load_gate(self.tuned), self.images
        stream = open_stream(self.params, self.ready.settings.protocol)
        return Sweep(Experiment(self.ready.task, images, stream, gate), self.shifts, work, "adapt")

    def open_bar(self, sweep: Sweep, setting: str = "") -> tqdm:
        """Open a progress bar over this process's share of a sweep."""
        total = sum(len(shift.of(sweep.experiment.images)) for shift in sweep.shifts)
        name = f"{self.piece.run} {self.piece.model}-{self.piece.seed} {setting}".rstrip()
        total //= self.fabric.world_size
        return open_bar(f"adapt {name}", total, "image", hidden=not self.fabric.is_global_zero)


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
