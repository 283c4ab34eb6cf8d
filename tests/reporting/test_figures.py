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


def texts(artists) -> list[str]:
    """The texts of labels or other text artists."""
    return [artist.get_text() for artist in artists]


def cell(axes) -> tuple[int, int]:
    """Row and column of a panel in the grid of its figure."""
    spec = axes.get_subplotspec()
    return spec.rowspan.start, spec.colspan.start


class TestGain:
    FIGURE = gain_per_corruption(gains(), STYLES, "gain")

    def test_a_panel_per_run_without_the_control(self):
        assert [axes.get_title(loc="left") for axes in self.FIGURE.axes] == ["views", "actmad"]

    def test_values_are_points_at_their_corruption(self):
        lines, dots = self.FIGURE.axes[1].collections
        labels = texts(self.FIGURE.axes[0].get_yticklabels())
        assert labels == ["fog", "glass blur", "all shifts"]
        ys = self.FIGURE.axes[0].get_yticks()
        assert np.allclose(dots.get_offsets(), np.column_stack([[4, 1, -3], ys]))
        ends = [segment[:, 0] for segment in lines.get_segments()]
        assert np.allclose(ends, [[2, 6], [-1, 3], [-5, -1]])

    def test_filled_exactly_where_zero_lies_outside(self):
        expected = [[True, True, False], [True, False, True]]
        for axes, filled in zip(self.FIGURE.axes, expected, strict=True):
            faces = [to_hex(face) for face in axes.collections[1].get_facecolors()]
            assert [face != "#ffffff" for face in faces] == filled

    def test_first_corruption_on_top(self):
        low, high = self.FIGURE.axes[0].get_ylim()
        assert low > high


def test_many_runs_are_wrapped_into_rows_of_panels():
    runs = [f"run{number}" for number in range(8)]
    table = pd.concat([gains().query("run == 'actmad'").assign(run=run) for run in runs])
    figure = gain_per_corruption(table, plots.run_styles(runs), "gain")
    assert [axes.get_title(loc="left") for axes in figure.axes] == runs
    assert [cell(axes) for axes in figure.axes] == [divmod(i, 6) for i in range(8)]


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
        labels = texts(self.FIGURE.legends[0].get_texts())
        assert labels == ["source, not adapted", "views", "actmad"]


def test_same_colour_per_run_in_every_figure():
    losses = loss_along_steps({("actmad", "a"): [2.0, 1.0]}, STYLES, "loss")
    severity = {line.get_label(): line.get_color() for line in TestSeverity.FIGURE.axes[0].lines}
    gain = TestGain.FIGURE.axes[1].collections[0].get_edgecolor()[0]
    colors = {losses.axes[0].lines[0].get_color(), severity["actmad"], to_hex(gain)}
    assert colors == {STYLES["actmad"].color}


def test_loss_has_a_panel_per_run_and_model():
    curves = {(f"run{number}", "a"): np.arange(number + 2.0) for number in range(5)}
    figure = loss_along_steps(curves, plots.run_styles([run for run, _ in curves]), "loss")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [f"run{number} · a" for number in range(5)]
    for axes, losses in zip(figure.axes, curves.values(), strict=True):
        assert axes.lines[0].get_ydata().tolist() == losses.tolist()
        assert axes.lines[0].get_xdata().tolist() == list(range(len(losses)))


def test_examples_stand_at_their_corruption_and_severity():
    names = [f"corruption_{number}" for number in range(17)]  # more than fit into one block of 15
    rows = ["clean", "1", "5"]
    images = {
        name: [np.full((4, 4, 3), 10 * column + row, np.uint8) for row in range(3)]
        for column, name in enumerate(names)
    }
    figure = pictures.draw_pictures(images, rows, "examples")
    values = {}
    for axes in figure.axes:
        if axes.images:
            grid_row, grid_column = cell(axes)
            block, row = divmod(grid_row, 3)
            values[block * 15 + grid_column, row] = int(axes.images[0].get_array()[0, 0, 0])
    assert values == {(column, row): 10 * column + row for column in range(17) for row in range(3)}


def test_a_set_of_few_images_leaves_its_column_empty_below():
    pixels = np.zeros((4, 4, 3), np.uint8)
    images = {"a/b_c": [pixels] * 3, "d": [pixels]}
    figure = pictures.draw_pictures(images, ["", "", ""], "examples")
    filled = sorted(cell(axes) for axes in figure.axes if axes.images)
    assert filled == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["a\nb_c", "d"]


