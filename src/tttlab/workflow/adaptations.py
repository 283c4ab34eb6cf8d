"""Adapting trained networks as the runs of params.yaml say, each with its own run in MLflow."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tttlab.config.params import Params
from tttlab.evaluation.predictions import add_correctness
from tttlab.experiments.adapting import Result, adapting
from tttlab.runtime import devices
from tttlab.runtime.resuming import Work
from tttlab.tracking.comparison import log_predictions
from tttlab.tracking.runs import start_run
from tttlab.workflow import places
from tttlab.workflow.curves import Curve, list_curves
from tttlab.workflow.execution import parent_run
from tttlab.workflow.ledger import Ledger, written_whole
from tttlab.workflow.network_runs import NetworkRun, open_runs
from tttlab.workflow.pieces import Piece
from tttlab.workflow.processes import machine_of, open_shared

if TYPE_CHECKING:
    import pandas as pd

    from tttlab.workflow.processes import Processes


@dataclass(frozen=True)
class Plan:
    """One piece: its run, where its unfinished work is kept, and its curves along the steps."""

    run: NetworkRun
    work: Work
    curves: Sequence[Curve]


Finish = Callable[[Callable[[int], object]], Result | None]  # see `adapting`


def adapt_pieces(
    params: Params, keys: Mapping[Piece, str], fabric: "Processes", ledger: Ledger
) -> None:
    """Compute pieces, each with its key: a table of predictions and a description as JSON.

    One piece is written and logged while the next one is computed.
    """
    runs = open_runs(params, keys, fabric)
    with ExitStack() as stack:
        plans, ends = [], []
        for run in runs:
            # What it closes is closed when the piece is done, or when another one fails.
            ends.append(stack.enter_context(ExitStack()))
            work = open_shared(fabric, f"adapt {run.piece}", keys[run.piece])
            work = ends[-1].enter_context(work)
            has_curve = run.piece.seed == params.seeds[0]
            plans.append(Plan(run, work, list_curves(run, work) if has_curve else []))
        sweeps = [
            sweep
            for plan in plans
            for sweep in (plan.run.sweep(plan.work), *(curve.sweep for curve in plan.curves))
        ]
        with adapting(sweeps, machine_of(params, fabric)) as finish:
            for plan, end in zip(plans, ends, strict=True):
                files = adapt_network(plan, finish, ledger.folder)
                end.close()
                if fabric.is_global_zero:
                    ledger.enter(str(plan.run.piece), keys[plan.run.piece], files)


def adapt_network(plan: Plan, finish: Finish, outputs: Path) -> list[Path]:
    """Wait for one piece, with its own run in MLflow.

    Returns:
        the files that the first process writes; none on the others.
    """
    run = plan.run
    if not run.fabric.is_global_zero:
        for _ in (plan, *plan.curves):
            finish(lambda _count: None)
        return []
    folder, seed = outputs / run.piece.run / run.piece.model, run.piece.seed
    several = f" · seed {seed}" if len(run.params.seeds) > 1 else ""
    with start_run(
        places.ROOT,
        stage="adapt",
        name=f"adapt {run.piece.run} · {run.piece.model}{several}",
        params=run.settings,
        tags=run.tags,
        parent=parent_run(run.params),
        resume_key=plan.work.id,
    ) as tracked:
        images = run.images
        tracked.log_input("test", images.source, images.digest(), len(images), "test")
        devices.forget_peak(run.source.device)
        with run.open_bar(run.sweep(plan.work)) as bar:
            result = finish(bar.update)
        table = result.table
        table.insert(1, "seed", seed)
        log_predictions(tracked, add_correctness(table))
        memory = devices.peak_memory(run.source.device)
        mean_losses = result.losses.tolist() if len(result.losses) > 1 else []
        tracked.log_series("loss/mean", mean_losses)
        tracked.log_metrics({"cost/peak_memory_mb": memory})
        table_file = write_table(table, folder / f"{seed}.parquet")
        tracked.log_artifact(table_file)
    about = {
        "mlflow_run_id": tracked.id,
        "losses": mean_losses,
        "settings": run.settings,
        "normalises": run.ready.task.method.normalises,
        "measures": run.measures,
        "averages": run.ready.task.method.averaged_views() > 0,
        "tuning": run.tuned,
        "peak_memory_mb": memory,
    }
    about_file = folder / f"{seed}.json"
    with written_whole(about_file) as partial:
        partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    if not plan.curves:
        return [table_file, about_file]
    import pandas as pd

    steps = []
    for curve in plan.curves:
        with run.open_bar(curve.sweep, curve.setting) as bar:
            steps.append(curve.table(finish(bar.update)))
    steps_file = write_table(pd.concat(steps, ignore_index=True), folder / f"{seed}.steps.parquet")
    return [table_file, about_file, steps_file]


def write_table(table: "pd.DataFrame", file: Path) -> Path:
    """Write a table whole, or not at all."""
    with written_whole(file) as partial:
        table.to_parquet(partial, index=False)
    return file
