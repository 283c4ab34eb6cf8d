"""The frame of the two training stages: unfinished work, the run in MLflow, and the output."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd

from tttlab.config.params import Params
from tttlab.data.image_sets import ImageSet
from tttlab.networks import checkpoints
from tttlab.networks.network import Network
from tttlab.tracking.runs import Run, start_run
from tttlab.training.trainer import Row, Trainer
from tttlab.workflow import places
from tttlab.workflow.execution import parent_run
from tttlab.workflow.processes import open_fabric, shared_work


@contextmanager
def open_trainer(
    params: Params,
    model: str,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Sequence[Path],
    source_run: str | None,
) -> Iterator[tuple[Trainer, Run | None]]:
    """Open a training and, on its first process, its run in MLflow.

    After a kill both continue where they were.

    Args:
        params: all settings.
        model: the model's name.
        stage: ``pretrain`` or ``finetune``.
        settings: what the result depends on, structured as in params.yaml.
        inputs: folders and files that the training reads.
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
    fabric = open_fabric(params)

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
        shared_work(fabric, stage, settings, inputs) as work,
        open_run(work.id) if fabric.is_global_zero else nullcontext() as run,
    ):

        def report(task: str, row: Row) -> None:
            prefix = "" if task == stage else f"{task}/"
            values = {f"{prefix}{name}": row[name] for name in row if name != "epoch"}
            run.log_metrics(values, row["epoch"])

        yield Trainer(fabric, settings["seed"], params.machine.workers, work, report), run


def log_inputs(run: Run | None, **sets: tuple[ImageSet, str]) -> None:
    """Log the images that a run reads to MLflow, with their use: ``training`` or ``validation``."""
    if run is None:
        return
    for name, (images, context) in sets.items():
        run.log_input(name, images.source, images.digest(), len(images), context)


def write(
    folder: Path, network: Network, rows: Sequence[Row], run: Run, about: Mapping[str, Any]
) -> None:
    """Write the network and its learning curve, and log the curve and the description to MLflow.

    Args:
        folder: where to write.
        network: the trained network.
        rows: its learning curve.
        run: its run in MLflow.
        about: further arguments of `checkpoints.save`.
    """
    checkpoints.save(network, folder, **about)
    curve = pd.DataFrame(rows).drop(columns="seconds", errors="ignore")
    curve.to_csv(folder / "curve.csv", index=False)
    for name in ("curve.csv", "network.json"):
        run.log_artifact(folder / name)
