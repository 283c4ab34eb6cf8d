import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from tttlab.reporting import pictures, plots
from tttlab.reporting.figures.accuracy import (
    accuracy_by_severity,
    gain_and_cost,
    gain_per_corruption,
    heat_map,
    pareto_front,
)
from tttlab.reporting.figures.signals import estimated_accuracy, gain_along, reliability
from tttlab.reporting.figures.steps import loss_along_steps, step_curves

RUNS = ("none", "views", "actmad")
STYLES = plots.run_styles(RUNS)
CORRUPTIONS = ("fog", "glass_blur", "all shifts")


def gains() -> pd.DataFrame:
    rows = [
        *(("none", name, 0.0, 0.0, 0.0) for name in CORRUPTIONS),
        ("actmad", "fog", 0.02, 0.04, 0.06),
        ("actmad", "glass_blur", -0.01, 0.01, 0.03),
        ("actmad", "all shifts", -0.05, -0.03, -0.01),
        ("views", "all shifts", 0.0, 0.01, 0.02),
        ("views", "fog", 0.1, 0.2, 0.3),
        ("views", "glass_blur", -0.2, -0.15, -0.1),
    ]
    return pd.DataFrame(rows, columns=["run", "corruption", "gain_low", "gain", "gain_high"])


class TestGain:
    FIGURE = gain_per_corruption(gains(), STYLES, "gain")

    def test_a_panel_per_run_without_the_control(self):
        assert [axes.get_title(loc="left") for axes in self.FIGURE.axes] == ["views", "actmad"]

    def test_values_are_points_at_their_corruption(self):
        axes = self.FIGURE.axes[1]
        lines, dots = axes.collections
        assert [label.get_text() for label in self.FIGURE.axes[0].get_yticklabels()] == [
            "fog",
            "glass blur",
            "all shifts",
        ]
        places = self.FIGURE.axes[0].get_yticks()
        assert np.allclose(dots.get_offsets(), np.column_stack([[4, 1, -3], places]))
        assert np.allclose(
            [segment[:, 0] for segment in lines.get_segments()], [[2, 6], [-1, 3], [-5, -1]]
        )

    def test_filled_exactly_where_zero_lies_outside(self):
        for axes, filled in zip(
            self.FIGURE.axes, [[True, True, False], [True, False, True]], strict=True
        ):
            faces = [to_hex(face) for face in axes.collections[1].get_facecolors()]
            assert [face != "#ffffff" for face in faces] == filled

    def test_first_corruption_on_top(self):
        low, high = self.FIGURE.axes[0].get_ylim()
        assert low > high


def test_many_runs_are_wrapped_into_rows_of_panels():
    runs = [f"run{number}" for number in range(8)]
    table = pd.concat([gains().query("run == 'actmad'").assign(run=run) for run in runs])
    figure = gain_per_corruption(table, plots.run_styles(runs), "gain")
    places = [axes.get_subplotspec() for axes in figure.axes]
    assert [axes.get_title(loc="left") for axes in figure.axes] == runs
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [
        divmod(i, 6) for i in range(8)
    ]


class TestSeverity:
    TABLE = pd.DataFrame(
        [
            {
                "model": model,
                "run": run,
                "severity": severity,
                "accuracy_source": 0.9 - 0.1 * severity - shift,
                "accuracy_adapted": 0.9 - 0.1 * severity - shift + extra,
            }
            for model, shift in (("a", 0.0), ("b", 0.05))
            for run, extra in (("none", 0.0), ("views", 0.01), ("actmad", 0.02))
            for severity in (0, 1, 5)
        ]
    )
    FIGURE = accuracy_by_severity(TABLE, STYLES, "severity")

    @pytest.mark.parametrize(("panel", "shift"), [(0, 0.0), (1, 5.0)])
    def test_lines_are_percentages(self, panel, shift):
        lines = {line.get_label(): line for line in self.FIGURE.axes[panel].lines}
        assert lines.keys() == {"source, not adapted", "views", "actmad"}
        assert np.allclose(lines["source, not adapted"].get_ydata(), np.array([90, 80, 40]) - shift)
        assert np.allclose(lines["actmad"].get_ydata(), np.array([92, 82, 42]) - shift)
        assert lines["actmad"].get_xdata().tolist() == [0, 1, 5]

    def test_axes_say_what_they_show(self):
        axes = self.FIGURE.axes[0]
        assert axes.get_ylabel() == "accuracy, %"
        assert axes.get_xlabel() == "severity"
        assert axes.xaxis.get_major_formatter()(0) == "clean"
        assert [text.get_text() for text in self.FIGURE.legends[0].get_texts()] == [
            "source, not adapted",
            "views",
            "actmad",
        ]


