"""The offline training as a stage: resumed after a kill, on one or several processes, in MLflow."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pandas as pd

from tttlab.arc import building
from tttlab.arc.offline import PairTrainer, train, training_pairs
from tttlab.arc.results import read_tasks
from tttlab.arc.settings import Settings
from tttlab.tracking.runs import Run, start_run
from tttlab.training.optimisers import Recipe
from tttlab.training.trainer import Row
from tttlab.workflow import places
from tttlab.workflow.execution import parent_run
from tttlab.workflow.processes import open_fabric, open_shared


def train_offline(settings: Settings, key: str) -> list[Path]:
    """Train the network on the training tasks and the invented ones.

    Returns:
        the files that the first process writes; none on the others.
    """
    tasks, invented = (read_tasks(places.OUTPUTS, part) for part in ("training", "invented"))
    pairs = training_pairs(settings, tasks, invented)
    network = building.build(settings, pairs.count)
    # A small network keeps one thread busy; a second one would hardly shorten a step.
    fabric = open_fabric(settings, on_cpu=max(settings.machine.workers, 1))

    def open_run(key: str) -> AbstractContextManager[Run]:
        sections = {"seed", "invented", "auxiliary", "network", "train"}
        return start_run(
            places.ROOT,
            stage="arc train",
            name=f"arc train · {len(tasks)} tasks, {len(invented)} invented",
            params=settings.model_dump(mode="json", include=sections),
            parent=parent_run(settings),
            resume_key=key,
        )

    with (
        open_shared(fabric, "arc train", key) as work,
        open_run(work.id) if fabric.is_global_zero else nullcontext() as tracked,
    ):

        def report(_name: str, row: Row) -> None:
            values = {name: row[name] for name in row if name != "epoch"}
            tracked.log_metrics(values, row["epoch"])

        trainer = PairTrainer(
            fabric, settings.seed, work=work, report=report, title="arc", canvas=network.canvas
        )
        rows = train(trainer, network, pairs, Recipe(**settings.train.model_dump()), "offline")
        if tracked is None:
            return []  # only the first process writes
        target = places.OUTPUTS / "trained"
        about = {
            "mlflow_run_id": tracked.id,
            "pairs": len(pairs),
            "tasks": len(tasks),
            "invented": len(invented),
            "parameters": parameters(network),
        }
        building.save(network, target, about)
        curve = pd.DataFrame(rows).drop(columns="seconds", errors="ignore")
        curve.to_csv(target / "curve.csv", index=False)
    print(f"offline: {describe(rows[-1])}")
    return [target / name for name in (building.WEIGHTS, building.ABOUT, "curve.csv")]


def parameters(network: building.CanvasTransformer) -> int:
    """Count the parameters without the tokens of auxiliary tasks."""
    return sum(
        value.numel() for name, value in network.named_parameters() if name != "auxiliary.weight"
    )


def describe(row: Row) -> str:
    """Say in words how a training ended."""
    if "loss" not in row:
        return "no epochs"
    return f"loss {row['loss']:.3f}, {row['exact']:.1%} of the pairs right to the last pixel"
