import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from tttlab.reporting import pictures, plots


@plots.styled
def figure():
    """A figure in two colours of runs: text, a grid, markers, a transparent patch and a title."""
    styles = plots.run_styles(["none", "views", "actmad"])
    result, all_axes = plots.panels(2, "a title", columns=2)
    for axes, run in zip(all_axes, ("views", "actmad"), strict=True):
        plots.markers(axes, [0.0425, 1], [2, 3], styles[run], filled=[True, False])
        axes.axhline(0, color=plots.INK)
        axes.fill_between([0, 1], 0, 1, color=plots.GAIN, alpha=0.3)
        axes.set_xticks([0.0425], ["0.0425"])
    plots.legend(result, all_axes[0].collections[:1], ["views"])
    return result


FIGURE = figure()


def linear(color) -> np.ndarray:
    value = np.array(to_rgb(color))
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


class TestColours:
    # Colours as seen without one kind of cone, in linear RGB: Machado, Oliveira and Fernandes
    # (2009), severity 1.0.
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

    @pytest.mark.parametrize(
        ("palette", "paper"), [(plots.LIGHT, "#ffffff"), (plots.DARK, "#15161a")]
    )
    def test_contrast_with_the_page(self, palette, paper):
        *luminances, page = (self.XYZ[1] @ linear(color) for color in (*palette, paper))
        ratios = [(max(y, page) + 0.05) / (min(y, page) + 0.05) for y in luminances]
        assert min(ratios) >= 3  # WCAG 2.2, success criterion 1.4.11

    @pytest.mark.parametrize(
        ("ends", "ink"),
        [((plots.GAIN, plots.LOSS), plots.INK), ((plots.DARK_GAIN, plots.DARK_LOSS), "#e6e6ea")],
    )
    def test_numbers_are_readable_on_the_heat_map(self, ends, ink):
        text = self.XYZ[1] @ linear(ink)
        for color in ends:
            low, high = sorted([text, self.XYZ[1] @ linear(color)])
            assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2.2, success criterion 1.4.3

    @pytest.mark.parametrize("seen", SEEN)
    @pytest.mark.parametrize("ends", [(plots.GAIN, plots.LOSS), (plots.DARK_GAIN, plots.DARK_LOSS)])
    def test_gain_and_loss_are_told_apart_by_every_reader(self, ends, seen):
        gain, loss = (self.lab(color, self.SEEN[seen]) for color in ends)
        assert np.linalg.norm(gain - loss) >= 30

    def test_thirty_six_runs_look_different_and_the_control_is_ink(self):
        styles = plots.run_styles(["none", *(f"run{number}" for number in range(36))])
        assert len({(style.color, style.marker) for style in styles.values()}) == 37
        assert styles["none"].color == plots.INK

    def test_the_control_takes_no_colour_wherever_it_stands(self):
        first, last = plots.run_styles(["none", "a", "b"]), plots.run_styles(["a", "b", "none"])
        assert first == {name: last[name] for name in first}


class TestFiles:
    def test_png_is_opaque_on_white(self, tmp_path):
        plots.save_png(FIGURE, tmp_path / "new" / "gain.png")
        with Image.open(tmp_path / "new" / "gain.png") as image:
            assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
            assert min(image.size) > 200

    def test_svg_follows_the_page(self):
        text = plots.to_svg(FIGURE, "gain", 'gain & "more"')
        root = ET.fromstring(text)
        assert root.get("aria-label") == 'gain & "more"'
        assert root.get("width") is None
        assert root.get("viewBox")
        colors = {
            plots.INK,
            plots.MUTED,
            plots.GRID,
            *plots.LIGHT,
            plots.GAIN,
            plots.LOSS,
            "#ffffff",
            "#000000",
        }
        assert not colors & set(re.findall(r"#[0-9a-f]{6}", text))
        names = ("run-0", "run-1", "muted", "grid", "paper", "gain")
        expected = {"currentColor", *(f"var(--{name})" for name in names)}
        assert expected <= set(re.findall(r"var\(--[\w-]+\)|currentColor", text))

    def test_svg_leaves_the_title_to_the_page(self, tmp_path):
        drawn = figure()
        text = plots.to_svg(drawn, "gain", "")
        assert "a title" not in text
        assert drawn.get_suptitle() == "a title"
        assert f"--width:{72 * drawn.get_figwidth():.0f}" in text

    def test_rounding_of_places_leaves_numbers_alone(self):
        assert ">0.0425<" in plots.to_svg(FIGURE, "gain", "")

    def test_inner_references_resolve_and_never_meet_those_of_another_figure(self):
        texts = [plots.to_svg(FIGURE, name, "") for name in ("one", "other")]
        names = [set(re.findall(r' id="([^"]+)"', text)) for text in texts]
        used = [set(re.findall(r'(?:url\(#|href="#)([\w-]+)', text)) for text in texts]
        assert names == used
        assert used[0]
        assert not used[0] & used[1]

    def test_svg_names_no_address(self):
        images = {"fog": [np.zeros((4, 4, 3), np.uint8)]}
        drawn = pictures.draw_pictures(images, ["clean"], "examples")
        text = plots.to_svg(drawn, "examples", "")
        text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
        assert "data:image/png;base64" in text
        assert "http" not in text

    def test_same_figure_same_bytes(self):
        texts = {plots.to_svg(figure(), "gain", "") for _ in range(2)}
        assert len(texts) == 1


def test_style_does_not_leak_into_a_users_own_figures():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.to_svg(figure(), "gain", "")
    assert dict(matplotlib.rcParams) == before
