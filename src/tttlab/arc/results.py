"""What the stages before have left in the folder of outputs, read back."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tttlab.arc.tasks import Answers, ArcTask, Pair
from tttlab.arc.votes import GridKey
from tttlab.errors import UserError


def read_json(path: Path, stage: str) -> Any:
    """Read what a stage wrote as JSON.

    Raises:
        UserError: it is not there.
    """
    _expect(path, stage)
    return json.loads(path.read_text(encoding="utf-8"))


def read_tasks(outputs: Path, part: str = "evaluation") -> tuple[ArcTask, ...]:
    """Read the tasks of a part, without the questions' outputs."""
    return tuple(
        ArcTask(
            name,
            tuple(Pair(_grid(pair["input"]), _grid(pair["output"])) for pair in task["train"]),
            tuple(_grid(pair["input"]) for pair in task["test"]),
        )
        for name, task in read_json(outputs / "tasks" / f"{part}.json", "prepare").items()
    )


def read_answers(outputs: Path) -> Answers:
    """Read the outputs of the evaluation tasks' questions."""
    path = outputs / "tasks" / "answers.json"
    return {task: tuple(map(_grid, grids)) for task, grids in read_json(path, "prepare").items()}


def read_votes(outputs: Path, run: str) -> pd.DataFrame:
    """Read a run's ``votes.parquet``; a column ``key`` of `GridKey` is in the cells' place."""
    votes = _read_parquet(outputs / "adapted" / run / "votes.parquet")
    grids = zip(votes["height"], votes["width"], votes.pop("cells"), strict=True)
    votes["key"] = [GridKey(int(h), int(w), np.asarray(c, np.int8).tobytes()) for h, w, c in grids]
    return votes


def read_costs(outputs: Path, run: str) -> pd.DataFrame:
    """Read a run's ``tasks.parquet``: loss, milliseconds and fell_back by task and steps."""
    return _read_parquet(outputs / "adapted" / run / "tasks.parquet")


def read_about(outputs: Path, runs: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Read the runs' settings as they are shown to people."""
    return {run: read_json(outputs / "adapted" / run / "about.json", "adapt") for run in runs}


def read_alignment(outputs: Path) -> pd.DataFrame:
    """Read ``aligned.csv``: a row per task, with the cosines ``own`` and ``other``."""
    path = outputs / "aligned.csv"
    _expect(path, "align")
    return pd.read_csv(path, dtype={"task": str})


def read_table(outputs: Path, name: str) -> pd.DataFrame:
    """Read a table of `evaluate`, ``outputs/tables/<name>.csv``; names are text."""
    path = outputs / "tables" / f"{name}.csv"
    _expect(path, "evaluate")
    names = dict.fromkeys(("run", "task", "with", "without", "measure"), str)
    return pd.read_csv(path, dtype=names, keep_default_na=False, na_values=[""])


def _read_parquet(path: Path) -> pd.DataFrame:
    _expect(path, "adapt")
    return pd.read_parquet(path)


def _expect(path: Path, stage: str) -> None:
    if not path.is_file():
        raise UserError(
            f"{path}: expected what the stage `{stage}` writes, found no file; run `make arc`"
        )


def _grid(cells: Sequence[Sequence[int]]) -> np.ndarray:
    return np.asarray(cells, np.int8)
