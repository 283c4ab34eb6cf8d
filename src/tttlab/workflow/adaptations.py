"""Adapting trained networks as the runs of params.yaml say, each with its own run in MLflow."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tttlab.config.params import Params
from tttlab.evaluation.predictions import add_correctness
from tttlab.runtime import devices
from tttlab.runtime.resuming import Work
from tttlab.tracking.comparison import log_predictions
from tttlab.tracking.runs import start_run
from tttlab.workflow import places
from tttlab.workflow.curves import adapt_along_steps
from tttlab.workflow.execution import parent_run
from tttlab.workflow.ledger import Ledger, written_whole
from tttlab.workflow.network_runs import NetworkRun, open_runs
from tttlab.workflow.pieces import Piece
from tttlab.workflow.processes import open_shared

if TYPE_CHECKING:
    from tttlab.workflow.processes import Processes


def adapt_pieces(
    params: Params, keys: Mapping[Piece, str], fabric: "Processes", ledger: Ledger
) -> None:
    """Compute pieces, each with its key: a table of predictions and a description as JSON."""
    for run in open_runs(params, keys, fabric):
        with open_shared(fabric, f"adapt {run.piece}", keys[run.piece]) as work:
            files = adapt_network(params, run, work, ledger.folder)
        if fabric.is_global_zero:
            ledger.enter(str(run.piece), keys[run.piece], files)


def adapt_network(params: Params, run: NetworkRun, work: Work, outputs: Path) -> list[Path]:
    """Adapt one network, with its own run in MLflow.

    Returns:
        the files that the first process writes; none on the others.
    """
    has_curve = run.piece.seed == params.seeds[0]
    if not run.fabric.is_global_zero:
        run.adapt(work)
        if has_curve:
            adapt_along_steps(run, work)
        return []
    folder = outputs / run.piece.run / run.piece.model
    table_file = folder / f"{run.piece.seed}.parquet"
    about_file = folder / f"{run.piece.seed}.json"
    steps_file = folder / f"{run.piece.seed}.steps.parquet"
    seed = f" · seed {run.piece.seed}" if len(params.seeds) > 1 else ""
    with start_run(
        places.ROOT,
        stage="adapt",
        name=f"adapt {run.piece.run} · {run.piece.model}{seed}",
        params=run.settings,
        tags=run.tags,
        parent=parent_run(params),
        resume_key=work.id,
    ) as tracked:
        images = run.images
        tracked.log_input("test", images.source, images.digest(), len(images), "test")
        devices.forget_peak(run.source.device)
        table, losses = run.adapt(work)
        log_predictions(tracked, add_correctness(table))
        memory = devices.peak_memory(run.source.device)
        mean_losses = losses.tolist() if len(losses) > 1 else []
        tracked.log_series("loss/mean", mean_losses)
        tracked.log_metrics({"cost/peak_memory_mb": memory})
        with written_whole(table_file) as partial:
            table.to_parquet(partial, index=False)
        tracked.log_artifact(table_file)
    about = {
        "mlflow_run_id": tracked.id,
        "losses": mean_losses,
        "settings": run.settings,
        "tuning": run.tuned,
        "peak_memory_mb": memory,
    }
    with written_whole(about_file) as partial:
        partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    steps = adapt_along_steps(run, work) if has_curve else None
    if steps is None:
        return [table_file, about_file]
    with written_whole(steps_file) as partial:
        steps.to_parquet(partial, index=False)
    return [table_file, about_file, steps_file]
