"""Which tasks a run solves, and how sure it is that one run solves more than another.

A task counts only if all its questions are right. Chance lies in which tasks were asked; the
network is one, so an interval does not cover another offline training.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import betaincinv  # importing scipy.stats would take half a second

from tttlab.arc.tasks import Answers
from tttlab.arc.votes import SINGLE, GridKey
from tttlab.errors import UserError
from tttlab.evaluation.intervals import CONFIDENCE, gain_interval
from tttlab.evaluation.significance import mcnemar

# The places in votes.parquet one of whose grids must be right.
PLACES = {"pass1": (1,), "pass2": (1, 2), "one_view": (SINGLE,)}
MEASURES = tuple(PLACES)


def score(votes: pd.DataFrame, answers: Answers) -> pd.DataFrame:
    """Score a run.

    Args:
        votes: of one run, from `results.read_votes`.
        answers: of all tasks that were asked.

    Returns:
        steps, task, and for every measure of `MEASURES` whether all the task's questions are right;
        ordered by steps, then as the answers are.

    Raises:
        UserError: the votes are not for exactly these questions, at every number of steps.
    """
    right = {
        (task, number): GridKey.of(grid)
        for task, grids in answers.items()
        for number, grid in enumerate(grids)
    }
    _check_questions(votes, right)
    rows = zip(votes["task"], votes["question"], votes["key"], strict=True)
    is_right = pd.Series([right[task, question] == key for task, question, key in rows])
    marked = votes[["steps", "task", "question"]].reset_index(drop=True)
    places = votes["place"].reset_index(drop=True)
    for measure, counted in PLACES.items():
        marked[measure] = is_right & places.isin(counted)
    questions = marked.groupby(["steps", "task", "question"])[list(MEASURES)].any()
    tasks = questions.groupby(["steps", "task"]).all().reset_index()
    order = {task: number for number, task in enumerate(answers)}
    return tasks.sort_values(
        ["steps", "task"], key=lambda column: column.map(order) if column.name == "task" else column
    ).reset_index(drop=True)


def _check_questions(votes: pd.DataFrame, right: Mapping[tuple[str, int], GridKey]) -> None:
    expected, found = set(right), 0
    for steps, part in votes.groupby("steps"):
        found += 1
        asked = set(zip(part["task"], part["question"], strict=True))
        if asked != expected:
            one = min(asked ^ expected)
            raise UserError(
                f"votes after {steps} steps: expected {len(expected)} questions, as "
                f"tasks/answers.json has them, found {len(asked)} (first difference: "
                f"task {one[0]}, question {one[1]}); run `make arc`"
            )
    if not found:
        raise UserError(f"expected votes on {len(expected)} questions, found none; run `make arc`")


def proportion_interval(
    successes: int, trials: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Find the exact interval of a proportion: it covers at least as often as it says.

    Reference:
        Clopper and Pearson, Biometrika 26 (1934).
    """
    tail, failures = (1 - confidence) / 2, trials - successes
    low = betaincinv(successes, failures + 1, tail) if successes else 0.0
    high = betaincinv(successes + 1, failures, 1 - tail) if failures else 1.0
    return float(low), float(high)


def curve(scores: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Summarise a run by steps.

    Args:
        scores: from `score`.
        costs: from `results.read_costs`.

    Returns:
        a row per number of steps: steps, tasks, solved (counts), for every measure its share with
        ``<measure>_low`` and ``_high``, seconds_per_task (mean; NaN where unknown) and fell_back
        (count).
    """
    rows = []
    for steps, part in scores.groupby("steps"):
        row = {"steps": int(steps), "tasks": len(part), "solved": int(part["pass2"].sum())}
        for measure in MEASURES:
            row[measure] = float(part[measure].mean())
            ends = proportion_interval(int(part[measure].sum()), len(part))
            row[f"{measure}_low"], row[f"{measure}_high"] = ends
        spent = costs[costs["steps"] == steps]
        row["seconds_per_task"] = float(spent["milliseconds"].mean() / 1000)
        row["fell_back"] = int(spent["fell_back"].sum())
        rows.append(row)
    return pd.DataFrame(rows)


def compare(after: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """Compare two answers to the same T tasks.

    Args:
        after: ``(T,)`` bool, whether each task is right.
        before: the same tasks, in the same order.

    Returns:
        gain (difference of shares), gain_low and gain_high (95 %, paired, over tasks; NaN for fewer
        than two), won and lost (counts of tasks), p (exact McNemar test).

    Reference:
        Bonett and Price, J. Educ. Behav. Stat. 37 (2012); see `evaluation.intervals`.
    """
    after, before = np.asarray(after, bool), np.asarray(before, bool)
    differences = after.astype(int) - before
    tasks, one = np.arange(len(differences)), np.zeros(len(differences), int)
    low, high = gain_interval(differences, tasks, one, one, num_groups=1)[0]
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return {
        "gain": float(differences.mean()),
        "gain_low": float(low),
        "gain_high": float(high),
        "won": won,
        "lost": lost,
        "p": float(mcnemar(np.array([won]), np.array([lost]))),
    }


def last(scores: pd.DataFrame) -> pd.DataFrame:
    """Take the rows of the last recorded number of steps: the run's prediction."""
    return scores[scores["steps"] == scores["steps"].max()].reset_index(drop=True)