def test_same_colour_per_run_in_every_figure():
    losses = loss_along_steps({("actmad", "a"): [2.0, 1.0]}, STYLES, "loss")
    severity = {line.get_label(): line.get_color() for line in TestSeverity.FIGURE.axes[0].lines}
    gain = TestGain.FIGURE.axes[1].collections[0].get_edgecolor()[0]
    assert (
        losses.axes[0].lines[0].get_color()
        == severity["actmad"]
        == to_hex(gain)
        == STYLES["actmad"].color
    )


def test_loss_has_a_panel_per_run_and_model():
    curves = {(f"run{number}", "a"): np.arange(number + 2.0) for number in range(5)}
    figure = loss_along_steps(curves, plots.run_styles([run for run, _ in curves]), "loss")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        f"run{number} · a" for number in range(5)
    ]
    for axes, losses in zip(figure.axes, curves.values(), strict=True):
        assert axes.lines[0].get_ydata().tolist() == losses.tolist()
        assert axes.lines[0].get_xdata().tolist() == list(range(len(losses)))


def test_examples_stand_at_their_corruption_and_severity():
    names = [f"corruption_{number}" for number in range(17)]  # more than fit into one block of 15
    rows = ["clean", "1", "5"]
    shown_images = {
        name: [np.full((4, 4, 3), 10 * column + row, np.uint8) for row in range(3)]
        for column, name in enumerate(names)
    }
    figure = pictures.draw_pictures(shown_images, rows, "examples")
    shown = {}
    for axes in figure.axes:
        if axes.images:
            place = axes.get_subplotspec()
            block, row = divmod(place.rowspan.start, 3)
            shown[block * 15 + place.colspan.start, row] = int(axes.images[0].get_array()[0, 0, 0])
    assert shown == {(column, row): 10 * column + row for column in range(17) for row in range(3)}


def test_a_set_of_few_images_leaves_its_column_empty_below():
    pixels = np.zeros((4, 4, 3), np.uint8)
    figure = pictures.draw_pictures(
        {"a/b_c": [pixels] * 3, "d": [pixels]}, ["", "", ""], "examples"
    )
    filled = [
        (place.colspan.start, place.rowspan.start)
        for axes in figure.axes
        if axes.images
        for place in [axes.get_subplotspec()]
    ]
    assert sorted(filled) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["a\nb_\nc", "d"]


class TestHeatMap:
    TABLE = gains().assign(significant=lambda table: table["gain_low"] > 0, accuracy_source=0.612)
    FIGURE = heat_map(TABLE, STYLES, "map", largest=0.2)
    AXES = FIGURE.axes[0]

    def test_a_row_per_run_without_the_control_and_the_source_above(self):
        assert [label.get_text() for label in self.AXES.get_yticklabels()] == [
            "source, %",
            "views",
            "actmad",
        ]
        assert [text.get_text() for text in self.AXES.texts if text.get_position()[1] < -1] == [
            "61.2"
        ] * 3

    def test_numbers_stand_in_their_cells_bold_where_significant(self):
        texts = {text.get_position(): text for text in self.AXES.texts}
        assert texts[0, 0].get_text() == "+20.0"
        assert texts[1, 0].get_text() == "−15.0"
        assert texts[2.5, 1].get_text() == "−3.0"
        assert texts[0, 0].get_fontweight() == "bold"
        assert texts[1, 1].get_fontweight() == "normal"

    def test_colour_is_the_sign_strength_the_size_and_a_loss_is_outlined(self):
        cells = [patch for patch in self.AXES.patches if isinstance(patch, Rectangle)]
        filled = {
            (round(p.get_x() + 0.47, 2), round(p.get_y() + 0.44, 2)): p
            for p in cells
            if p.get_width() == 0.94
        }
        assert filled[0, 0].get_alpha() == 1
        assert filled[0, 1].get_alpha() == pytest.approx(np.sqrt(0.04 / 0.2))
        losses = {
            place for place, patch in filled.items() if to_hex(patch.get_facecolor()) == plots.LOSS
        }
        assert losses == {(1, 0), (2.5, 1)}
        assert len(cells) - len(filled) == len(losses)

    def test_unknown_gains_stay_empty(self):
        figure = heat_map(self.TABLE.assign(gain=np.nan), STYLES, "map", largest=np.nan)
        assert not figure.axes[0].patches


