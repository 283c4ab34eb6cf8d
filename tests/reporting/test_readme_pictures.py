"""`make pictures`: what README.md shows is drawn from results, examples by seed."""

import shutil
from itertools import product

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.helpers import evaluated
from tools import pictures as tool
from tttlab.data.image_sets import ImageSet
from tttlab.evaluation.results import Results
from tttlab.reporting import plots, style
from tttlab.reporting.pictures import read_flips
from tttlab.shifts.shift import list_shifts

MODELS, RUNS = ("convnet", "vit"), ("none", "shrink", "ssl", "actmad")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("readme")
    evaluated.write_project(root, models=MODELS, runs=RUNS, images=30)
    return root, Results.read(root, list(product(MODELS, RUNS)))


@pytest.fixture(scope="module")
def flips(project):
    root, results = project
    test = ImageSet.load(root / "data" / "test")
    shifts = list_shifts(evaluated.CORRUPTIONS, evaluated.SEVERITIES)
    return read_flips(root, *tool.shown(results), test, shifts, 3, training_seed=0)


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text"))]


def test_examples_are_of_the_best_run_that_trains_although_another_gains_more(project):
    _, results = project
    gains = {run: results.summary["convnet", run]["gain"] for run in RUNS}
    assert tool.shown(results) == ("convnet", "actmad")
    assert gains["actmad"] > gains["ssl"]


def test_turned_wrong_is_shown_beside_turned_right_with_their_numbers(project, flips):
    _, results = project
    figure = tool.first_picture(results, flips)
    entry, words = results.summary["convnet", "actmad"], texts(figure)
    right, wrong = flips.wrong_to_right[:4], flips.right_to_wrong[:2]
    assert (
        f"actmad: {entry['wrong_to_right']:,} answers turned right, {len(right)} of them at random"
        in words
    )
    assert (
        f"actmad: {entry['right_to_wrong']:,} answers turned wrong, {len(wrong)} of them at random"
        in words
    )
    assert len(wrong) > 0
    for flip in (*right, *wrong):
        end = f"true: {flip.truth}\n{flip.before[0]} → {flip.after[0]}"
        assert any(text.endswith(end) for text in words)
    shown = [image for axes in figure.axes for image in axes.images]
    assert len(shown) == len(right) + len(wrong)


def test_gains_are_those_of_metrics_json(project, flips):
    _, results = project
    words = texts(tool.first_picture(results, flips))
    for run in RUNS[1:]:
        gain = plots_points(results.summary["convnet", run]["gain"])
        assert any(text.startswith(gain) for text in words)


def plots_points(fraction: float) -> str:
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def test_the_dark_picture_has_the_colours_of_the_dark_page(project, flips, tmp_path):
    _, results = project
    themes = style.themes()
    for theme in ("light", "dark"):
        path = tmp_path / f"{theme}.png"
        tool.save(tool.first_picture(results, flips), path, theme)
        assert path.stat().st_size <= tool.LARGEST
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        colors, counts = np.unique(pixels, axis=0, return_counts=True)
        paper = "#" + "".join(f"{value:02x}" for value in colors[counts.argmax()])
        assert paper == themes[theme]["paper"]
    figure = Figure()
    figure.text(0, 0, "ink", color=plots.INK)
    (line,) = figure.subplots().plot([0, 1], color=plots.LIGHT[2], alpha=None)
    tool.recolor(figure, themes["light"], themes["dark"])
    assert line.get_color()[:3] == pytest.approx(to_rgb(plots.DARK[2]))
    assert figure.texts[0].get_color()[:3] == pytest.approx(to_rgb(themes["dark"]["ink"]))


def to_rgb(color: str) -> list[float]:
    return [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]


def test_without_a_browser_the_old_picture_stays_with_a_word(tmp_path, monkeypatch, capsys):
    path = tmp_path / "report.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(tool, "BROWSERS", ("no-browser-of-this-name",))
    assert not tool.photograph("about:blank", path, (100, 100))
    assert path.read_bytes() == b"old"
    assert "report.png stays as it was: none of no-browser" in capsys.readouterr().out


@pytest.mark.skipif(not any(map(shutil.which, tool.BROWSERS)), reason="no Chromium is installed")
def test_a_page_is_photographed(tmp_path):
    source, path = tmp_path / "page.html", tmp_path / "page.png"
    source.write_text("<body style='margin:0;background:#2040c0'>", encoding="utf-8")
    assert tool.photograph(source.as_uri(), path, (600, 300))
    with Image.open(path) as picture:
        assert picture.size == (600, 300)
        assert picture.convert("RGB").getpixel((300, 100)) == (0x20, 0x40, 0xC0)
