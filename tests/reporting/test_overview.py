"""The figure that the report opens with, and names that are long."""

import warnings
from itertools import pairwise, product

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle

from tests.helpers import evaluated
from tttlab.evaluation.results import Results
from tttlab.reporting import drawings, plots, report
from tttlab.reporting.figures.overview import limits_of, overview, place
from tttlab.reporting.words import in_lines

NAN = float("nan")
COLUMNS = [
    *("run", "gain", "gain_low", "gain_high", "training", "clean"),
    *("gated", "gated_low", "gated_high"),
]
TABLE = pd.DataFrame(
    [
        ("shrink", 0.06, 0.05, 0.07, NAN, 0.0, NAN, NAN, NAN),
        ("ssl", 0.07, 0.06, 0.08, 0.02, -0.01, 0.04, 0.03, 0.05),
        ("hurts", -0.03, -0.04, -0.02, -0.05, -0.02, NAN, NAN, NAN),
    ],
    columns=COLUMNS,
)
STYLES = plots.run_styles(("none", *TABLE["run"]))


@pytest.fixture(scope="module")
def axes():
    return overview(TABLE, STYLES, "a model", limits_of({"a": TABLE})).axes[0]


def spans(axes, *, hatched: bool) -> list[list[float]]:
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [
        [round(bar.get_x(), 9), round(bar.get_x() + bar.get_width(), 9)]
        for bar in bars
        if bool(bar.get_hatch()) == hatched
    ]


def test_what_training_adds_is_hatched_and_ends_at_the_gain(axes):
    """The full bar is the gain before the first step: the gain less what training adds."""
    assert spans(axes, hatched=False) == [[0, 6], [0, 5], [0, 2]]
    assert spans(axes, hatched=True) == [[5, 7], [2, -3]]


def test_intervals_gate_and_price_stand_at_their_values(axes):
    lines = {tuple(part[:, 0].round(9)) for c in axes.collections for part in c.get_segments()}
    assert {(5, 7), (6, 8), (-4, -2), (3, 5)} <= lines
    marks = {"o": [], "x": []}
    for line in axes.lines:
        marks[line.get_marker()].append(round(float(line.get_xdata()[0]), 9))
    assert sorted(marks["o"]) == [-3, 4, 6, 7]
    assert sorted(marks["x"]) == [-2, -1, 0]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == plots.PAPER]
    assert [float(line.get_xdata()[0]) for line in hollow if line.get_marker() == "o"] == [4]


def test_numbers_are_written_beside_the_names(axes):
    texts = [text.get_text() for text in axes.texts]
    assert texts == [
        *("shrink", "+6.0", "ssl", "+7.0 (+2.0 by training)"),
        *("hurts", "−3.0 (−5.0 by training)"),
    ]


def test_all_models_have_one_axis_that_holds_everything():
    wider = TABLE.assign(gain_high=0.2)
    low, high = limits_of({"a": TABLE, "b": wider})
    assert low < -4
    assert high > 20


def test_the_legend_names_only_what_is_there():
    plain = TABLE[:1].assign(clean=NAN)
    figure = overview(plain, STYLES, "a model", limits_of({"a": plain}))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["gain", "95 % interval"]
    full = overview(TABLE, STYLES, "a model", limits_of({"a": TABLE}))
    assert [text.get_text() for text in full.legends[0].get_texts()] == [
        "gain before the first step",
        "what training adds",
        "95 % interval",
        "with the gate",
        "change on clean images",
    ]


def test_runs_are_stacked_without_overlap():
    rows = place(["a", "b" * 60, "c"])
    assert [len(row.lines) for row in rows] == [1, 3, 1]
    for above, row in pairwise(rows):
        assert above.below < row.top < row.bar < row.below


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("short", ["short"]),
        ("a_name_of_some_words", ["a_name_of_", "some_words"]),
        ("abcdefghijklmnop", ["abcdefghij", "klmnop"]),
        ("", [""]),
    ],
)
def test_names_are_broken_where_they_can_be(name, lines):
    assert in_lines(name, 10) == lines
    assert "".join(lines) == name


LONG_MODELS = ("model_" + "convnext_tiny_in22k_" * 2 + "_ft_in1k_384_x", "abcdefghijklmno" * 4)
LONG_RUNS = ("run_" + "adapting_with_many_views_" * 2 + "again_", "pqrstuvwxyz0123" * 4)


@pytest.mark.slow
class TestLongNames:
    """Names of 60 characters without spaces leave no figure unreadable."""

    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, tmp_path_factory):
        root = tmp_path_factory.mktemp("long")
        sets = {f"photos/{'night_' * 8}{n}": evaluated.blobs(9, "n", seed=n) for n in range(2)}
        with pytest.MonkeyPatch.context() as patch:
            for run, like in zip(LONG_RUNS, ("actmad", "ssl"), strict=True):
                patch.setitem(evaluated.RUNS, run, evaluated.RUNS[like])
            runs = ("none", *LONG_RUNS)
            options = {"models": LONG_MODELS, "runs": runs, "images": 12, "sets": sets}
            evaluated.write_project(root, gated=LONG_RUNS, **options)
        return Results.read(root, list(product(LONG_MODELS, runs)))

    @pytest.fixture(scope="class")
    @classmethod
    def drawn(cls, results):
        return drawings.draw(results, {}, evaluated.SEVERITIES)

    def test_every_word_lies_within_its_figure(self, drawn, tmp_path):
        assert {"overview", "gain", "intervals", "steps", "cost", "severity"} <= {
            name.partition("_")[0] for name in drawn
        }
        for name, drawing in drawn.items():
            figure = drawing.figure
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of a layout for which there is no room
                plots.save_png(figure, tmp_path / f"{name}.png")
                figure.suptitle("")
                figure.draw_without_rendering()
            box = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())  # inches
            width, height = figure.get_size_inches()
            outside = (-box.x0, -box.y0, box.x1 - width, box.y1 - height)
            assert max(outside) < 0.05, name

    def test_the_terminal_shows_all_of_a_name_in_lines_that_fit(self, results):
        lines = report.plain_table(results).splitlines()
        assert max(map(len, lines)) <= 170
        starts = [line.split("  ")[0] for line in lines]
        for model in LONG_MODELS:
            parts = in_lines(model, 32)
            shown = [starts[n : n + len(parts)] for n in range(len(starts))]
            assert parts in shown, model

    def test_panels_keep_most_of_their_figure(self, drawn):
        for name, drawing in drawn.items():
            figure = drawing.figure
            figure.draw_without_rendering()
            areas = [np.prod(axes.get_position().size) for axes in figure.axes]
            assert sum(areas) > 0.15, name