class TestCost:
    def test_front_by_a_double_loop(self):
        costs, gains_ = [1, 2, 2, 3, 4, 4], [0, 1, 1, 0.5, 3, 2]
        assert pareto_front(costs, gains_) == [0, 1, 2, 4]

    def test_points_lie_at_cost_and_gain_hollow_with_the_gate(self):
        rows = [
            ("a", "views", False, 0.5, 0.01),
            ("a", "actmad", False, 5.0, 0.03),
            ("a", "actmad", True, 2.0, 0.02),
        ]
        table = pd.DataFrame(rows, columns=["model", "run", "gated", "milliseconds", "gain"])
        table = table.assign(gain_low=table["gain"] - 0.01, gain_high=table["gain"] + 0.01)
        figure = gain_and_cost(table, STYLES, "cost")
        (axes,) = figure.axes
        dots = axes.collections[1::2]
        assert [dot.get_offsets()[0].tolist() for dot in dots] == [
            [0.5, 1.0],
            [5.0, 3.0],
            [2.0, 2.0],
        ]
        assert [to_hex(dot.get_facecolor()[0]) == plots.PAPER for dot in dots] == [
            False,
            False,
            True,
        ]
        assert axes.lines[0].get_xdata().tolist() == [0.5, 2.0, 5.0]
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert names == ["views", "actmad", "actmad with gate", "no run is cheaper and better"]


class TestSteps:
    ROWS = pd.DataFrame(
        [
            {
                "run": run,
                "setting": setting,
                "step": step,
                "accuracy": 0.5 + 0.1 * step,
                "clean_accuracy": 0.9,
                "loss": 3.0 - step,
                "milliseconds": 2.0 * step,
                "n": 40,
                "used": setting == "tuned" and step == 1,
            }
            for run in ("views", "actmad")
            for setting in ("tuned", "default", "candidate-0")
            for step in range(3)
        ]
    )

    def test_three_panels_per_run_with_the_step_in_use(self):
        figure = step_curves(self.ROWS, STYLES, "steps")
        accuracy, _, loss, _, time, _ = figure.axes
        main = [line for line in accuracy.lines if line.get_color() == STYLES["views"].color]
        assert main[0].get_ydata() == pytest.approx([50, 60, 70])
        assert main[1].get_ydata() == pytest.approx([90] * 3)
        assert (main[2].get_xdata().tolist(), main[2].get_ydata().tolist()) == ([1], [60])
        assert [line.get_ydata().tolist() for line in loss.lines if len(line.get_xdata()) == 3] == [
            [3, 2, 1]
        ] * 3
        assert time.lines[-1].get_xdata().tolist() == [2]
        assert len(accuracy.lines) == 5

    def test_a_candidate_that_collapses_leaves_the_range_alone(self):
        broken = self.ROWS.assign(
            accuracy=self.ROWS["accuracy"].where(self.ROWS["setting"] != "candidate-0", 0.0)
        )
        low, _ = step_curves(broken, STYLES, "steps").axes[0].get_ylim()
        assert low > 40

    def test_without_labels_only_the_loss(self):
        unknown = self.ROWS.assign(accuracy=np.nan, clean_accuracy=np.nan)
        figure = step_curves(unknown, STYLES, "steps")
        assert [axes.get_ylabel() for axes in figure.axes] == ["loss", ""]

    def test_more_runs_than_columns_go_into_further_rows(self):
        runs = [f"run{number}" for number in range(5)]
        table = pd.concat([self.ROWS[self.ROWS["run"] == "views"].assign(run=run) for run in runs])
        figure = step_curves(table, plots.run_styles(runs), "steps")
        assert [
            axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")
        ] == runs
        assert len(figure.axes) == 15


