"""The demo in a browser and by its API: what it says are the numbers of `adapt`."""

import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import demo, served
from tttlab.adaptation.adapter import adapt
from tttlab.adaptation.gate import adapt_gated
from tttlab.config.params import read_params
from tttlab.data.decoding import to_square
from tttlab.data.pixels import as_images
from tttlab.errors import UserError
from tttlab.serving import adaptive_model
from tttlab.serving.answers import Wish
from tttlab.serving.showing import Picture, Spread, show
from tttlab.shifts.corruptions import corrupt_all
from tttlab.workflow import cli
from tttlab.workflow.demo import drawings, scale, steps
from tttlab.workflow.demo.page import open_demo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Give the demo's folder, test images and address."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    root = tmp_path_factory.mktemp("demo")
    images = demo.project(root)
    with demo.running(root, 7960) as (address, process):
        yield root, images, address
    assert process.returncode == 0  # Ctrl-C
    assert not list((root / "tmp").iterdir())  # no photo stays
    assert not (root / "asked").exists()  # the process asked no other host, either


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the group browser is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def expected(root, model, run, pixels, key, steps=None, gate=True):
    """Adapt by the functions of the room adaptation: probabilities without and with."""
    model = adaptive_model.load(root / "outputs" / "served" / model)
    run = model.runs[run]
    task = run.task
    loop = task.loop if steps is None else type(task.loop)(**(vars(task.loop) | {"steps": steps}))
    images = as_images(torch.from_numpy(pixels[None].copy()))
    arguments = task.network, images, task.method, loop
    options = {"statistics": task.statistics, "image_ids": [key], "seed": task.seed}
    if gate and run.gate:
        result, _ = adapt_gated(*arguments, run.gate, **options)
    else:
        result = adapt(*arguments, **options)
    return [logits[0].softmax(-1).tolist() for logits in (result.source_logits, result.logits)]


def photo(folder: Path) -> Path:
    """Save a picture larger than the network's, of another shape and mode."""
    values = np.random.default_rng(9).integers(0, 256, (30, 44, 4), dtype=np.uint8)
    path = folder / "photo.png"
    Image.fromarray(values, "RGBA").save(path)
    return path


def shown(tab):
    """Read the bars of the page: probabilities without and with, in percent, as written."""
    sides = []
    for side in ("source_", "adapted_"):
        titles = tab.locator(f"#bars .bar.{side}").evaluate_all("e => e.map(x => x.title)")
        sides.append([float(title.removesuffix(" %")) for title in titles])
    return sides


def open_tab(browser, address, width=1280):
    """Open the page; → the tab, and a list of all addresses that it asks for."""
    tab, asked = browser.new_page(viewport={"width": width, "height": 900}), []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address)
    tab.wait_for_selector("#bars .bar", timeout=60_000)
    return tab, asked


def wait_for(tab, caption):
    tab.wait_for_function(
        "text => [...document.querySelectorAll('#answer figcaption')].at(-1).innerText == text",
        arg=caption,
        timeout=60_000,
    )


@pytest.mark.slow
def test_sliders_change_what_is_asked_and_the_bars_are_the_numbers_of_adapt(page, browser):
    root, images, address = page
    tab, asked = open_tab(browser, address)
    wait_for(tab, "fog 3")

    def compare(run, corruption, severity, number=1, **options):
        name = images.image_ids[number - 1]
        pixels = corrupt_all(images.pixels[number - 1][None], [name], corruption, severity, 3)[0]
        sides = expected(root, "simclr_convnet", run, pixels, name, **options)
        for told, probabilities in zip(shown(tab), sides, strict=True):
            assert told == pytest.approx([100 * p for p in probabilities], abs=0.051)
        return sides

    compare("memo", "fog", 3)
    tab.locator("#severity input[type=range]").press("ArrowRight")
    wait_for(tab, "fog 4")
    compare("memo", "fog", 4)
    tab.locator("#number input[type=number]").fill("6")
    tab.wait_for_function("document.querySelector('#answer .said').innerText.includes('bee')")
    without, _ = compare("memo", "fog", 4, number=6)
    tab.locator("#gate input").uncheck()
    tab.wait_for_function("!document.querySelector('#answer .said').innerText.includes('gate')")
    slider = tab.locator("#steps input[type=range]")
    for _ in range(2):  # tuning chose two
        slider.press("ArrowRight")
    tab.wait_for_function("document.querySelectorAll('#steps-drawn .ticks span').length == 6")
    _, adapted = compare("memo", "fog", 4, number=6, steps=4, gate=False)
    assert np.abs(np.subtract(adapted, without)).max() > 0.001  # there is something to see
    assert asked
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    tab.close()


