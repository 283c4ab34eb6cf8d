import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from tttlab import plots

RUNS = ("none", "views", "actmad")
STYLES = plots.run_styles(RUNS)
CORRUPTIONS = ("fog", "glass_blur", "all corruptions")


def gains() -> pd.DataFrame:
    rows = [
        *(("none", name, 0.0, 0.0, 0.0) for name in CORRUPTIONS),
        ("actmad", "fog", 0.02, 0.04, 0.06), ("actmad", "glass_blur", -0.01, 0.01, 0.03),
        ("actmad", "all corruptions", -0.05, -0.03, -0.01),
        ("views", "all corruptions", 0.0, 0.01, 0.02), ("views", "fog", 0.1, 0.2, 0.3),
        ("views", "glass_blur", -0.2, -0.15, -0.1),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["run", "corruption", "gain_low", "gain", "gain_high"])


def linear(color) -> np.ndarray:
    value = np.array(to_rgb(color))
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


class TestColours:
    # Machado, Oliveira and Fernandes (2009), severity 1.0: what a reader without one kind of cone sees, in linear RGB.
    SEEN = {  # noqa: RUF012
        "normal": np.eye(3),
        "protanopia": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deuteranopia": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        "tritanopia": [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ],
    }
    XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def lab(self, color, seen) -> np.ndarray:
        xyz = self.XYZ @ np.clip(np.array(seen) @ linear(color), 0, 1) / [0.9505, 1, 1.089]
        x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    @pytest.mark.parametrize("seen", SEEN)
    @pytest.mark.parametrize("palette", [plots.LIGHT, plots.DARK])
    def test_told_apart_by_every_reader(self, palette, seen):
        points = [self.lab(color, self.SEEN[seen]) for color in palette]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(points, 2)) >= 15

    @pytest.mark.parametrize(("palette", "paper"), [(plots.LIGHT, "#ffffff"), (plots.DARK, "#15161a")])
    def test_contrast_with_the_page(self, palette, paper):
        light = [self.XYZ[1] @ linear(color) for color in (*palette, paper)]
        *colors, page = light
        ratios = [(max(color, page) + 0.05) / (min(color, page) + 0.05) for color in colors]
        assert min(ratios) >= 3  # WCAG 2.2, success criterion 1.4.11

    def test_thirty_six_runs_look_different_and_the_control_is_ink(self):
        styles = plots.run_styles(["none", *(f"run{number}" for number in range(36))])
        assert len({(style.color, style.marker) for style in styles.values()}) == 37
        assert styles["none"].color == plots.INK

    def test_the_control_takes_no_colour_wherever_it_stands(self):
        first, last = plots.run_styles(["none", "a", "b"]), plots.run_styles(["a", "b", "none"])
        assert first == {name: last[name] for name in first}


class TestGain:
    FIGURE = plots.gain_per_corruption(gains(), STYLES, "gain")

    def test_a_panel_per_run_without_the_control(self):
        assert [axes.get_title(loc="left") for axes in self.FIGURE.axes] == ["views", "actmad"]

    def test_values_are_points_at_their_corruption(self):
        axes = self.FIGURE.axes[1]
        lines, dots = axes.collections
        assert [label.get_text() for label in self.FIGURE.axes[0].get_yticklabels()] == [
            "fog", "glass blur", "all corruptions"
        ]  # fmt: skip
        places = self.FIGURE.axes[0].get_yticks()
        assert np.allclose(dots.get_offsets(), np.column_stack([[4, 1, -3], places]))
        assert np.allclose([segment[:, 0] for segment in lines.get_segments()], [[2, 6], [-1, 3], [-5, -1]])

    def test_filled_exactly_where_zero_lies_outside(self):
        for axes, filled in zip(self.FIGURE.axes, [[True, True, False], [True, False, True]], strict=True):
            faces = [to_hex(face) for face in axes.collections[1].get_facecolors()]
            assert [face != "#ffffff" for face in faces] == filled

    def test_first_corruption_on_top(self):
        low, high = self.FIGURE.axes[0].get_ylim()
        assert low > high


def test_many_runs_are_wrapped_into_rows_of_panels():
    runs = [f"run{number}" for number in range(8)]
    table = pd.concat([gains().query("run == 'actmad'").assign(run=run) for run in runs])
    figure = plots.gain_per_corruption(table, plots.run_styles(runs), "gain")
    places = [axes.get_subplotspec() for axes in figure.axes]
    assert [axes.get_title(loc="left") for axes in figure.axes] == runs
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [divmod(i, 6) for i in range(8)]


