import html
import re

import numpy as np
import pytest

from tests.helpers import arc_outputs
from tttlab.arc.results import read_answers, read_table, read_tasks, read_votes
from tttlab.arc_results.evaluating import evaluate
from tttlab.arc_results.examples import gather
from tttlab.arc_results.figures import curves
from tttlab.arc_results.report import headline, write_report
from tttlab.errors import UserError
from tttlab.reporting.plots import run_styles

RUNS = ("none", "all", "joint")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = arc_outputs.write(tmp_path_factory.mktemp("arc") / "outputs")
    evaluate(folder, RUNS)
    return folder


@pytest.fixture(scope="module")
def text(outputs):
    path = write_report(outputs)
    assert path == outputs / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def groups(outputs):
    scores = read_table(outputs, "scores")
    return gather(
        read_tasks(outputs),
        read_answers(outputs),
        tuple(read_votes(outputs, run) for run in ("none", "all")),
        tuple(scores[scores["run"] == run] for run in ("none", "all")),
    )


def words(part):
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", part)).split())


def article(text, task):
    return re.search(rf'<article class="task" id="task-{task}".*?</article>', text, re.DOTALL)[0]


def line(text, kind, name):
    return words(re.search(rf'<tr data-{kind}="{name}">.*?</tr>', text, re.DOTALL)[0])


class TestGroups:
    def test_every_task_is_in_the_group_of_its_two_outcomes(self, groups):
        assert {group: [task.name for task in tasks] for group, tasks in groups.items()} == {
            "won": ["won1"],
            "lost": ["lost2"],
            "never": ["never3"],
            "both": ["both4"],
        }

    def test_guesses_in_the_order_of_votes_with_what_is_wrong_in_them(self, groups):
        question = groups["won"][0].questions[0]
        first, second = question.before
        assert first.grid.tolist() == arc_outputs.ALMOST_RED
        assert (first.votes, first.views, first.right, first.wrong_cells) == (5, 8, False, 1)
        assert second.wrong_cells is None  # another size
        assert [guess.right for guess in question.votes] == [True, False]
        assert question.votes[0].share == pytest.approx(7 / 8)
        assert question.answer.tolist() == arc_outputs.RED

    def test_where_no_view_gave_a_grid_there_is_no_guess(self, groups):
        assert groups["never"][0].questions[1].after[2] == ()

    def test_when_a_task_was_solved(self, groups):
        assert groups["won"][0].solved_at == (8,)
        assert groups["lost"][0].solved_at == (2,)


class TestHeadline:
    def metrics(self, low, high):
        entry = {"solved": 3, "tasks": 77, "seconds_per_task": 0.25}
        gain = {"gain": 0.2, "gain_low": low, "gain_high": high, "won": 16, "lost": 1}
        runs = {"none": entry, "all": {"solved": 18, "tasks": 77, "seconds_per_task": 41.26}}
        return {"runs": runs, "comparisons": {"all": {"none": {"pass2": gain}}}}

    @pytest.mark.parametrize(
        ("low", "high", "start"),
        [(0.1, 0.3, "Yes. "), (-0.1, 0.3, "Undecided"), (-0.3, -0.1, "No, it hurts. ")],
    )
    def test_it_decides_by_the_interval(self, low, high, start):
        assert headline(self.metrics(low, high))[0].startswith(start)

    def test_how_many_of_how_many_and_at_what_cost(self):
        answer, rest = headline(self.metrics(0.1, 0.3))
        assert "solves 18 of 77 tasks, without it 3." in answer
        assert "+20.0 points, 95 % interval [+10.0, +30.0]; tasks won: 16, lost: 1." in rest
        assert "41.3\N{NO-BREAK SPACE}s per task in place of 0.25\N{NO-BREAK SPACE}s" in rest

    def test_one_run_is_compared_with_nothing(self):
        entry = {"solved": 3, "tasks": 77, "seconds_per_task": 0.25}
        for run in ("none", "all"):
            metrics = {"runs": {run: entry}, "comparisons": {}}
            assert headline(metrics)[0] == f"Nothing to compare: {run} solves 3 of 77 tasks."