@pytest.mark.slow
def test_a_photo_of_ones_own_is_asked_about_until_a_test_image_is_chosen(page, browser, tmp_path):
    root, _, address = page
    tab, asked = open_tab(browser, address)
    tab.get_by_text("A photo of your own").click()
    assert "knows 4 classes: ant, bee, cat and dog" in tab.content()
    tab.locator("#photo input[type=file]").set_input_files(photo(tmp_path))
    tab.wait_for_function("document.querySelector('#answer .said').innerText.includes('unknown')")
    picture = Picture.own(to_square(photo(tmp_path), 16))
    pixels = picture.shifted("fog", 3, 3)
    sides = expected(root, "simclr_convnet", "memo", pixels, picture.key)
    for told, probabilities in zip(shown(tab), sides, strict=True):
        assert told == pytest.approx([100 * p for p in probabilities], abs=0.051)
    tab.locator("#number input[type=number]").fill("2")
    tab.wait_for_function("document.querySelector('#answer .said').innerText.includes('bee')")
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    tab.close()


@pytest.mark.slow
def test_another_run_and_another_network_can_be_chosen(page, browser):
    _, _, address = page
    tab, _ = open_tab(browser, address)
    for control, option, card in (
        ("run", "shrink: re-normalises", "with shrink"),
        ("model", "mae_vit", "with memo"),
    ):
        tab.locator(f"#{control} input").click()
        tab.get_by_role("option", name=option, exact=True).click()
        tab.wait_for_function(
            "text => document.querySelector('.card.adapted_ small').innerText == text", arg=card
        )
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(page, browser, width):
    tab, _ = open_tab(browser, page[2], width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    columns = tab.evaluate(
        "['scale', 'bars'].map(i => document.getElementById(i).getBoundingClientRect().x)"
    )
    assert (columns[0] == columns[1]) == (width == 390)
    tab.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a library of somebody else
def test_programs_get_all_numbers_and_mistakes_in_one_line(page, tmp_path):
    client_of = pytest.importorskip("gradio_client", reason="the extra demo is not installed")
    root, images, address = page
    client = client_of.Client(address, verbose=False, analytics_enabled=False)
    name = images.image_ids[6]
    pixels = corrupt_all(images.pixels[6][None], [name], "snow", 5, 3)[0]
    *_, numbers = client.predict(
        7, None, "snow", 5, "simclr_convnet", "simclr", 3, False, api_name="/show"
    )
    sides = expected(root, "simclr_convnet", "simclr", pixels, name, 3, False)
    for side, probabilities in zip(("source_", ""), sides, strict=True):
        told = list(numbers[f"{side}probabilities"].values())
        assert told == pytest.approx(probabilities, abs=1e-5)
    assert numbers["truth"] == served.CLASSES[6 % 4]
    assert list(numbers["runs"]) == list(served.LOOPS)
    broken, text = tmp_path / "broken.png", tmp_path / "text.png"
    broken.write_bytes(photo(tmp_path).read_bytes()[:200])
    text.write_text("no image")
    for number, file, line in (
        (99, None, "99"),
        (1, broken, "^expected an image, found none that can be read"),
        (1, text, "^expected an image, found none that can be read"),
    ):
        sent = file and client_of.handle_file(file)
        with pytest.raises(Exception, match=line) as raised:
            client.predict(
                number, sent, "none", 3, "simclr_convnet", "memo", 2, True, api_name="/show"
            )
        assert len(str(raised.value).splitlines()) == 1


def keep_surroundings(monkeypatch):
    """Have what the command sets for its own process taken back."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")


@pytest.mark.slow
def test_no_photo_stays_when_another_program_ends_the_demo(tmp_path):
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    demo.project(tmp_path)
    with demo.running(tmp_path, 7980, signal.SIGTERM) as (_, process):
        assert list((tmp_path / "tmp").iterdir())
    assert process.returncode == 143
    assert not list((tmp_path / "tmp").iterdir())


def test_without_results_the_command_ends_in_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    monkeypatch.chdir(tmp_path)
    keep_surroundings(monkeypatch)
    demo.project(tmp_path)
    shutil.rmtree(tmp_path / "outputs" / "served" / "mae_vit")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: outputs/served/mae_vit/model.json: expected a model")


# --- parts of the page ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return served.model(tmp_path_factory.mktemp("network"))[0]


def looked_at(model, **options):
    pixels = np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return show(model, Picture(pixels, "a", "bee"), **options)


def test_names_from_files_are_text_not_html(model):
    hostile = "<img src=x onerror=alert(1)>"
    about = model.about | {"classes": [hostile, *model.classes[1:]]}
    model = type(model)("m", about, model.runs, "memo")
    picture = Picture(np.zeros((16, 16, 3), np.uint8), "a", hostile)
    parts = show(model, picture)
    marks = parts, Spread(0.5, 1.0, 2.0), {hostile: 3.0}, (hostile, Spread(1.0, 2.0, 3.0))
    html = drawings.draw_answer(parts, hostile) + drawings.draw_bars(parts)
    html += steps.draw_steps(parts) + scale.draw_scale(*marks)
    html += drawings.draw_runs(parts, model) + drawings.tell_classes(model.classes)
    assert "onerror" in html
    assert "<img src=x" not in html


def test_what_is_no_number_is_drawn_as_a_dash(model):
    """A network that gives no numbers for an image has neither probabilities nor a distance."""
    shown = looked_at(model, wish=Wish(run="memo", gate=False))
    nothing = dict.fromkeys(served.CLASSES)
    says = shown.says | {"source_confidence": None, "confidence": None, "distance": None}
    says |= {"source_probabilities": nothing, "probabilities": nothing}
    says["curve"] = [point | {"loss": None, "probabilities": nothing} for point in says["curve"]]
    shown = replace(shown, says=says, runs=shown.runs | {"memo": says}, gate=None)
    answer = drawings.draw_answer(shown, "")
    assert re.findall(r'class="confidence">([^<]*)<', answer) == ["–", "–"]
    bars = drawings.draw_bars(shown)
    assert re.findall(r'title="([^"]*)"><i style="width:([^"]*)"', bars) == [("–", "0.00%")] * 8
    (row,) = re.findall("<th>memo.*?</tr>", drawings.draw_runs(shown, model))
    assert "<td>–</td>" in row
    assert "loss it trains on" not in steps.draw_steps(shown)
    marks = scale.draw_scale(shown, Spread(0.5, 1.0, 1.5), {}, None)
    assert re.findall(r'mark-label" style="left:([^"]*)">([^<]*)<', marks) == [("100.00%", "–")]


def test_the_scale_is_logarithmic_and_holds_every_mark():
    axis = scale.Axis.over([1.0, 10.0])
    assert (axis.low, axis.high) == scale.ENDS
    assert axis.place(10.0) - axis.place(1.0) == pytest.approx(axis.place(100.0) - axis.place(10.0))
    assert axis.ticks() == [1.0, 10.0, 100.0]
    wide = scale.Axis.over([0.01, 5000.0, float("nan")])
    assert 0 < wide.place(0.01) < wide.place(5000.0) < 100
    assert wide.place(float("nan")) == 100


def test_labels_are_moved_apart_and_stay_inside():
    moved = steps.apart({"a": 99.0, "b": 98.0, "c": 100.0, "d": 1.0}, 15.0)
    assert sorted(moved, key=moved.get) == ["d", "b", "a", "c"]
    places = sorted(moved.values())
    assert places == [1.0, 70.0, 85.0, 100.0]


def test_the_likeliest_classes_of_both_sides_are_drawn_in_their_order():
    sides = [{"a": 0.7, "b": 0.1, "c": 0.15, "d": 0.05}, {"a": 0.0, "b": 0.1, "c": 0.1, "d": 0.8}]
    assert drawings.leading(sides, 2) == ["a", "d"]
    assert drawings.leading(sides, 9) == ["a", "b", "c", "d"]


def test_the_chosen_run_is_bold_and_right_and_wrong_are_told(model):
    parts = looked_at(model)
    table = drawings.draw_runs(parts, model)
    (chosen,) = re.findall(r'<tr class="chosen"><th>(\w+)', table)
    assert chosen == "memo"
    for name, says in parts.runs.items():
        tick = "✓" if says["class"] == "bee" else "✗"
        assert re.search(rf"<th>{name}<small>.*?</th><td>{says['class']} <i[^>]*>{tick}", table)


def test_missing_gradio_is_told_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    keep_surroundings(monkeypatch)
    monkeypatch.setitem(sys.modules, "gradio", None)
    params = read_params(demo.ROOT / "params.yaml", base=demo.ROOT)
    with pytest.raises(UserError, match=r'gradio.*pip install "ttt-lab\[demo\]"'):
        open_demo(params, 7990)