class TestHeatMap:
    TABLE = gains().assign(significant=lambda table: table["gain_low"] > 0, accuracy_source=0.612)
    FIGURE = heat_map(TABLE, STYLES, "map", largest=0.2)
    AXES = FIGURE.axes[0]

    def test_a_row_per_run_without_the_control_and_the_source_above(self):
        assert texts(self.AXES.get_yticklabels()) == ["source, %", "views", "actmad"]
        above = [text for text in self.AXES.texts if text.get_position()[1] < -1]
        assert texts(above) == ["61.2"] * 3

    def test_numbers_stand_in_their_cells_bold_where_significant(self):
        numbers = {text.get_position(): text for text in self.AXES.texts}
        assert numbers[0, 0].get_text() == "+20.0"
        assert numbers[1, 0].get_text() == "−15.0"
        assert numbers[2.5, 1].get_text() == "−3.0"
        assert numbers[0, 0].get_fontweight() == "bold"
        assert numbers[1, 1].get_fontweight() == "normal"

    def test_colour_is_the_sign_strength_the_size_and_a_loss_is_outlined(self):
        rectangles = [patch for patch in self.AXES.patches if isinstance(patch, Rectangle)]
        filled = {
            (round(rectangle.get_x() + 0.47, 2), round(rectangle.get_y() + 0.44, 2)): rectangle
            for rectangle in rectangles
            if rectangle.get_width() == 0.94
        }
        assert filled[0, 0].get_alpha() == 1
        assert filled[0, 1].get_alpha() == pytest.approx(np.sqrt(0.04 / 0.2))
        colors = {center: to_hex(patch.get_facecolor()) for center, patch in filled.items()}
        losses = {center for center, color in colors.items() if color == plots.LOSS}
        assert losses == {(1, 0), (2.5, 1)}
        assert len(rectangles) - len(filled) == len(losses)

    def test_unknown_gains_stay_empty(self):
        figure = heat_map(self.TABLE.assign(gain=np.nan), STYLES, "map", largest=np.nan)
        assert not figure.axes[0].patches


class TestCost:
    def test_front_by_a_double_loop(self):
        assert pareto_front([1, 2, 2, 3, 4, 4], [0, 1, 1, 0.5, 3, 2]) == [0, 1, 2, 4]

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
        points = [dot.get_offsets()[0].tolist() for dot in dots]
        hollow = [to_hex(dot.get_facecolor()[0]) == plots.PAPER for dot in dots]
        assert points == [[0.5, 1.0], [5.0, 3.0], [2.0, 2.0]]
        assert hollow == [False, False, True]
        assert axes.lines[0].get_xdata().tolist() == [0.5, 2.0, 5.0]
        labels = texts(figure.legends[0].get_texts())
        assert labels == ["views", "actmad", "actmad with gate", "no run is cheaper and better"]


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
        in_use = [line for line in accuracy.lines if line.get_color() == STYLES["views"].color]
        shifted, clean, step = in_use
        assert shifted.get_ydata() == pytest.approx([50, 60, 70])
        assert clean.get_ydata() == pytest.approx([90] * 3)
        assert (step.get_xdata().tolist(), step.get_ydata().tolist()) == ([1], [60])
        curves = [line.get_ydata().tolist() for line in loss.lines if len(line.get_xdata()) == 3]
        assert curves == [[3, 2, 1]] * 3
        assert time.lines[-1].get_xdata().tolist() == [2]
        assert len(accuracy.lines) == 5

    def test_a_candidate_that_collapses_leaves_the_range_alone(self):
        accuracy = self.ROWS["accuracy"].where(self.ROWS["setting"] != "candidate-0", 0.0)
        collapsed = self.ROWS.assign(accuracy=accuracy)
        low, _ = step_curves(collapsed, STYLES, "steps").axes[0].get_ylim()
        assert low > 40

    def test_without_labels_only_the_loss(self):
        unknown = self.ROWS.assign(accuracy=np.nan, clean_accuracy=np.nan)
        figure = step_curves(unknown, STYLES, "steps")
        assert [axes.get_ylabel() for axes in figure.axes] == ["loss", ""]

    def test_more_runs_than_columns_go_into_further_rows(self):
        runs = [f"run{number}" for number in range(5)]
        table = pd.concat([self.ROWS[self.ROWS["run"] == "views"].assign(run=run) for run in runs])
        figure = step_curves(table, plots.run_styles(runs), "steps")
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        assert list(filter(None, titles)) == runs
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
        ends = [segment[:, 0] for segment in lines.get_segments()]
        assert np.allclose(ends, [[0, 0.2], [0.3, 0.5]])
        faces = [to_hex(face) for face in dots.get_facecolors()]
        assert faces == [plots.PAPER, STYLES["actmad"].color]
        assert "Spearman +1.00" in texts(axes.texts)

    def test_a_signal_of_several_magnitudes_has_a_logarithmic_axis_in_every_panel(self):
        rows = {"shift": ["clean", "fog-5"], "severity": [0, 5], "gain": [0.0, 0.1]}
        near = pd.DataFrame({"run": "actmad", "distance": [1, 2], **rows})
        far = pd.DataFrame({"run": "ssl", "distance": [1, 40], **rows})
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
        points = [dots.get_offsets()[0] for dots in axes.collections]
        assert np.allclose(points, [[50, 55], [60, 58]])
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
        sides = [{"with": side} for side in ("source", "adapted")]
        table = pd.concat([bins.assign(run="actmad", **side) for side in sides])
        (axes,) = reliability(table, STYLES, "t", {"actmad": ("8.1", "5.2")}).axes
        source, adapted = axes.collections[:2]
        assert np.allclose(adapted.get_offsets(), [[50, 40], [95, 90]])
        assert to_hex(source.get_facecolor()[0]) == plots.PAPER
        heights = [bar.get_height() for bar in axes.patches]
        assert heights[0] == 0
        assert heights[2] == pytest.approx(3 * heights[1])
        assert "ECE 8.1 → 5.2 %" in texts(axes.texts)
