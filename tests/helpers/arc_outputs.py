"""Outputs of ARC's stages by hand: four small tasks and three runs, written without our writers."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

RED, BLUE = [[2, 2], [2, 0]], [[1, 1, 1]]
GREEN, YELLOW = [[3], [3], [0]], [[4, 0, 4], [0, 4, 0]]
ANSWERS = {"won1": [RED], "lost2": [BLUE], "never3": [GREEN, YELLOW], "both4": [YELLOW]}
WRONG, OTHER = [[5, 5]], [[7, 7], [7, 7]]
ALMOST_RED = [[2, 2], [2, 8]]

ALIGNED = "task,own,other\nwon1,0.4,0.1\nlost2,0.6,0.2\nnever3,0.2,0.1\nboth4,0.3,0.0\n"

# By run and steps: for each task the guesses of every question, most votes first, and one view.
GUESSES = {
    "none": {
        0: {
            "won1": [([(ALMOST_RED, 5), (WRONG, 3)], WRONG)],
            "lost2": [([(BLUE, 6), (WRONG, 1)], BLUE)],
            "never3": [([(GREEN, 4)], GREEN), ([(WRONG, 4), (OTHER, 3), (YELLOW, 1)], WRONG)],
            "both4": [([(WRONG, 4), (YELLOW, 3)], WRONG)],
        }
    },
    "all": {
        2: {
            "won1": [([(WRONG, 5), (OTHER, 3)], WRONG)],
            "lost2": [([(BLUE, 6), (WRONG, 1)], BLUE)],
            "never3": [([(GREEN, 4)], GREEN), ([], [])],
            "both4": [([(YELLOW, 8)], YELLOW)],
        },
        8: {
            "won1": [([(RED, 7), (ALMOST_RED, 1)], ALMOST_RED)],
            "lost2": [([(WRONG, 4), (OTHER, 2), (BLUE, 2)], BLUE)],
            "never3": [([(WRONG, 6), (GREEN, 2)], WRONG), ([(WRONG, 8)], WRONG)],
            "both4": [([(YELLOW, 8)], YELLOW)],
        },
    },
    "joint": {
        8: {
            "won1": [([(RED, 7)], RED)],
            "lost2": [([(BLUE, 7)], BLUE)],
            "never3": [([(GREEN, 6)], GREEN), ([(YELLOW, 8)], YELLOW)],
            "both4": [([(WRONG, 8)], WRONG)],
        },
    },
}
MILLISECONDS = {"none": {0: 100.0}, "all": {2: 1000.0, 8: 3000.0}, "joint": {8: 500.0}}


def write(outputs: Path) -> Path:
    """Write everything that evaluate and report read."""
    demonstration = {"input": [[6, 0, 6]], "output": [[9], [9]]}
    tasks = {
        name: {"train": [demonstration] * 2, "test": [{"input": [[n, 1], [1, n]]} for _ in grids]}
        for n, (name, grids) in enumerate(ANSWERS.items(), 2)
    }
    training = {"old": {"train": [demonstration], "test": [{"input": [[0]]}]}}
    invented = {f"invented-{number}": {"train": [demonstration], "test": []} for number in range(5)}
    files = {
        "evaluation": tasks,
        "answers": ANSWERS,
        "training": training,
        "invented": invented,
    }
    (outputs / "tasks").mkdir(parents=True)
    for name, content in files.items():
        (outputs / "tasks" / f"{name}.json").write_text(json.dumps(content))
    (outputs / "aligned.csv").write_text(ALIGNED, encoding="utf-8")
    for run in GUESSES:
        folder = outputs / "adapted" / run
        folder.mkdir(parents=True)
        votes_of(run).to_parquet(folder / "votes.parquet")
        costs_of(run).to_parquet(folder / "tasks.parquet")
        about = {"trainable": None if run == "none" else run, "lr": 0.001, "mlflow_run_id": "f00"}
        (folder / "about.json").write_text(json.dumps(about))
    return outputs


def votes_of(run: str) -> pd.DataFrame:
    rows = []
    for steps, tasks in GUESSES[run].items():
        for task, questions in tasks.items():
            for question, (guesses, single) in enumerate(questions):
                views = sum(votes for _, votes in guesses)
                placed = [(single, 0), *guesses]
                rows += [
                    _row(task, question, steps, place, views, *placed[place])
                    for place in range(len(placed))
                ]
    return pd.DataFrame(rows)


def _row(task, question, steps, place, views, grid, votes):
    return {
        "task": task,
        "question": question,
        "steps": steps,
        "place": place,
        "votes": votes,
        "views": views,
        "height": len(grid),
        "width": len(grid[0]) if grid else 0,
        "cells": np.array([cell for row in grid for cell in row], np.int8),
    }


def costs_of(run: str) -> pd.DataFrame:
    """Half of the tasks take half as long, half of them longer by half; one fell back in `all`."""
    factors = dict(zip(ANSWERS, (0.5, 0.5, 1.5, 1.5), strict=True))
    return pd.DataFrame(
        {
            "task": task,
            "steps": steps,
            "loss": float("nan"),
            "milliseconds": mean * factors[task],
            "fell_back": run == "all" and task == "never3",
        }
        for steps, mean in MILLISECONDS[run].items()
        for task in ANSWERS
    )
