"""The frame of the two training stages: unfinished work, the run in MLflow, and the output."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.networks import checkpoints
from tttlab.networks.network import Network
from tttlab.runtime.parallel import as_ready
from tttlab.tracking.runs import Run, start_run
from tttlab.training.trainer import Row, Trainer
from tttlab.workflow import pieces, places
from tttlab.workflow.execution import parent_run
from tttlab.workflow.ledger import Ledger
from tttlab.workflow.processes import fits_one_process, open_fabric, open_shared

if TYPE_CHECKING:
    from tttlab.runtime.ranks import Processes


@dataclass(frozen=True)
class Place:
    """Where one training of a stage runs, and where it writes.

    Attributes:
        folder: of the stage's results.
        key: hash of everything that the training depends on.
        fabric: the processes that train together.
        workers: processes that augment.
        line: of its progress bar on the screen, from 0.
    """

    folder: Path
    key: str
    fabric: "Processes"
    workers: int
    line: int = 0


def train_networks(
    params: Params,
    keys: Mapping[pieces.Network, str],
    ledger: Ledger,
    train: Callable[[Params, pieces.Network, Place], list[Path]],
) -> None:
    """Train networks, each with its key.

    On a CPU several are trained side by side, each in a process of its own with its part of the
    threads: small networks gain little from more threads. Elsewhere all processes of the stage
    train one network after another.

    Args:
        params: all settings.
        keys: network → hash of everything that its training depends on.
        ledger: of the stage.
        train: trains one network; returns the files that the first process writes.
    """
    networks = list(keys)
    together = min(params.machine.workers, len(networks)) if fits_one_process(params) else 1
    if together < 2:
        fabric = open_fabric(params)
        for network in networks:
            place = Place(ledger.folder, keys[network], fabric, params.machine.workers)
            files = train(params, network, place)
            if fabric.is_global_zero:
                ledger.enter(str(network), keys[network], files)
        return
    threads = max(1, torch.get_num_threads() // together)
    # The trainings themselves take this many of the workers.
    workers = params.machine.workers - together

    def train_alone(network: pieces.Network) -> list[Path]:
        torch.set_num_threads(threads)
        line = networks.index(network)
        place = Place(ledger.folder, keys[network], open_fabric(params), workers // together, line)
        return train(params, network, place)

    # A slow training keeps no finished one waiting, which would be lost with it.
    for network, files in as_ready(train_alone, networks, together):
        ledger.enter(str(network), keys[network], files)


@contextmanager
def open_trainer(
    params: Params,
    model: str,
    stage: str,
    settings: Mapping[str, Any],
    place: Place,
    source_run: str | None,
) -> Iterator[tuple[Trainer, Run | None]]:
    """Open a training and, on its first process, its run in MLflow.

    After a kill both continue where they were.

    Args:
        params: all settings.
        model: the model's name.
        stage: ``pretrain`` or ``finetune``.
        settings: of the training, structured as in params.yaml, for MLflow.
        place: where it runs.
        source_run: the run in MLflow that made the initial network.
    """
    recipe = settings["models"][model][stage]
    objective = settings["models"][model]["objective"]["name"]
    seed = f"seed {settings['seed']}" if len(params.seeds) > 1 else None
    parts = [recipe.get("mode"), objective, f"{recipe['epochs']} epochs", seed]
    title = " · ".join(str(part) for part in parts if part)
    tags = {
        "model": model,
        "objective": objective,
        "seed": settings["seed"],
        "source_run_id": source_run or "",
    }
    fabric = place.fabric

    def open_run(key: str):
        return start_run(
            places.ROOT,
            stage=stage,
            name=f"{stage} {model} · {title}",
            params=settings,
            tags=tags,
            parent=parent_run(params),
            resume_key=key,
        )

    with (
        open_shared(fabric, f"{stage} {model}", place.key) as work,
        open_run(work.id) if fabric.is_global_zero else nullcontext() as run,
    ):

        def report(task: str, row: Row) -> None:
            prefix = "" if task == stage else f"{task}/"
            values = {f"{prefix}{name}": row[name] for name in row if name != "epoch"}
            run.log_metrics(values, row["epoch"])

        name = f"{model}-{settings['seed']}" if len(params.seeds) > 1 else model
        yield Trainer(fabric, settings["seed"], place.workers, work, report, name, place.line), run


def log_inputs(run: Run | None, **sets: tuple[ImageSet, str]) -> None:
    """Log the images that a run reads to MLflow, with their use: ``training`` or ``validation``."""
    if run is None:
        return
    for name, (images, context) in sets.items():
        run.log_input(name, images.source, images.digest(), len(images), context)


def write(
    folder: Path, network: Network, rows: Sequence[Row], run: Run, about: Mapping[str, Any]
) -> list[Path]:
    """Write the network and its learning curve, and log the curve and the description to MLflow.

    Args:
        folder: where to write.
        network: the trained network.
        rows: its learning curve.
        run: its run in MLflow.
        about: further arguments of `checkpoints.save`.

    Returns:
        the files written.
    """
    # DVC may have linked the files of an earlier training to its cache.
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints.save(network, folder, **about)
    curve = pd.DataFrame(rows).drop(columns="seconds", errors="ignore")
    curve.to_csv(folder / "curve.csv", index=False)
    for name in ("curve.csv", "network.json"):
        run.log_artifact(folder / name)
    return sorted(folder.iterdir())
