import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as by_statsmodels

from tests.helpers import arc_outputs
from tttlab.arc.results import read_answers, read_votes
from tttlab.arc_results.scores import compare, curve, last, proportion_interval, score
from tttlab.errors import UserError


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return arc_outputs.write(tmp_path_factory.mktemp("arc") / "outputs")


def scored(outputs, run):
    return score(read_votes(outputs, run), read_answers(outputs))


class TestScore:
    def test_a_task_counts_if_all_its_questions_are_right(self, outputs):
        table = scored(outputs, "none")
        assert list(table.columns) == ["steps", "task", "pass1", "pass2", "one_view"]
        assert table.drop(columns="steps").to_numpy().tolist() == [
            ["won1", False, False, False],
            ["lost2", True, True, True],
            ["never3", False, False, False],  # the second question's answer comes third
            ["both4", False, True, False],  # second by votes
        ]

    def test_by_steps_with_one_view_apart_from_the_votes(self, outputs):
        table = scored(outputs, "all")
        assert table["steps"].tolist() == [2] * 4 + [8] * 4
        assert table["pass1"].tolist() == [False, True, False, True, True, False, False, True]
        assert table["pass2"].tolist() == [False, True, False, True, True, False, False, True]
        assert table["one_view"].tolist() == [False, True, False, True, False, True, False, True]

    def test_both_questions_right(self, outputs):
        assert scored(outputs, "joint")["pass1"].tolist() == [True, True, True, False]

    def test_the_last_recorded_steps_are_the_prediction(self, outputs):
        assert last(scored(outputs, "all"))["pass2"].tolist() == [True, False, False, True]

    def test_a_question_without_votes_is_told(self, outputs):
        votes, answers = read_votes(outputs, "all"), read_answers(outputs)
        late = (votes["steps"] == 8) & (votes["task"] == "never3") & (votes["question"] == 1)
        with pytest.raises(UserError, match=r"after 8 steps: expected 5 .* found 4 .*never3.* 1\)"):
            score(votes[~late], answers)
        with pytest.raises(UserError, match="found none"):
            score(votes[:0], answers)
        answers.pop("both4")
        with pytest.raises(UserError, match=r"expected 4 questions, .* found 5"):
            score(votes, answers)


class TestProportions:
    @pytest.mark.parametrize("trials", [1, 7, 77])
    def test_clopper_and_pearson_as_scipy_has_them(self, trials):
        for successes in range(trials + 1):
            known = stats.binomtest(successes, trials).proportion_ci(method="exact")
            assert proportion_interval(successes, trials) == pytest.approx(known, abs=1e-12)

    def test_where_nothing_was_right_the_end_is_a_closed_form(self):
        low, high = proportion_interval(0, 77)
        assert low == 0
        assert high == pytest.approx(1 - 0.025 ** (1 / 77), rel=1e-12)


class TestCompare:
    # Of 20 tasks both solve 4 and neither 10; 5 are won and 1 is lost.
    AFTER = np.repeat([True, True, False, False], [4, 5, 1, 10])
    BEFORE = np.repeat([True, False, True, False], [4, 5, 1, 10])

    def test_five_won_and_one_lost(self):
        outcome = compare(self.AFTER, self.BEFORE)
        assert (outcome["won"], outcome["lost"]) == (5, 1)
        assert outcome["gain"] == pytest.approx(4 / 20)
        assert outcome["p"] == pytest.approx(2 * (1 + 6) / 2**6)  # at most one of six lost, twice
        known = by_statsmodels([[4, 5], [1, 10]], exact=True).pvalue
        assert outcome["p"] == pytest.approx(known, rel=1e-12)

    def test_the_interval_of_bonett_and_price_with_the_quantile_of_t(self):
        outcome = compare(self.AFTER, self.BEFORE)
        won, lost, tasks = (5 + 1) / 22, (1 + 1) / 22, 20
        half = stats.t.ppf(0.975, tasks - 1) * math.sqrt((won + lost - (won - lost) ** 2) / 22)
        ends = (outcome["gain_low"], outcome["gain_high"])
        assert ends == pytest.approx((won - lost - half, won - lost + half), rel=1e-9)

    def test_changing_sides_turns_everything_round(self):
        there, back = compare(self.AFTER, self.BEFORE), compare(self.BEFORE, self.AFTER)
        assert back["gain_low"] == pytest.approx(-there["gain_high"], rel=1e-12)
        assert (back["won"], back["lost"], back["p"]) == (1, 5, pytest.approx(there["p"]))

    def test_equal_runs_and_a_single_task(self):
        same = compare(self.AFTER, self.AFTER)
        assert (same["gain"], same["p"]) == (0, 1)
        assert same["gain_low"] < 0 < same["gain_high"]
        assert math.isnan(compare([True], [False])["gain_low"])


def test_the_curve_has_shares_intervals_and_cost_by_steps(outputs):
    table = curve(scored(outputs, "all"), arc_outputs.costs_of("all"))
    assert table["steps"].tolist() == [2, 8]
    assert table["tasks"].tolist() == [4, 4]
    assert table["solved"].tolist() == [2, 2]
    assert table["one_view"].tolist() == [0.5, 0.5]
    assert table["seconds_per_task"].tolist() == pytest.approx([1, 3])
    assert table["fell_back"].tolist() == [1, 1]
    known = stats.binomtest(2, 4).proportion_ci()
    ends = table.loc[1, ["pass2_low", "pass2_high"]].tolist()
    assert ends == pytest.approx(tuple(known))


def test_an_unknown_cost_stays_unknown(outputs):
    costs = arc_outputs.costs_of("joint").assign(milliseconds=float("nan"))
    assert pd.isna(curve(scored(outputs, "joint"), costs)["seconds_per_task"]).all()