class TestSeverity:
    TABLE = pd.DataFrame([
        {"model": model, "run": run, "severity": severity, "accuracy_source": 0.9 - 0.1 * severity - shift,
         "accuracy_adapted": 0.9 - 0.1 * severity - shift + extra}
        for model, shift in (("a", 0.0), ("b", 0.05))
        for run, extra in (("none", 0.0), ("views", 0.01), ("actmad", 0.02))
        for severity in (0, 1, 5)
    ])  # fmt: skip
    FIGURE = plots.accuracy_by_severity(TABLE, STYLES, "severity")

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
            "source, not adapted", "views", "actmad"
        ]  # fmt: skip


def test_same_colour_per_run_in_every_figure():
    losses = plots.loss_along_steps({("actmad", "a"): [2.0, 1.0]}, STYLES, "loss")
    severity = {line.get_label(): line.get_color() for line in TestSeverity.FIGURE.axes[0].lines}
    gain = TestGain.FIGURE.axes[1].collections[0].get_edgecolor()[0]
    assert losses.axes[0].lines[0].get_color() == severity["actmad"] == to_hex(gain) == STYLES["actmad"].color


def test_loss_has_a_panel_per_run_and_model():
    curves = {(f"run{number}", "a"): np.arange(number + 2.0) for number in range(5)}
    figure = plots.loss_along_steps(curves, plots.run_styles([run for run, _ in curves]), "loss")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [f"run{number} · a" for number in range(5)]
    for axes, losses in zip(figure.axes, curves.values(), strict=True):
        assert axes.lines[0].get_ydata().tolist() == losses.tolist()
        assert axes.lines[0].get_xdata().tolist() == list(range(len(losses)))


def test_examples_stand_at_their_corruption_and_severity():
    names = [f"corruption_{number}" for number in range(17)]  # more than fit into one block of 15
    rows = ["clean", "1", "5"]
    pictures = {
        name: [np.full((4, 4, 3), 10 * column + row, np.uint8) for row in range(3)] for column, name in enumerate(names)
    }
    figure = plots.examples(pictures, rows, "examples")
    shown = {}
    for axes in figure.axes:
        if axes.images:
            place = axes.get_subplotspec()
            block, row = divmod(place.rowspan.start, 3)
            shown[block * 15 + place.colspan.start, row] = int(axes.images[0].get_array()[0, 0, 0])
    assert shown == {(column, row): 10 * column + row for column in range(17) for row in range(3)}


class TestFiles:
    def test_png_is_opaque_on_white(self, tmp_path):
        plots.save_png(TestGain.FIGURE, tmp_path / "new" / "gain.png")
        with Image.open(tmp_path / "new" / "gain.png") as image:
            assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
            assert min(image.size) > 200

    def test_svg_follows_the_page(self):
        text = plots.to_svg(TestGain.FIGURE, "gain", 'gain & "more"')
        root = ET.fromstring(text)
        assert root.get("aria-label") == 'gain & "more"'
        assert root.get("width") is None
        assert root.get("viewBox")
        colors = {plots.INK, plots.MUTED, plots.GRID, *plots.LIGHT, "#ffffff", "#000000"}
        assert not colors & set(re.findall(r"#[0-9a-f]{6}", text))
        assert {"var(--run-0)", "var(--run-1)", "var(--muted)", "var(--grid)", "var(--paper)", "currentColor"} <= set(
            re.findall(r"var\(--[\w-]+\)|currentColor", text)
        )

    def test_inner_references_resolve_and_never_meet_those_of_another_figure(self):
        one, other = (plots.to_svg(TestGain.FIGURE, name, "") for name in ("one", "other"))
        names = [set(re.findall(r' id="([^"]+)"', text)) for text in (one, other)]
        used = [set(re.findall(r'(?:url\(#|href="#)([\w-]+)', text)) for text in (one, other)]
        assert names == used
        assert used[0]
        assert not used[0] & used[1]

    def test_svg_names_no_address(self):
        pictures = {"fog": [np.zeros((4, 4, 3), np.uint8)]}
        text = plots.to_svg(plots.examples(pictures, ["clean"], "examples"), "examples", "")
        text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
        assert "data:image/png;base64" in text
        assert "http" not in text

    def test_same_figure_same_bytes(self):
        texts = {plots.to_svg(plots.gain_per_corruption(gains(), STYLES, "gain"), "gain", "") for _ in range(2)}
        assert len(texts) == 1


def test_style_does_not_leak_into_a_users_own_figures():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.to_svg(plots.gain_per_corruption(gains(), STYLES, "gain"), "gain", "")
    assert dict(matplotlib.rcParams) == before
