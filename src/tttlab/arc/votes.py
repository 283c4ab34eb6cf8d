"""The views' predictions of a task, turned back and counted: the views vote for whole grids."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tttlab.arc.auxiliary import Auxiliary
from tttlab.arc.tasks import unpadded

KEPT = 10  # grids of a question that are written
SINGLE = 0  # the place of the single view's grid, whatever its votes


class GridKey(NamedTuple):
    """A grid as a value that can be compared and counted: its size, and its cells row by row."""

    height: int
    width: int
    cells: bytes

    @classmethod
    def of(cls, grid: np.ndarray) -> "GridKey":
        """Make the key of a grid ``(H, W)`` of colours."""
        return cls(*grid.shape, np.ascontiguousarray(grid, np.int8).tobytes())

    @property
    def grid(self) -> np.ndarray:
        """The grid ``(H, W)``, int8."""
        return np.frombuffer(self.cells, np.int8).reshape(self.height, self.width)


def count_votes(
    predictions: np.ndarray, auxiliaries: Sequence[Auxiliary]
) -> tuple[GridKey, dict[GridKey, int]]:
    """Turn one question's predictions back and count equal grids.

    An empty grid, which has no row or no column, does not vote.

    Args:
        predictions: ``(A, placements, G, G)`` colours, `EMPTY` outside the grid.
        auxiliaries: A auxiliary tasks; the first is the task itself.

    Returns:
        the grid of the single view (the task itself, first placement; may be empty), and the votes
        by grid: most votes first, ties by the order of first appearance.
    """
    counts: dict[GridKey, int] = {}
    for auxiliary, placements in zip(auxiliaries, predictions, strict=True):
        for padded in placements:
            grid = unpadded(padded)
            if grid.size:
                key = GridKey.of(auxiliary.invert(grid))
                counts[key] = counts.get(key, 0) + 1
    single = unpadded(predictions[0, 0])
    ordered = sorted(counts.items(), key=lambda item: -item[1])  # stable
    return GridKey.of(auxiliaries[0].invert(single)), dict(ordered)


def vote_rows(
    task: str, steps: int, predictions: np.ndarray, auxiliaries: Sequence[Auxiliary]
) -> list[dict[str, Any]]:
    """Make a task's rows of ``votes.parquet`` for one number of steps.

    Args:
        task: its name.
        steps: of test-time training, after which was predicted.
        predictions: ``(questions, A, placements, G, G)`` integers, `EMPTY` outside the grid; only
            the questions that the task has.
        auxiliaries: A auxiliary tasks; the first is the task itself.

    Returns:
        for every question a row of the single view's grid (place 0), then of the `KEPT` grids with
        most votes (place 1, 2…).
    """
    rows = []
    for question, of_question in enumerate(predictions):
        single, counts = count_votes(of_question, auxiliaries)
        views = sum(counts.values())
        placed = [(single, counts.get(single, 0)), *list(counts.items())[:KEPT]]
        rows += [
            {
                "task": task,
                "question": question,
                "steps": steps,
                "place": place,
                "votes": votes,
                "views": views,
                "height": key.height,
                "width": key.width,
                "cells": key.grid.ravel(),
            }
            for place, (key, votes) in enumerate(placed, start=SINGLE)
        ]
    return rows


def write_votes(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write rows of `vote_rows` as ``votes.parquet``."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"task": pa.string(), "cells": pa.list_(pa.int8())}
    names = ("task", "question", "steps", "place", "votes", "views", "height", "width", "cells")
    schema = pa.schema([(name, kinds.get(name, pa.int32())) for name in names])
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)