class TestSignals:
    def test_points_lie_at_signal_and_gain(self):
        table = pd.DataFrame(
            {
                "run": "actmad",
                "shift": ["clean", "fog-5"],
                "severity": [0, 5],
                "gain": [0.0, 0.1],
                "cosine": [0.1, 0.4],
                "cosine_low": [0.0, 0.3],
                "cosine_high": [0.2, 0.5],
            }
        )
        figure = gain_along(table, "cosine", STYLES, "t", "alignment", {"actmad": "Spearman +1.00"})
        (axes,) = figure.axes
        lines, dots = axes.collections
        assert np.allclose(dots.get_offsets(), [[0.1, 0], [0.4, 10]])
        assert np.allclose(
            [segment[:, 0] for segment in lines.get_segments()], [[0, 0.2], [0.3, 0.5]]
        )
        assert [to_hex(face) for face in dots.get_facecolors()] == [
            plots.PAPER,
            STYLES["actmad"].color,
        ]
        assert "Spearman +1.00" in [text.get_text() for text in axes.texts]

    def test_a_signal_of_several_magnitudes_has_a_logarithmic_axis_in_every_panel(self):
        rows = {"shift": ["clean", "fog-5"], "severity": [0, 5], "gain": [0.0, 0.1]}
        near, far = (
            pd.DataFrame({"run": "actmad", "distance": [1, 2], **rows}),
            pd.DataFrame({"run": "ssl", "distance": [1, 40], **rows}),
        )
        for order in ([near, far], [far, near]):
            figure = gain_along(pd.concat(order), "distance", STYLES, "t", "distance", {})
            assert {axes.get_xscale() for axes in figure.axes} == {"log"}
        figure = gain_along(near, "distance", STYLES, "t", "distance", {})
        assert figure.axes[0].get_xscale() == "linear"

    def test_estimates_lie_beside_the_truth(self):
        table = pd.DataFrame(
            {
                "model": "a",
                "metric": ["estimated_accuracy", "estimated_accuracy_atc"],
                "accuracy": [0.5, 0.6],
                "value": [0.55, 0.58],
            }
        )
        (axes,) = estimated_accuracy(table, "t").axes
        assert np.allclose(
            [dots.get_offsets()[0] for dots in axes.collections], [[50, 55], [60, 58]]
        )
        assert axes.get_xlim() == axes.get_ylim()

    def test_reliability_shows_full_bins_and_their_sizes(self):
        bins = pd.DataFrame(
            {
                "bin": [0, 7, 14],
                "confidence": [np.nan, 0.5, 0.95],
                "accuracy": [np.nan, 0.4, 0.9],
                "n": [0, 25, 75],
            }
        )
        table = pd.concat(
            [bins.assign(run="actmad", **{"with": who}) for who in ("source", "adapted")]
        )
        (axes,) = reliability(table, STYLES, "t", {"actmad": ("8.1", "5.2")}).axes
        source, adapted = axes.collections[:2]
        assert np.allclose(adapted.get_offsets(), [[50, 40], [95, 90]])
        assert to_hex(source.get_facecolor()[0]) == plots.PAPER
        heights = [bar.get_height() for bar in axes.patches]
        assert heights[0] == 0
        assert heights[2] == pytest.approx(3 * heights[1])
        assert "ECE 8.1 → 5.2 %" in [text.get_text() for text in axes.texts]