class TestPage:
    def test_it_needs_no_network(self, text):
        assert not re.findall(r'(?:src|href)="(?!#)', text)
        assert "http" not in text.replace("http://www.w3.org", "")

    def test_what_the_numbers_do_not_say(self, text):
        said = words(text)
        assert "trained offline on 1 tasks and 5 invented ones, and is asked 4" in said
        assert "asked 4 whose given grids have at most 3 × 3 cells" in said
        assert "not comparable with published results" in said

    def test_the_table_of_runs(self, text):
        low, high = "6.8", "93.2"  # of two in four, by Clopper and Pearson
        assert line(text, "run", "all") == (
            "all every weight is trained, for each task anew 8 "
            f"2 of 4 {low} – {high} % 50.0 {low} – {high} 50.0 1 / 1 1.00 3.00 1"
        )
        assert line(text, "run", "none").endswith("25.0 0.6 – 80.6 25.0 0.10 0")

    def test_all_against_the_others_and_votes_against_one_view(self, text):
        assert line(text, "against", "joint").startswith(
            "joint every weight, one network for all tasks together −25.0 [−100.0, +99.9] 1 / 2"
        )
        assert line(text, "voting", "all").startswith("all 50.0 50.0 0.0 ")

    def test_the_groups_have_their_counts(self, text):
        titles = [words(title) for title in re.findall(r"<h2 .*?</h2>", text)]
        assert titles[5:9] == [
            "Solved by test-time training: 1 of 4",
            "Lost: 1 of 4",
            "Never solved: 1 of 4",
            "Solved both ways: 1 of 4",
        ]

    def test_a_task_shows_its_grids_in_order(self, text):
        grids = re.findall(r'aria-label="(\d+ × \d+) cells: ([\d ]+)"', article(text, "won1"))
        shown = [("1 × 3", "606"), ("2 × 1", "9 9")] * 2
        shown += [("2 × 2", "21 12"), ("2 × 2", "22 28"), ("1 × 2", "55"), ("2 × 2", "22 20")]
        shown += [("2 × 2", "22 20")]  # the answer
        shown += [("2 × 2", "22 20"), ("2 × 2", "22 28")]  # the votes
        assert grids == shown

    def test_a_task_says_what_is_right(self, text):
        said = words(article(text, "won1"))
        assert said.startswith("won1 · first solved after 8 steps Demonstrations")
        assert "without 2 × 2 ✗ 1 wrong 2 steps 1 × 2 ✗ wrong size 8 steps 2 × 2 ✓ right" in said
        assert said.endswith("2 × 2 ✓ right 7 of 8 views 2 × 2 ✗ 1 wrong 1 of 8 views")
        assert "without 1 × 2 ✗ wrong size second ✓ right" in words(article(text, "both4"))
        assert "lost2 · solved on the way, after 2 steps" in words(article(text, "lost2"))

    def test_every_question_is_shown(self, text):
        said = words(article(text, "never3"))
        assert "Question 1 of 2" in said
        assert "Question 2 of 2" in said
        assert "2 steps no grid 8 steps" in said

    def test_the_rest_of_a_large_group_is_folded(self, outputs, monkeypatch):
        monkeypatch.setattr("tttlab.arc_results.report.SHOWN", 0)
        page = write_report(outputs).read_text(encoding="utf-8")
        assert page.count("<summary>1 more</summary>") == 4

    def test_the_agreement_of_gradients_is_told(self, text):
        # Differences 0.3, 0.4, 0.1, 0.3: mean 0.275, standard error 0.0629, Student's t 3.182.
        told = words(re.search(r'<h2 id="gradients">.*?</p>', text, re.DOTALL)[0])
        assert "a cosine of 0.38 on average over 4 tasks" in told or "0.37 on average" in told
        assert "of another task it is 0.10" in told
        assert "more than to others (difference +0.28, 95 % interval +0.07 to +0.48)" in told

    def test_settings_are_for_people(self, text):
        assert "trainable joint, lr 0.001" in words(text)
        assert "f00" not in text

    def test_without_a_control_the_page_has_no_groups(self, tmp_path):
        folder = arc_outputs.write(tmp_path / "outputs")
        evaluate(folder, ["joint"])
        page = write_report(folder).read_text(encoding="utf-8")
        assert "Nothing to compare: joint solves 3 of 4 tasks." in words(page)
        assert "<article" not in page

    def test_before_evaluate_it_says_so(self, tmp_path):
        with pytest.raises(UserError, match=r"metrics\.json: .*run `make arc`"):
            write_report(tmp_path)


def test_the_figure_draws_the_table(outputs):
    table = read_table(outputs, "curve")
    figure = curves(table, run_styles(RUNS), "all", "title")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "solved (pass@2)",
        "pass@1",
        "pass@1 from one view",
    ]
    control, alone, joint = figure.axes[1].lines
    assert set(control.get_ydata()) == {0.25}
    np.testing.assert_array_equal(alone.get_xydata(), [[2, 0.5], [8, 0.5]])
    np.testing.assert_array_equal(joint.get_xydata(), [[8, 0.75]])
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["2", "8"]
