import json

import pandas as pd
import pytest
from scipy import stats

from tests.helpers import arc_outputs
from tttlab.arc_results.evaluating import evaluate, pairs
from tttlab.errors import UserError

RUNS = ("none", "all", "joint")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return arc_outputs.write(tmp_path_factory.mktemp("arc") / "outputs")


@pytest.fixture(scope="module")
def metrics(outputs):
    return evaluate(outputs, RUNS)


def test_the_promised_entries_of_every_run(metrics):
    low, high = stats.binomtest(2, 4).proportion_ci()
    promised = {
        "tasks": 4,
        "solved": 2,
        "pass1": 0.5,
        "pass2": 0.5,
        "pass1_low": low,
        "pass1_high": high,
        "pass1_one_view": 0.5,
        "seconds_per_task": 3.0,
    }
    assert list(metrics["runs"]) == list(RUNS)
    found = {name: metrics["runs"]["all"][name] for name in promised}
    assert found == pytest.approx(promised)
    assert metrics["runs"]["none"]["pass1"] == 0.25
    assert metrics["runs"]["none"]["pass2"] == 0.5
    assert metrics["runs"]["joint"]["solved"] == 3
    assert (metrics["runs"]["all"]["steps"], metrics["runs"]["all"]["fell_back"]) == (8, 1)


def test_the_file_says_what_is_returned(outputs, metrics):
    assert json.loads((outputs / "metrics.json").read_text()) == metrics


def test_every_run_against_the_control_and_all_against_every_other():
    assert pairs(["none", "token", "all", "joint"]) == [
        ("token", "none"),
        ("all", "none"),
        ("joint", "none"),
        ("all", "token"),
        ("all", "joint"),
    ]
    assert pairs(["joint", "scratch"]) == []


def test_won_and_lost_tasks_by_hand(metrics):
    gained = metrics["comparisons"]["all"]["none"]
    assert (gained["pass2"]["won"], gained["pass2"]["lost"]) == (1, 1)
    assert (gained["pass1"]["won"], gained["pass1"]["lost"]) == (2, 1)
    assert gained["pass1"]["gain"] == pytest.approx(0.25)
    assert gained["pass1"]["p"] == 1
    beside = metrics["comparisons"]["all"]["joint"]["pass2"]
    assert (beside["won"], beside["lost"], beside["p"]) == (1, 2, 1)
    voting = metrics["votes_over_one_view"]
    assert (voting["all"]["won"], voting["all"]["lost"]) == (1, 1)
    assert (voting["joint"]["won"], voting["joint"]["lost"]) == (0, 0)


def test_the_tables(outputs, metrics):
    scores = pd.read_csv(outputs / "tables" / "scores.csv")
    assert list(scores.columns) == ["run", "steps", "task", "pass1", "pass2", "one_view"]
    assert scores.groupby(["run", "steps"])["pass2"].sum().to_dict() == {
        ("all", 2): 2,
        ("all", 8): 2,
        ("joint", 8): 3,
        ("none", 0): 2,
    }
    curve = pd.read_csv(outputs / "tables" / "curve.csv")
    assert curve[["run", "steps"]].to_numpy().tolist() == [
        ["none", 0],
        ["all", 2],
        ["all", 8],
        ["joint", 8],
    ]
    comparisons = pd.read_csv(outputs / "tables" / "comparisons.csv")
    assert len(comparisons) == 2 * len(pairs(RUNS))
    assert list(comparisons.columns[:3]) == ["with", "without", "measure"]


def test_a_run_that_is_missing_is_told(outputs):
    with pytest.raises(UserError, match=r"token/votes\.parquet: .*run `make arc`"):
        evaluate(outputs, ["none", "token"])
    assert (outputs / "metrics.json").is_file()  # nothing was begun
